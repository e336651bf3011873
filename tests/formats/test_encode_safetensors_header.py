"""Headers, compared byte by byte with those that safetensors writes."""

from __future__ import annotations

import os

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer.errors import LayoutError
from dcp_hf_writer.formats import encode_safetensors_header
from dcp_hf_writer.formats.encode_safetensors_header import (
    MAX_HEADER_NBYTES,
    HFTensor,
    encode_header,
    in_file_order,
)
from dcp_hf_writer.tensors.dtypes import TORCH_BY_NAME, stored_shape
from support.compare import parse

# Every character that UTF-8 has: control characters, quotes, separators, beyond the first plane.
KEYS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(
    lambda key: key != "__metadata__"
)
TENSORS = st.dictionaries(
    KEYS,
    st.tuples(
        st.sampled_from(sorted(TORCH_BY_NAME)),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ).filter(lambda kind: kind[0] != "F4" or kind[1]),
    min_size=1,
    max_size=8,
).map(lambda found: [HFTensor(key, dtype, shape) for key, (dtype, shape) in found.items()])


def filled(tensor: HFTensor) -> torch.Tensor:
    data = torch.frombuffer(bytearray(os.urandom(max(tensor.nbytes, 8))), dtype=torch.uint8)
    dtype = TORCH_BY_NAME[tensor.dtype]
    if dtype is torch.bool:
        data %= 2
    return data[: tensor.nbytes].view(dtype).reshape(tensor.shape)


@settings(deadline=None)
@given(TENSORS)
def test_header_equals_that_of_the_library(tensors: list[HFTensor]) -> None:
    values = {tensor.key: filled(tensor) for tensor in tensors}
    expected = safetensors.torch.save(values, metadata={"format": "pt"})
    header, _ = encode_header(in_file_order(tensors), metadata={}, align=8)
    assert header == expected[: len(header)]
    assert len(header) == parse(expected).data_start


@settings(deadline=None)
@given(TENSORS, st.sampled_from([8, 16, 64, 4096]), st.dictionaries(KEYS, KEYS, max_size=3))
def test_data_put_at_the_starts_is_what_the_library_reads(
    tensors: list[HFTensor], align: int, metadata: dict[str, str]
) -> None:
    metadata.pop("format", None)
    values = {tensor.key: filled(tensor) for tensor in tensors}
    header, starts = encode_header(in_file_order(tensors), metadata=metadata, align=align)
    assert len(header) % align == 0
    content = bytearray(header) + bytearray(sum(tensor.nbytes for tensor in tensors))
    expected = {}
    for tensor in tensors:
        data = values[tensor.key].reshape(-1).view(torch.uint8).numpy().tobytes()
        content[starts[tensor.key] : starts[tensor.key] + tensor.nbytes] = data
        shape = stored_shape(tensor.dtype, tensor.shape, key=tensor.key)
        expected[tensor.key] = (tensor.dtype, list(shape), data)
    read = {
        key: (entry["dtype"], entry["shape"], bytes(entry["data"]))
        for key, entry in safetensors.deserialize(bytes(content))
    }
    assert read == expected
    assert parse(bytes(content)).header[0] == ("__metadata__", {"format": "pt", **metadata})


def test_names_sort_by_their_bytes_when_characters_lie_beyond_the_first_plane() -> None:
    # In UTF-16, as some languages sort, the second would come first.
    names = ["\uffee", "\U0001f600"]
    tensors = [HFTensor(name, "F32", (1,)) for name in reversed(names)]
    assert [tensor.key for tensor in in_file_order(tensors)] == names


def test_header_limit_is_that_of_the_library() -> None:
    empty = b'{"__metadata__":{"format":"pt"}}'

    def file_of(nbytes: int) -> bytes:
        return nbytes.to_bytes(8, "little") + empty.ljust(nbytes)

    assert safetensors.deserialize(file_of(MAX_HEADER_NBYTES)) == []
    with pytest.raises(safetensors.SafetensorError, match="header too large"):
        safetensors.deserialize(file_of(MAX_HEADER_NBYTES + 1))


def test_header_is_refused_when_it_is_larger_than_readers_accept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = [HFTensor(f"layers.{i}", "F32", (1,)) for i in range(3)]
    header, _ = encode_header(tensors, metadata={}, align=8)
    # The length field does not count.
    monkeypatch.setattr(encode_safetensors_header, "MAX_HEADER_NBYTES", len(header) - 8)
    assert encode_header(tensors, metadata={}, align=8)[0] == header
    monkeypatch.setattr(encode_safetensors_header, "MAX_HEADER_NBYTES", len(header) - 9)
    with pytest.raises(LayoutError, match="max_shard_size") as caught:
        encode_header(tensors, metadata={}, align=8)
    assert caught.value.found == f"{len(header) - 8} bytes for 3 tensors"
