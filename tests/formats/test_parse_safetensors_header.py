"""A safetensors header is read without trust: all that safetensors refuses, and duplicates."""

from __future__ import annotations

import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.encode_safetensors_header import HFTensor, encode_header, in_file_order
from dcp_hf_writer.formats.parse_safetensors_header import (
    FileHeader,
    StoredTensor,
    header_nbytes,
    parse_header,
)
from dcp_hf_writer.tensors.dtypes import TORCH_BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "none": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [32, 32]},
}
DATA_NBYTES = 32


def file_of(header: Any, data_nbytes: int = DATA_NBYTES) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(body).to_bytes(8, "little") + body + bytes(data_nbytes)


def parse(content: bytes, path: str = "model.safetensors") -> FileHeader:
    stop = header_nbytes(content[:8], file_nbytes=len(content), path=path)
    return parse_header(content[:stop], file_nbytes=len(content), path=path)


def is_read_by_safetensors(content: bytes, directory: Path) -> bool:
    path = directory / "probe.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


def changed(key: str, **fields: Any) -> dict[str, Any]:
    return {**TENSORS, key: {**TENSORS[key], **fields}}


def test_header_gives_tensors_in_the_order_of_their_bytes() -> None:
    header = {"__metadata__": {"format": "pt"}, **dict(reversed(TENSORS.items()))}
    content = file_of(header)
    found = parse(content)
    start = len(content) - DATA_NBYTES
    assert found.nbytes == start
    assert found.metadata == {"format": "pt"}
    assert list(found.tensors.values()) == [
        StoredTensor("a", "F32", (2, 3), start, 24),
        StoredTensor("b", "BF16", (4,), start + 24, 8),
        StoredTensor("none", "BF16", (0, 4), start + 32, 0),
    ]


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        name: torch.zeros(3, 2).to(dtype)
        for name, dtype in TORCH_BY_NAME.items()
        if name not in ("F4", "C64", "F8_E8M0")
    }
    tensors["scalar"] = torch.tensor(1.0)
    content = save(tensors, metadata={"format": "pt"})
    assert is_read_by_safetensors(content, tmp_path)
    found = parse(content).tensors
    assert {key: (one.dtype, one.shape) for key, one in found.items()} == {
        key: ("F32", ()) if key == "scalar" else (key, (3, 2)) for key in tensors
    }


def test_header_that_we_encode_is_read() -> None:
    tensors = in_file_order([HFTensor(name, name, (3, 4)) for name in TORCH_BY_NAME])
    header, starts = encode_header(tensors, metadata={"run": "one"}, align=4096)
    nbytes = len(header) + sum(tensor.nbytes for tensor in tensors)
    found = parse_header(header, file_nbytes=nbytes, path="x")
    assert {key: one.start for key, one in found.tensors.items()} == starts
    assert {one.torch_shape for one in found.tensors.values()} == {(3, 4)}
    assert found.tensors["F4"].shape == (3, 8)
    assert found.metadata == {"format": "pt", "run": "one"}


HUGE = 1 << 62
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "length 2^63": ((1 << 63).to_bytes(8, "little") + b"{}", "larger than readers accept"),
    "length 100 MB + 1": (
        (100_000_001).to_bytes(8, "little") + b"{}",
        "larger than readers accept",
    ),
    "beyond the end": ((9).to_bytes(8, "little") + b"{}", "beyond the end"),
    "no object": (file_of(b"[]", 0), "not a JSON object"),
    "leading space": (file_of(b" {}", 0), "not a JSON object"),
    "no header at all": (file_of(b"", 0), "not a JSON object"),
    "cut": (file_of(b'{"a": {', 0), "cannot be read"),
    "deep": (file_of(b'{"a": ' + b"[" * 100_000, 0), "nested too deep"),
    "not UTF-8": (file_of(b'{"\xff": {}}', 0), "not UTF-8"),
    "NaN": (file_of(b'{"a": NaN}', 0), "NaN"),
    "hole": (file_of(changed("b", data_offsets=[25, 33])), "leave a hole"),
    "hole at the start": (file_of({"b": TENSORS["b"]}), "leave a hole"),
    "overlap": (file_of(changed("b", data_offsets=[23, 31])), "overlap"),
    "twice the same bytes": (file_of({**TENSORS, "c": TENSORS["b"]}), "overlap"),
    "too much data": (file_of(TENSORS, 33), "does not end with its last tensor"),
    "too little data": (file_of(TENSORS, 31), "does not end with its last tensor"),
    "wrong size": (file_of(changed("b", shape=[5])), "do not match its shape and dtype"),
    "negative dim": (file_of(changed("b", shape=[-4])), "not a list of sizes"),
    "two negative dims": (file_of(changed("b", shape=[-2, -2])), "not a list of sizes"),
    "bool for a dim": (file_of(changed("b", shape=[True, 4])), "not a list of sizes"),
    "float for a dim": (file_of(changed("b", shape=[4.0])), "not a list of sizes"),
    "text for a shape": (file_of(changed("b", shape="4")), "not a list of sizes"),
    "65 dims": (file_of(changed("b", shape=[1] * 64 + [4])), "not a list of sizes"),
    "a million dims": (
        file_of(changed("b", shape=[HUGE] * 1_000_000)),
        "not a list of sizes",
    ),
    "overflow": (file_of(changed("b", shape=[HUGE, HUGE])), "too many elements"),
    "overflow beside a zero": (
        file_of(changed("none", shape=[HUGE, HUGE, 0])),
        "too many elements",
    ),
    "overflow of bytes": (file_of(changed("a", shape=[HUGE])), "too many elements"),
    "stop before start": (
        file_of(changed("b", data_offsets=[32, 24])),
        "do not match its shape and dtype",
    ),
    "offset 2^63": (file_of(changed("b", data_offsets=[24, 1 << 63])), "not two byte offsets"),
    "three offsets": (file_of(changed("b", data_offsets=[24, 28, 32])), "not two byte offsets"),
    "one offset": (file_of(changed("b", data_offsets=[24])), "not two byte offsets"),
    "unknown dtype": (file_of(changed("b", dtype="BF17")), "unknown dtype"),
    "dtype no text": (file_of(changed("b", dtype=[])), "unknown dtype"),
    "additional field": (file_of(changed("b", offset=0)), "other fields than readers expect"),
    "entry no object": (file_of({**TENSORS, "c": 1}), "other fields than readers expect"),
    "metadata no object": (file_of({"__metadata__": [], **TENSORS}), "metadata"),
    "metadata no text": (file_of({"__metadata__": {"a": 1}, **TENSORS}), "metadata"),
    "empty key": (file_of({"": TENSORS["a"]}, 24), "no usable name"),
    "half a character": (
        file_of(json.dumps({"\ud800": TENSORS["a"]}).encode(), 24),
        "no usable name",
    ),
    "F4 scalar": (file_of({"a": {**TENSORS["a"], "dtype": "F4", "shape": []}}), "middle of a byte"),
    "odd F4": (file_of({"a": {**TENSORS["a"], "dtype": "F4", "shape": [3]}}), "middle of a byte"),
    "digits": (file_of(b'{"a": ' + b"1" * 5000 + b"}", 0), "cannot be read"),
    "duplicate key": (
        file_of(f'{json.dumps(TENSORS)[:-1]}, "b": {json.dumps(TENSORS["b"])}}}'.encode()),
        "'b' twice",
    ),
}  # fmt: skip

# What safetensors takes: the last of two equal keys, an empty one, fields that it does not know,
# more dimensions than torch has, white space.
ACCEPTED_BY_SAFETENSORS = {
    *("duplicate key", "empty key", "additional field", "65 dims", "leading space"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused(name: str, tmp_path: Path) -> None:
    content, message = HOSTILE[name]
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        parse(content, "hf/bad.safetensors")
    assert "hf/bad.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert is_read_by_safetensors(content, tmp_path) == (name in ACCEPTED_BY_SAFETENSORS)


def test_nothing_is_allocated_for_a_header_that_is_not_there() -> None:
    start = (99_999_999).to_bytes(8, "little")
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match="beyond the end"):
            header_nbytes(start, file_nbytes=1000, path="x")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


FIELD = st.one_of(
    st.integers(-2, 1 << 65),
    st.lists(st.integers(-1, 40), max_size=3),
    st.sampled_from(["F32", "BF16", "F4", "U8", "X"]),
    st.none(),
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_header_is_refused_or_read_as_safetensors_reads_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header: dict[str, Any] = json.loads(json.dumps(TENSORS))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(header)))
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "new"]))
        header[key] = {**header[key], field: data.draw(FIELD)}
    content = file_of(header, data.draw(st.sampled_from([32, 31, 24, 0])))
    directory = tmp_path_factory.getbasetemp()
    try:
        found = parse(content)
    except CorruptCheckpointError:
        return
    assert is_read_by_safetensors(content, directory)
    with safe_open(directory / "probe.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(found.tensors)
