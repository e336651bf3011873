"""Parse DCP's `.metadata` without trusting it.

torch reads this file with `pickle.load`, which runs whatever code the file names. Here,
`restricted_unpickle` builds the objects. This module then checks everything that DCP's planners
rely on, before any other code sees the objects.

A newer torch may add fields to its classes, as torch 2.15 added `TensorProperties.strides`. Such
fields are kept if they are plain. An unknown class is refused. Names that torch used before 2.3 are
mapped to today's classes.
"""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.restricted_unpickle import Admitted, Class, Constant, Function, unpickle
from dcp_hf_writer.formats.strict_json import shortened
from dcp_hf_writer.formats.weights_once_places import (
    StoredOnce,
    StoredOnceDecoder,
    StoredPart,
    is_copy,
    is_loop,
    is_once,
    is_part,
)
from dcp_hf_writer.tensors.strided_copies import Copy, Loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


# Room for ten million chunks of a hundred bytes each; a larger file is refused unread.
MAX_METADATA_NBYTES = 1 << 30

_METADATA = "torch.distributed.checkpoint.metadata"
# torch before 2.3 took the class for tensor properties from another module.
_METADATA_BEFORE_2_3 = "torch.distributed._shard.sharded_tensor.metadata"
_FILE_SYSTEM = "torch.distributed.checkpoint.filesystem"

_MAX_NBYTES = 1 << 63
_MAX_DEPTH = 64


def paths_in(metadata: Metadata) -> Mapping[str, Sequence[str | int]]:
    """Return the path of each FQN in the state dict, in its order; empty if none are recorded.

    Args:
        metadata: The metadata, as `parse_metadata` returned it.
    """
    return metadata.planner_data if isinstance(metadata.planner_data, dict) else {}


def parse_metadata(data: bytes, *, path: str) -> Metadata:
    """Parse the `.metadata` of a checkpoint.

    Args:
        data: The bytes of the file.
        path: The file, for error messages.

    Returns:
        The object that torch's own reader returns, with two differences: `checkpoint_id` of its
        `storage_meta` is text, and the storage data of a chunk that is stored once is a
        `StoredOnce`.

    Raises:
        CorruptCheckpointError: If `data` holds anything else than the metadata of a checkpoint: an
            unexpected class, code, a chunk outside its tensor, an impossible size.
    """
    unknown: list[object] = []
    found = unpickle(data, _ADMITTED, path=path, unknown=unknown)
    if type(found) is not Metadata:
        _refuse(path, "is not a Metadata object", found=type(found).__name__)
    _check_tensors(found.state_dict_metadata, path)
    _check_storage(found.storage_data, path)
    _check_plain(found.planner_data, "planner data", path)
    _check_plain(unknown, "a field that this package does not know", path, also=_OF_TORCH)
    if type(found.storage_meta) not in {StorageMeta, type(None)}:
        _refuse(
            path, "has a storage_meta of the wrong type", found=type(found.storage_meta).__name__
        )
    return found


def _check_tensors(tensors: object, path: str) -> None:
    if type(tensors) is not dict:
        _refuse(path, "has no dict of tensors", found=type(tensors).__name__)
    for fqn, entry in tensors.items():
        if type(fqn) is not str:
            _refuse(path, "has a tensor name that is not text", found=_shown(fqn))
        if type(entry) is TensorStorageMetadata:
            fault = _tensor_fault(entry)
            if fault is not None:
                _refuse(path, "describes an impossible tensor", fqn=fqn, found=fault)
        elif type(entry) is not BytesStorageMetadata:
            _refuse(path, "has an entry of an unknown type", fqn=fqn, found=type(entry).__name__)


def _tensor_fault(tensor: TensorStorageMetadata) -> str | None:
    size = tensor.size
    if math.prod(size) * tensor.properties.dtype.itemsize >= _MAX_NBYTES:
        return f"size {list(size)}"
    for chunk in tensor.chunks:
        if type(chunk) is not ChunkStorageMetadata:
            return f"a {type(chunk).__name__} as a chunk"
        offsets, sizes = chunk.offsets, chunk.sizes
        if not len(offsets) == len(sizes) == len(size) or any(
            o + s > n for o, s, n in zip(offsets, sizes, size, strict=True)
        ):
            return f"a chunk at {list(offsets)} of size {list(sizes)} in a tensor of {list(size)}"
    return None


def _check_storage(storage: object, path: str) -> None:
    if type(storage) is not dict:
        _refuse(path, "has no dict of storage data", found=type(storage).__name__)
    decoder = StoredOnceDecoder(path)
    once: dict[MetadataIndex, StoredOnce] = {}
    for index, info in storage.items():
        if type(index) is not MetadataIndex or type(info) not in {_StorageInfo, StoredOnce}:
            found = f"{type(index).__name__}: {type(info).__name__}"
            _refuse(path, "has storage data of an unknown type", found=found)
        descriptors = getattr(info, "transform_descriptors", None)
        where = decoder.decode(descriptors) if descriptors else None
        if where is not None:
            once[index] = where
    storage.update(once)


def _check_plain(
    value: object, what: str, path: str, *, also: frozenset[type] = frozenset()
) -> None:
    """Check that a value is plain, and not nested so deeply that recursion overflows."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        below: list[object] = []
        for one in level:
            if isinstance(one, dict):
                below.extend(one.values())
            elif isinstance(one, (list, tuple)):
                below.extend(one)
            elif type(one) not in _PLAIN and type(one) not in also:
                _refuse(path, f"has {what} that is not plain", found=type(one).__name__)
        # A list may contain itself or occur in many places, so visit each object once per level.
        level = list({id(one): one for one in below}.values())
        if not level:
            return
    _refuse(path, f"has {what} that is nested too deeply", found=f"over {_MAX_DEPTH} levels")


def _shown(value: object) -> str:
    """Return text for an error; for a container only its type, because its text may be endless."""
    return shortened(value) if type(value) in _PLAIN else f"a {type(value).__name__}"


_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})

# Other types that a new field may hold. `unpickle` has checked each object of these types.
_OF_TORCH = frozenset(
    {
        *(torch.dtype, torch.layout, _MEM_FORMAT_ENCODING, ChunkStorageMetadata, MetadataIndex),
        *(StorageMeta, TensorProperties),
    }
)


def _refuse(path: str, problem: str, *, found: object = None, fqn: str | None = None) -> NoReturn:
    raise CorruptCheckpointError(
        f"the metadata of a checkpoint {problem}", phase="read", path=path, fqn=fqn, found=found
    )


def _building(
    required: Mapping[str, tuple[type, ...]],
    optional: Mapping[str, tuple[type, ...]],
    *,
    is_key: bool = False,
) -> Callable[[Any, Any], object]:
    """Return a function that sets attributes of these names and types.

    The function returns the values of all other attributes, or `None` if there are none. In a dict
    key, these must be plain scalars, because a newer torch may hash them.
    """
    known = {**required, **optional}
    needed = required.keys()

    def build(target: Any, state: Any) -> object:
        if type(state) is not dict or target.__dict__ or not needed <= state.keys():
            msg = f"a {type(target).__name__} with a state of {_shown(state)}"
            raise ValueError(msg)
        unknown: list[object] = []
        for name, value in state.items():
            kinds = known.get(name)
            if kinds is None and _is_field(name) and not (is_key and type(value) not in _PLAIN):
                unknown.append(value)
            elif kinds is None or type(value) not in kinds:
                msg = f"a {type(target).__name__} with {_shown(name)} {_shown(value)}"
                raise TypeError(msg)
        target.__dict__.update(state)
        return unknown or None

    return build


def _is_field(name: object) -> bool:
    return type(name) is str and name.isidentifier() and not name.startswith("__")


# Field types of a pickled `TensorProperties` since torch 2.0, in order; 2.15 adds `strides`.
_PROPERTIES = (torch.dtype, torch.layout, bool, _MEM_FORMAT_ENCODING, bool)

# Number of fields that this version of torch has; its `__setstate__` refuses more.
_PROPERTIES_TAKEN = len(TensorProperties(torch.float32).__getstate__())


def _build_properties(target: Any, state: Any) -> object:
    if target.__dict__:
        msg = "TensorProperties with two states"
        raise ValueError(msg)
    if type(state) is not tuple or tuple(map(type, state[: len(_PROPERTIES)])) != _PROPERTIES:
        msg = f"TensorProperties with a state of {_kinds(state)}"
        raise TypeError(msg)
    target.__setstate__(state[:_PROPERTIES_TAKEN])
    return state[len(_PROPERTIES) :] or None


def _kinds(state: Any) -> str:
    return (
        ", ".join(type(one).__name__ for one in state[:8])
        if type(state) is tuple
        else "something other than a tuple"
    )


def _size(value: Any) -> torch.Size:
    # torch refuses values that are not integers, or need more than 64 bits.
    size = torch.Size(value)
    if size and min(size) < 0:
        msg = f"a size of {list(size)}"
        raise ValueError(msg)
    return size


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_NBYTES


_build_info_state = _building(
    {"relative_path": (str,), "offset": (int,), "length": (int,)},
    {"transform_descriptors": (list, tuple, type(None))},
)


def _build_info(target: Any, state: Any) -> object:
    unknown = _build_info_state(target, state)
    if not _count(state["offset"]) or not _count(state["length"]):
        msg = f"an item at {_shown(state['offset'])} of length {_shown(state['length'])}"
        raise ValueError(msg)
    return unknown


def _building_slots(kind: type, check: Callable[[Any], bool]) -> Callable[[Any, Any], None]:
    """Return a function that sets the fields of one of our slotted dataclasses, in their order."""
    names = [field.name for field in fields(kind)]

    def build(target: Any, state: Any) -> None:
        if type(state) is not list or len(state) != len(names) or hasattr(target, names[0]):
            msg = f"a {kind.__name__} with a state of {_shown(state)}"
            raise ValueError(msg)
        for name, value in zip(names, state, strict=True):
            object.__setattr__(target, name, value)
        if not check(target):
            msg = f"a {kind.__name__} with invalid fields"
            raise ValueError(msg)

    return build


def _path(*parts: Any) -> str:
    if not all(type(part) is str for part in parts):
        msg = "a path whose parts are not text"
        raise TypeError(msg)
    return str(PurePosixPath(*parts))


def _memory_format(value: Any) -> _MEM_FORMAT_ENCODING:
    if type(value) is not int:
        msg = f"a memory format {_shown(value)}"
        raise TypeError(msg)
    return _MEM_FORMAT_ENCODING(value)


def _layout(name: Any) -> torch.layout:
    if type(name) is not str or name.removeprefix("torch.") not in _LAYOUTS:
        msg = f"a layout {_shown(name)}"
        raise ValueError(msg)
    return _LAYOUTS[name.removeprefix("torch.")]


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        msg = "an OrderedDict with arguments"
        raise ValueError(msg)
    return {}


def _values_by_name(values: Iterable[object]) -> dict[str, Any]:
    return {str(value).removeprefix("torch."): value for value in values}


DTYPES: Mapping[str, torch.dtype] = _values_by_name(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
)
"""torch's dtypes, by their names in pickles."""

_LAYOUTS: Mapping[str, torch.layout] = _values_by_name(
    {value for value in vars(torch).values() if isinstance(value, torch.layout)}
)

_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_NONE = type(None)

_ADMITTED: Mapping[tuple[str, str], Admitted] = {
    **{("torch", name): Constant(dtype) for name, dtype in DTYPES.items()},
    ("torch", "Size"): Function(_size),
    ("torch.serialization", "_get_layout"): Function(_layout),
    ("collections", "OrderedDict"): Function(_ordered_dict),
    # DCP pickles a Path if the caller passed one as checkpoint_id. Python 3.13 renamed its module.
    **{
        (module, name): Function(_path)
        for module in ("pathlib", "pathlib._local")
        for name in _PATHS
    },
    (_METADATA, "_MEM_FORMAT_ENCODING"): Function(_memory_format),
    (_METADATA, "Metadata"): Class(
        Metadata,
        _building(
            {"state_dict_metadata": (dict,)},
            {
                "planner_data": (dict, list, tuple, str, int, _NONE),
                "storage_data": (dict, _NONE),
                "storage_meta": (StorageMeta, _NONE),
                "version": (str, _NONE),
            },
        ),
    ),
    (_METADATA, "TensorStorageMetadata"): Class(
        TensorStorageMetadata,
        _building(
            {"properties": (TensorProperties,), "size": (torch.Size,), "chunks": (list,)}, {}
        ),
    ),
    (_METADATA, "BytesStorageMetadata"): Class(
        BytesStorageMetadata, _building({}, {}), has_state=False
    ),
    (_METADATA, "TensorProperties"): Class(TensorProperties, _build_properties),
    (_METADATA_BEFORE_2_3, "TensorProperties"): Class(TensorProperties, _build_properties),
    (_METADATA_BEFORE_2_3, "MEM_FORMAT_ENCODING"): Function(_memory_format),
    (_METADATA, "ChunkStorageMetadata"): Class(
        ChunkStorageMetadata, _building({"offsets": (torch.Size,), "sizes": (torch.Size,)}, {})
    ),
    (_METADATA, "MetadataIndex"): Class(
        MetadataIndex,
        _building(
            {"fqn": (str,)},
            {"offset": (torch.Size, _NONE), "index": (int, _NONE)},
            is_key=True,
        ),
        is_key=True,
    ),
    (_METADATA, "StorageMeta"): Class(
        StorageMeta,
        _building(
            {},
            {
                "checkpoint_id": (str, _NONE),
                "save_id": (str, _NONE),
                "load_id": (str, _NONE),
                "modules": (list,),
            },
        ),
    ),
    (_FILE_SYSTEM, "_StorageInfo"): Class(_StorageInfo, _build_info),
    # Earlier versions of this package pickled their own classes for weights that are stored once.
    **{
        (f"dcp_hf_writer.{module}", kind.__name__): Class(kind, _building_slots(kind, check))
        for module, kind, check in (
            ("_once", StoredOnce, is_once),
            ("_once", StoredPart, is_part),
            ("_copies", Copy, is_copy),
            ("_copies", Loop, is_loop),
        )
    },
}
