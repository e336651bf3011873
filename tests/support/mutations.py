"""Ways to spoil the files of a checkpoint: their bytes, their JSON, the objects of a pickle."""

from __future__ import annotations

import json
import pickle
import pickletools
import struct
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from support import once_forms

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.checkpoint.metadata import Metadata

NUMBERS = (0, 1, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
PATHS = ("/etc/passwd", "../x", "a/../../x", "", ".", "..", "/", "\0", "a\\b", "\ud800", "x" * 5000)
NAMES = ("__metadata__", "w", "model.safetensors", ".metadata", "dcp-hf.json", "__0_0.distcp")


@st.composite
def spoiled_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw some bytes like others, but for a few places."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
        kind = draw(st.sampled_from(["flip", "set", "number", "insert", "delete", "copy", "cut"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == "number":
            data[at : at + 8] = draw(st.sampled_from(NUMBERS)).to_bytes(8, "little")
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=length))
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "copy":
            start = draw(st.integers(0, len(data)))
            data[at:at] = data[start : start + length]
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-(1 << 65), 1 << 65),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(PATHS + NAMES),
    st.text(max_size=5),
    st.lists(st.integers(-2, 100), max_size=5),
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9), max_size=2),
    st.sampled_from([_nested(50), _nested(500), [0] * 5000, [1 << 62] * 100]),
    # A later change may be of the value itself: each draw gets its own.
).map(lambda value: json.loads(json.dumps(value)))


@st.composite
def spoiled_json(draw: st.DrawFn, value: Any) -> Any:
    """Draw a JSON value like another one, but for a few places."""
    root = [json.loads(json.dumps(value))]
    for _ in range(draw(st.integers(1, 4))):
        places = _places(root)
        container, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "swap", "remove", "rename", "add", "shift"]))
        if kind == "replace":
            container[key] = draw(VALUES)
        elif kind == "swap":
            other, other_key = draw(st.sampled_from(places))
            container[key], other[other_key] = other[other_key], container[key]
            if _is_cyclic(root):
                container[key], other[other_key] = other[other_key], container[key]
        elif kind == "remove" and container is not root:
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[draw(st.sampled_from(PATHS + NAMES))] = container.pop(key)
        elif kind == "add" and isinstance(container, list) and container is not root:
            container.append(container[key])
        elif kind == "shift" and type(container[key]) is int:
            container[key] += draw(st.sampled_from([-8, -1, 1, 2, 8, 1 << 40]))
    return root[0]


def _places(value: Any) -> list[tuple[Any, Any]]:
    found = []
    todo = [value]
    while todo:
        container = todo.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in list(keys)[:200]:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                todo.append(container[key])
    return found


def _is_cyclic(value: Any) -> bool:
    try:
        json.dumps(value)
    except (ValueError, RecursionError):
        return True
    return False


@st.composite
def spoiled_metadata(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a pickle of DCP's metadata like another one, but for a few places of its objects."""
    metadata: Metadata = once_forms.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        act = draw(st.sampled_from(_ACTS))
        act(draw, metadata)
    data = once_forms.dumps(metadata, draw(st.integers(0, pickle.HIGHEST_PROTOCOL)))
    return draw(spoiled_bytes(data)) if draw(st.booleans()) else data


def _info(draw: st.DrawFn, metadata: Metadata) -> Any:
    storage = metadata.storage_data
    if not isinstance(storage, dict) or not storage:
        return None
    return storage[draw(st.sampled_from(sorted(storage, key=str)))]


def _move(draw: st.DrawFn, metadata: Metadata) -> None:
    info = _info(draw, metadata)
    if hasattr(info, "__dict__"):
        name = draw(st.sampled_from(["relative_path", "offset", "length", "transform_descriptors"]))
        object.__setattr__(info, name, draw(VALUES))


def _once(draw: st.DrawFn, metadata: Metadata) -> None:
    """Change what says where weights are that are stored once, in either form."""
    storage = metadata.storage_data
    places = storage.items() if isinstance(storage, dict) else ()
    plain = [i for i, one in places if isinstance(_texts_of(one), tuple)]
    pickled = [i for i, one in places if isinstance(one, once_forms.StoredOnce) and one.parts]
    if plain:
        info = storage[draw(st.sampled_from(sorted(plain, key=str)))]
        texts = list(info.transform_descriptors)
        at = draw(st.sampled_from(range(len(texts))))
        texts[at] = draw(_spoiled_text(texts[at]))
        info.transform_descriptors = draw(st.sampled_from([tuple, list]))(texts)
    elif pickled:
        index = draw(st.sampled_from(sorted(pickled, key=str)))
        part = draw(st.sampled_from(storage[index].parts))
        name = draw(st.sampled_from([field.name for field in fields(part)]))
        value = draw(VALUES | st.lists(VALUES, max_size=2).map(tuple))
        storage[index] = once_forms.StoredOnce((replace(part, **{name: value}),))


def _texts_of(info: Any) -> Any:
    return getattr(info, "transform_descriptors", None) or None


@st.composite
def _spoiled_text(draw: st.DrawFn, text: Any) -> Any:
    kind = draw(st.sampled_from(["value", "text", "bytes", "json"]))
    if kind == "value" or not isinstance(text, str):
        return draw(VALUES)
    if kind == "text":
        return draw(st.sampled_from([*PATHS, *NAMES, "-1", "1" * 5000, "[" * 5000]))
    if kind == "json" and text.startswith("["):
        return json.dumps(draw(spoiled_json(json.loads(text))))
    data = draw(spoiled_bytes(text.encode(errors="surrogatepass")))
    return data.decode(errors="replace")


def _lose(draw: st.DrawFn, metadata: Metadata) -> None:
    part = draw(st.sampled_from([metadata.storage_data, metadata.state_dict_metadata]))
    if isinstance(part, dict) and part:
        part.pop(draw(st.sampled_from(sorted(part, key=str))))


def _tensor(draw: st.DrawFn, metadata: Metadata) -> Any:
    known = metadata.state_dict_metadata
    tensors = [one for _, one in sorted(known.items(), key=str) if hasattr(one, "chunks")]
    return draw(st.sampled_from(tensors)) if tensors else None


def _sizes(draw: st.DrawFn) -> Any:
    values = st.integers(0, 10) | st.sampled_from([n for n in NUMBERS if n < 1 << 63])
    return torch.Size(draw(st.lists(values, max_size=4)))


def _reshape(draw: st.DrawFn, metadata: Metadata) -> None:
    tensor = _tensor(draw, metadata)
    if tensor is not None and isinstance(tensor.chunks, list) and tensor.chunks:
        chunk = draw(st.sampled_from(range(len(tensor.chunks))))
        kind = draw(st.sampled_from(["size", "offsets", "sizes", "drop", "double", "replace"]))
        if kind == "size":
            tensor.size = _sizes(draw)
        elif kind == "drop":
            del tensor.chunks[chunk]
        elif kind == "double":
            tensor.chunks.append(tensor.chunks[chunk])
        elif kind == "replace":
            tensor.chunks = draw(VALUES)
        elif hasattr(tensor.chunks[chunk], kind):
            setattr(tensor.chunks[chunk], kind, _sizes(draw))


def _retype(draw: st.DrawFn, metadata: Metadata) -> None:
    tensor = _tensor(draw, metadata)
    if tensor is not None:
        tensor.properties.dtype = draw(st.sampled_from([torch.uint8, torch.float64, torch.qint8]))


def _replan(draw: st.DrawFn, metadata: Metadata) -> None:
    name = draw(st.sampled_from(["planner_data", "storage_data", "storage_meta", "version"]))
    setattr(metadata, name, draw(VALUES | st.dictionaries(st.text(max_size=3), VALUES, max_size=3)))


def _rename(draw: st.DrawFn, metadata: Metadata) -> None:
    known = metadata.state_dict_metadata
    if known:
        entry = known.pop(draw(st.sampled_from(sorted(known, key=str))))
        known[draw(st.sampled_from([*PATHS, "model.embed"]))] = entry


def _index(draw: st.DrawFn, metadata: Metadata) -> None:
    if isinstance(metadata.storage_data, dict):
        index = MetadataIndex(draw(st.sampled_from(NAMES)), draw(st.none() | st.just([0, 1])))
        metadata.storage_data[draw(st.sampled_from([index, "text"]))] = draw(VALUES)


_ACTS: tuple[Callable[[st.DrawFn, Metadata], None], ...] = (
    *(_move, _once, _lose, _reshape, _retype, _replan, _rename, _index),
)

_GLOBALS = (
    *("os system", "builtins eval", "builtins exec", "subprocess Popen", "torch load"),
    *("torch float32", "torch Size", "collections OrderedDict", "posixpath join", "builtins list"),
    *(
        f"torch.distributed.checkpoint.metadata {name}"
        for name in ("Metadata", "TensorStorageMetadata", "MetadataIndex", "TensorProperties")
    ),
)


@st.composite
def pickle_streams(draw: st.DrawFn) -> bytes:
    """Draw a stream of pickle's opcodes, each with an argument of its form."""
    parts = [b"\x80\x04"] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 30))):
        opcode = draw(st.sampled_from(pickletools.opcodes))
        parts.append(opcode.code.encode("latin-1") + _argument(draw, opcode))
    return b"".join(parts) + b"."


def _argument(draw: st.DrawFn, opcode: Any) -> bytes:
    if opcode.arg is None:
        return b""
    if opcode.code in "ci":
        return draw(st.sampled_from(_GLOBALS)).replace(" ", "\n").encode() + b"\n"
    length = opcode.arg.n
    if length > 0:
        return draw(st.binary(min_size=length, max_size=length))
    if length == pickletools.UP_TO_NEWLINE:
        return draw(st.sampled_from([b"1", b"'a'", b"00", b"-5", b"x", b"1e9"])) + b"\n"
    text = draw(st.sampled_from([b"", b"a", b"torch", b"float32", b"x" * 300]))
    width = {
        pickletools.TAKEN_FROM_ARGUMENT1: 1,
        pickletools.TAKEN_FROM_ARGUMENT4: 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: 4,
        pickletools.TAKEN_FROM_ARGUMENT8U: 8,
    }[length]
    claimed = draw(st.sampled_from([len(text), len(text), 1 << 31, (1 << 63) - 1]))
    return struct.pack("<Q", claimed)[:width] + text
