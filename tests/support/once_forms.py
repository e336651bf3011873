"""The forms in which `.metadata` has said where weights are stored once.

The first form pickled objects of the package; its classes stand here under the names they had.
"""

from __future__ import annotations

import pickle
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.filesystem import _StorageInfo

from dcp_hf_writer.formats import weights_once_places

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.checkpoint.metadata import Metadata


@dataclass(frozen=True, slots=True)
class Loop:
    extent: int
    hf_dim: int
    hf_step: int
    dim: int
    step: int


@dataclass(frozen=True, slots=True)
class Copy:
    hf_start: Any
    start: Any
    loops: Any


@dataclass(frozen=True, slots=True)
class StoredPart:
    path: Any
    key: Any
    start: Any
    dtype: Any
    shape: Any
    copies: Any


@dataclass(frozen=True, slots=True)
class StoredOnce:
    parts: Any


# Where the classes were then: part of the format, whatever the modules are called today.
_MODULES = {
    f"dcp_hf_writer.{module}": kinds
    for module, kinds in (("_once", (StoredOnce, StoredPart)), ("_copies", (Copy, Loop)))
}
for _name, _kinds in _MODULES.items():
    for _kind in _kinds:
        _kind.__module__ = _name


@contextmanager
def importable() -> Iterator[None]:
    """Let pickle find these classes where earlier versions had them."""
    present = {name: sys.modules.get(name) for name in _MODULES}
    for name, kinds in _MODULES.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update({kind.__name__: kind for kind in kinds})
    try:
        yield
    finally:
        for name, module in present.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def dumps(value: object, protocol: int | None = None) -> bytes:
    """Pickle a value that may hold objects of these classes."""
    with importable():
        return pickle.dumps(value, protocol)


def loads(data: bytes) -> Any:
    """Unpickle, as earlier versions of the package made it possible."""
    with importable():
        return pickle.loads(data)


def pickled_once(once: weights_once_places.StoredOnce) -> StoredOnce:
    """Return what an earlier version wrote for the same chunk."""
    return StoredOnce(tuple(_old_part(part) for part in once.parts))


def _old_part(part: weights_once_places.StoredPart) -> StoredPart:
    copies = tuple(
        Copy(one.hf_start, one.start, tuple(Loop(*_fields(loop)) for loop in one.loops))
        for one in part.copies
    )
    return StoredPart(part.path, part.key, part.start, part.dtype, part.shape, copies)


def _fields(loop: Any) -> tuple[int, ...]:
    return loop.extent, loop.hf_dim, loop.hf_step, loop.dim, loop.step


def plain_once(once: weights_once_places.StoredOnce) -> _StorageInfo:
    """Return what is written for a chunk today."""
    texts = weights_once_places.encode_stored_once(once)
    return _StorageInfo(weights_once_places.NOTICE, 0, once.nbytes, texts)


FORMS = {"pickled": pickled_once, "plain": plain_once}


def in_form(form: str, metadata: Metadata) -> Metadata:
    """Return metadata, as `parse_metadata` returns it, in one of the forms."""
    storage = {
        index: FORMS[form](info) if isinstance(info, weights_once_places.StoredOnce) else info
        for index, info in (metadata.storage_data or {}).items()
    }
    return replace(metadata, storage_data=storage)
