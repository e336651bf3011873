"""DCP's metadata is read as pickle reads it, and nothing that a pickle says is done."""

from __future__ import annotations

import math
import os
import pickle
import random
import resource
import signal
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats import weights_once_places
from dcp_hf_writer.formats.parse_dcp_metadata import parse_metadata
from dcp_hf_writer.formats.restricted_unpickle import unpickle
from support.once_forms import Copy, Loop, StoredOnce, StoredPart, dumps, pickled_once

if TYPE_CHECKING:
    from collections.abc import Callable

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def parse(data: bytes) -> Metadata:
    return parse_metadata(data, path="/ckpt/.metadata")


def tensor(size: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
    boxes = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
    return TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size(size), boxes)


def metadata(**changes: Any) -> Metadata:
    index = MetadataIndex("model.w", (0, 0), 0)
    fields: dict[str, Any] = {
        "state_dict_metadata": {
            "model.w": tensor((4, 2), ((0, 0), (2, 2)), ((2, 0), (2, 2))),
            "scale": tensor((), ((), ())),
            "step": BytesStorageMetadata(),
        },
        "planner_data": {"model.w": ("model", "w"), "lr": ("optim", 0, "lr"), "step": ("step",)},
        "storage_data": {
            index: _StorageInfo("__0_0.distcp", 0, 100),
            MetadataIndex("model.w", (2, 0), 1): _StorageInfo("__1_0.distcp", 70_000, 100),
            MetadataIndex("step"): _StorageInfo("__0_0.distcp", 100, 1 << 40, ("zstd",)),
        },
        "storage_meta": StorageMeta("/ckpt", "save", None, ["a"]),
        "version": "1.0.0",
    }
    return Metadata(**(fields | changes))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_metadata_is_read_as_pickle_reads_it(protocol: int) -> None:
    wanted = metadata()
    assert parse(pickle.dumps(wanted, protocol)) == wanted


def test_weights_stored_once_by_earlier_versions_are_read_as_pickle_reads_them() -> None:
    copy = Copy((0, 1), (0, 0), (Loop(2, 0, 1, 0, 1), Loop(2, 1, 2, 1, 1)))
    part = StoredPart("hf/model.safetensors", "w", 80, "BF16", (2, 4), (copy,))
    once = StoredOnce((part,))
    wanted = metadata(storage_data={MetadataIndex("model.w", (0, 0)): once})
    (found,) = (parse(dumps(wanted)).storage_data or {}).values()
    assert pickled_once(found) == once


def test_every_field_of_what_torch_writes_is_read(tmp_path: Path) -> None:
    state = {"model": {"w": torch.zeros(3, 2), "b": torch.zeros(3)}, "optim": [{"lr": 0.1}], "n": 3}
    dcp.save(state, checkpoint_id=tmp_path / "stock")
    dcp.save(state, storage_writer=HFDualWriter(tmp_path / "ours", export=None))
    for name in ("stock", "ours"):
        data = (tmp_path / name / ".metadata").read_bytes()
        wanted = pickle.loads(data)
        wanted.storage_meta.checkpoint_id = str(wanted.storage_meta.checkpoint_id)
        assert parse(data) == wanted


@pytest.mark.parametrize("path", [Path("/a/b"), PurePosixPath("a"), Path("a/../b")], ids=str)
def test_path_given_as_checkpoint_id_is_read_as_text(path: Path) -> None:
    found = parse(pickle.dumps(metadata(storage_meta=StorageMeta(path))))
    assert found.storage_meta is not None
    assert found.storage_meta.checkpoint_id == str(path)


@pytest.mark.parametrize(
    "dtype",
    sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str),
    ids=str,
)
def test_every_dtype_is_known(dtype: torch.dtype) -> None:
    entry = TensorStorageMetadata(TensorProperties(dtype), torch.Size([]), [])
    assert parse(pickle.dumps(metadata(state_dict_metadata={"w": entry}))).state_dict_metadata == {
        "w": entry
    }


@st.composite
def random_metadata(draw: st.DrawFn) -> Metadata:
    extents = st.integers(0, 1 << 20)
    names = st.text(max_size=300)
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for name in draw(st.lists(names, unique=True, max_size=6)):
        ndim = draw(st.integers(0, 3))
        sizes = tuple(draw(extents) for _ in range(ndim))
        offset = tuple(draw(st.integers(0, 1 << 30)) for _ in range(ndim))
        size = tuple(o + s for o, s in zip(offset, sizes, strict=True))
        entries[name] = draw(
            st.sampled_from(
                [BytesStorageMetadata(), tensor((1, *size), ((0, *offset), (1, *sizes)))]
            )
        )
        index = MetadataIndex(name, offset, draw(st.none() | st.integers(0, 1 << 33)))
        storage[index] = _StorageInfo(draw(names), draw(extents), draw(st.integers(0, 1 << 62)))
    paths = {name: (name, draw(st.integers(-5, 5)), draw(names)) for name in entries}
    return metadata(state_dict_metadata=entries, storage_data=storage, planner_data=paths)


@settings(max_examples=150, deadline=None)
@given(wanted=random_metadata(), protocol=st.sampled_from(PROTOCOLS))
def test_any_metadata_is_read_as_pickle_reads_it(wanted: Metadata, protocol: int) -> None:
    numel = [
        math.prod(entry.size)
        for entry in wanted.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    ]
    data = pickle.dumps(wanted, protocol)
    if max(numel, default=0) * 2 >= 1 << 63:
        with pytest.raises(CorruptCheckpointError, match="an impossible tensor"):
            parse(data)
    else:
        assert parse(data) == wanted


class Calls:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), "posix.system"),
        (os.mkdir, ("{marker}",), "posix.mkdir"),
        (eval, ("__import__('os').mkdir('{marker}')",), "builtins.eval"),
        (exec, ("import os; os.mkdir('{marker}')",), "builtins.exec"),
        (getattr, (os, "mkdir"), "builtins.getattr"),
        (torch.load, ("{marker}",), "torch.serialization.load"),
        (pickle.loads, (b"",), "_pickle.loads"),
        (print, ("x",), "builtins.print"),
        (Path, ("{marker}",), None),
        (dict, (), "builtins.dict"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_code_in_metadata_is_named_and_not_run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    name: str | None,
    protocol: int,
    tmp_path: Path,
) -> None:
    marker = tmp_path / "was-here"
    filled = [a.format(marker=marker) if isinstance(a, str) else a for a in arguments]
    if os in filled:
        filled[0] = 0
    entries = {"step": Calls(function, *filled)}
    data = pickle.dumps(metadata(state_dict_metadata=entries), protocol)
    with pytest.raises(CorruptCheckpointError) as caught:
        parse(data)
    assert not marker.exists()
    shown = str(caught.value)
    assert "/ckpt/.metadata" in shown
    if protocol > 2:
        assert name is None or name in shown
    # The control: the same bytes do something where they are believed.
    if function is os.mkdir:
        pickle.loads(data)
        assert marker.exists()


def stream(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


SIZE = text("torch") + text("Size") + b"\x93"
FORMAT = text("torch.distributed.checkpoint.metadata") + text("_MEM_FORMAT_ENCODING") + b"\x93"
DOUBLED = b")\x94" + b"".join(
    b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60)
)
NESTED = b")" + b"\x85" * 100_000
HOSTILE = {
    "a memo of 32 GiB": stream(b"Nr\xff\xff\xff\x7f"),
    "bytes of 2^62": stream(b"\x8e" + (1 << 62).to_bytes(8, "little")),
    "a bytearray of 2^62": stream(b"\x96" + (1 << 62).to_bytes(8, "little")),
    "text of 2^31": stream(b"X\xff\xff\xff\x7fabc"),
    "text of 2^62": stream(b"\x8d" + (1 << 62).to_bytes(8, "little")),
    "an integer of 2^31 bytes": stream(b"\x8b\xff\xff\xff\x7f1"),
    "a frame of 2^62": stream(b"\x95" + (1 << 62).to_bytes(8, "little") + b"N"),
    "a key that takes for ever to hash": stream(b"}", DOUBLED, b"Ns"),
    "a key nested beyond C's stack": stream(b"}", NESTED, b"Ns"),
    "a size that takes for ever to show": stream(SIZE, DOUBLED, b"\x85R"),
    "a size nested beyond C's stack": stream(SIZE, NESTED, b"\x85R"),
    "a member that takes for ever to hash": stream(FORMAT, DOUBLED, b"\x85R"),
    "a member nested beyond C's stack": stream(FORMAT, NESTED, b"\x85R"),
    "planner data nested beyond C's stack": pickle.dumps(
        metadata(planner_data={"w": "MARK"})
    ).replace(text("MARK"), NESTED),
    "a list that holds itself": stream(b"]\x94h\x00a"),
    "a class in place of an object": stream(SIZE, b"}b"),
    "a state for a class": stream(FORMAT, b"}" + text("_value2member_map_") + b"Nsb"),
    "an empty stack": stream(b"\x86"),
    "no mark": stream(b"t"),
    "a mark too many": stream(b"(N"),
    "a mark as a value": stream(b"(\x85"),
    "a persistent id": stream(b"NQ"),
    "an extension": stream(b"\x82\x01"),
    "nothing": b"",
    "no end": b"\x80\x04N",
    "another object": pickle.dumps({"state_dict_metadata": {}}),
    "a memo that is not there": stream(b"h\x07"),
    "text that is no text": stream(b"\x8c\x02\xff\xfe"),
    "a name that is no text": stream(b"K\x01K\x02\x93"),
}


def limited(seconds: int, nbytes: int) -> None:
    signal.alarm(seconds)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + nbytes, -1))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_stream_is_refused_at_once_without_memory(name: str) -> None:
    # In a child: what must not happen would take this process with it.
    child = os.fork()
    if not child:
        limited(20, 64 << 20)
        try:
            parse(HOSTILE[name])
        except CorruptCheckpointError as error:
            os._exit(0 if len(str(error)) < 1000 else 3)
        except BaseException:  # noqa: BLE001 - whatever it is, it is not what it should be
            os._exit(4)
        os._exit(5)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_check_of_memory_and_time_sees_what_it_forbids() -> None:
    for name in ("a memo of 32 GiB", "a key that takes for ever to hash"):
        child = os.fork()
        if not child:
            limited(2, 64 << 20)
            try:
                pickle.loads(HOSTILE[name])
            except BaseException:  # noqa: BLE001 - any end but a good one
                os._exit(4)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) != 0


def changed(**changes: Any) -> Metadata:
    return metadata(**changes)


GEOMETRY = '["F32",[2],[[[0],[0],[[2,0,1,0,1]]]]]'


def texts(*descriptors: Any, first: Any = weights_once_places.FORMAT) -> Any:
    """Return the storage data of a chunk that is stored once, from text that may be wrong."""
    return _StorageInfo(weights_once_places.NOTICE, 0, 8, (first, *descriptors))


BAD_METADATA = {
    "places by descriptors that are no text": {
        "storage_data": {MetadataIndex("w"): texts("f", "w", 0, GEOMETRY)}
    },
    "places by too few descriptors": {"storage_data": {MetadataIndex("w"): texts("f", "w", "0")}},
    "places in a newer form": {
        "storage_data": {MetadataIndex("w"): texts(first="stored-once@dcp_hf_writer/2")}
    },
    "chunk beyond its tensor": {"state_dict_metadata": {"w": tensor((4,), ((2,), (3,)))}},
    "chunk of other dimensions": {"state_dict_metadata": {"w": tensor((4,), ((0, 0), (4, 1)))}},
    "tensor of 2^63 bytes": {"state_dict_metadata": {"w": tensor((1 << 31, 1 << 32))}},
    "entry of another kind": {"state_dict_metadata": {"w": 3}},
    "chunk of another kind": {
        "state_dict_metadata": {
            "w": TensorStorageMetadata(TensorProperties(), torch.Size([1]), [3])  # type: ignore[list-item]
        }
    },
    "place of another kind": {"storage_data": {MetadataIndex("w"): "__0_0.distcp"}},
    "place by name": {"storage_data": {"w": _StorageInfo("f", 0, 1)}},
    "negative place": {"storage_data": {MetadataIndex("w"): _StorageInfo("f", -1, 1)}},
    "place that is no number": {"storage_data": {MetadataIndex("w"): _StorageInfo("f", 0.5, 1)}},  # type: ignore[arg-type]
    "path that is no text": {"storage_data": {MetadataIndex("w"): _StorageInfo(3, 0, 1)}},  # type: ignore[arg-type]
    "index that is no text": {"storage_data": {MetadataIndex(3): _StorageInfo("f", 0, 1)}},  # type: ignore[arg-type]
    "no tensors": {"state_dict_metadata": None},
    "name that is no text": {"state_dict_metadata": {3: BytesStorageMetadata()}},
    "properties of another kind": {
        "state_dict_metadata": {"w": TensorStorageMetadata("f32", torch.Size([]), [])}  # type: ignore[arg-type]
    },
    "version that is no text": {"version": 3},
    "planner data of other kinds": {"planner_data": {"w": torch.Size([1]), "v": StorageMeta()}},
    "stored once beyond its tensor": {
        "storage_data": {
            MetadataIndex("w"): StoredOnce(
                (StoredPart("f", "w", 0, "F32", (2,), (Copy((1,), (0,), (Loop(2, 0, 1, 0, 1),)),)),)
            )
        }
    },
    "stored once in no dtype": {
        "storage_data": {MetadataIndex("w"): StoredOnce((StoredPart("f", "w", 0, "F33", (), ()),))}
    },
    "stored once by a negative step": {
        "storage_data": {
            MetadataIndex("w"): StoredOnce(
                (
                    StoredPart(
                        "f", "w", 0, "F32", (2,), (Copy((1,), (0,), (Loop(2, 0, -1, 0, 1),)),)
                    ),
                )
            )
        }
    },
    "stored once in a dimension that is not there": {
        "storage_data": {
            MetadataIndex("w"): StoredOnce(
                (StoredPart("f", "w", 0, "F32", (2,), (Copy((0,), (0,), (Loop(2, 1, 1, 0, 1),)),)),)
            )
        }
    },
}


@pytest.mark.parametrize("name", BAD_METADATA)
def test_metadata_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(CorruptCheckpointError) as caught:
        parse(dumps(metadata(**BAD_METADATA[name])))
    assert "/ckpt/.metadata" in str(caught.value)


def test_tensor_that_is_its_own_chunk_is_refused() -> None:
    # The list is filled after it became part of the tensor's state.
    entry = tensor((4,), ((0,), (4,)))
    entry.chunks.append(entry)
    with pytest.raises(CorruptCheckpointError, match="TensorStorageMetadata as a chunk"):
        parse(pickle.dumps(metadata(state_dict_metadata={"w": entry})))


def test_truncated_metadata_is_refused_wherever_it_ends() -> None:
    data = pickle.dumps(metadata())
    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            parse(data[:length])


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change a stream in a few places as a fuzzer does."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed))
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            del changed[at : at + rng.randint(1, 9)]
        elif kind == 3:
            changed[at:at] = changed[(start := rng.randrange(len(changed))) : start + 40]
        else:
            changed[at:at] = rng.choice([b"\x94", b"h\x00", b"(", b"t", b"}", b"b", b"R", b"\x81"])
        changed = changed or bytearray(b".")
    return bytes(changed)


@pytest.mark.parametrize("count", [10_000, pytest.param(300_000, marks=pytest.mark.slow)])
def test_fuzzed_metadata_is_read_or_refused(count: int) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    once = StoredOnce((StoredPart("f", "w", 0, "F32", (2,), (Copy((0,), (0,), ()),)),))
    seeds = [
        pickle.dumps(metadata(), 2),
        pickle.dumps(metadata(), 4),
        dumps(metadata(storage_data={MetadataIndex("w"): once}), 4),
        pickle.dumps(
            metadata(storage_data={MetadataIndex("w"): texts("f", "w", "0", GEOMETRY)}), 4
        ),
    ]
    refused = 0
    for n in range(count):
        data = mutate(rng.choice(seeds), rng)
        began = time.monotonic()
        try:
            found = parse(data)
        except CorruptCheckpointError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, n {n}: {data!r}") from error
        else:
            assert type(found) is Metadata
            for entry in found.state_dict_metadata.values():
                assert type(entry) in {TensorStorageMetadata, BytesStorageMetadata}
        assert time.monotonic() - began < 5, f"seed {seed}, n {n}: {data!r}"
    assert count * 0.3 < refused < count


def test_plain_values_are_read_as_pickle_reads_them() -> None:
    value: Any = [
        None,
        True,
        1,
        -1,
        1 << 40,
        -(1 << 70),
        1.5,
        "é" * 300,
        {"a": [(), (1, 2, 3)]},
    ]
    for protocol in PROTOCOLS:
        assert unpickle(pickle.dumps(value, protocol), {}, path="p") == value
