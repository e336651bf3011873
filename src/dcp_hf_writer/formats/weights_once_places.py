"""How DCP's metadata says where weights are that are stored once, using only torch's own classes.

torch keeps a `_StorageInfo` for every chunk. For a chunk that no `.distcp` file holds,
`relative_path` is `NOTICE`. No such file exists, so torch's readers fail with an error that prints
the notice. `transform_descriptors` is plain text: first `FORMAT`, then four texts for each part,
which are file, key, start and geometry. So torch can open the metadata without this package.

Pure.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.strict_json import are_counts, is_count, parse_json, shortened
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE
from dcp_hf_writer.tensors.strided_copies import Copy, Loop

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dcp_hf_writer.tensors.boxes import Shape

NOTICE = "weights stored once - load with HFDualReader, or convert with dcp_hf_writer.materialize"
"""Stands in place of a file name. It is valid as one: no slash, below 255 bytes."""

_FAMILY = "stored-once@dcp_hf_writer/"
FORMAT = f"{_FAMILY}1"
"""The first descriptor, in the form in which torch names its extensions."""

# File, key, start, geometry.
_TEXTS_A_PART = 4

_START = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)

_MAX_NBYTES = 1 << 63


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Elements of a chunk that lie in one safetensors file."""

    path: str
    """Path of the file within the checkpoint."""
    key: str
    """HuggingFace name of the tensor that contains the elements."""
    start: int
    """Offset of that tensor's first byte in the file, in bytes."""
    dtype: str
    """safetensors dtype of that tensor."""
    shape: Shape
    """Shape of that tensor."""
    copies: tuple[Copy, ...]
    """Where the elements are in that tensor (`hf_start`) and in the chunk (`start`)."""


@dataclass(frozen=True, slots=True)
class StoredOnce:
    """Where the data of a chunk is that no `.distcp` file holds."""

    parts: tuple[StoredPart, ...]
    """Parts that together hold each element of the chunk once."""

    @property
    def nbytes(self) -> int:
        """Size of the chunk in bytes."""
        return sum(c.numel * ITEMSIZE[part.dtype] for part in self.parts for c in part.copies)


def encode_stored_once(once: StoredOnce) -> tuple[str, ...]:
    """Encode where the data of a chunk is as `transform_descriptors`."""
    texts = [FORMAT]
    for part in once.parts:
        geometry = _encode_geometry(part.dtype, part.shape, part.copies)
        texts += (part.path, part.key, str(part.start), geometry)
    return tuple(texts)


# Layers are alike, so many parts share one geometry. Cached, it is one string object, and pickle
# writes every further use of an object as a reference of a few bytes.
@functools.lru_cache(maxsize=4096)
def _encode_geometry(dtype: str, shape: Shape, copies: tuple[Copy, ...]) -> str:
    return json.dumps([dtype, shape, [astuple(copy) for copy in copies]], separators=(",", ":"))


class StoredOnceDecoder:
    """Decodes the untrusted descriptors of one checkpoint.

    It decodes each text and each list once, however often the metadata refers to it. So the size
    of the metadata bounds time and memory.
    """

    def __init__(self, path: str) -> None:
        """Name the file `path` in error messages."""
        self._path = path
        # By id. That is safe, because the metadata that holds the descriptors outlives this.
        self._known: dict[int, StoredOnce | None] = {}
        self._geometries: dict[str, tuple[str, Shape, tuple[Copy, ...]]] = {}

    def decode(self, descriptors: Sequence[object]) -> StoredOnce | None:
        """Return where a chunk is; `None` if the descriptors belong to torch's extensions.

        Raises:
            CorruptCheckpointError: If a descriptor is not text, or the descriptors are invalid.
        """
        if id(descriptors) not in self._known:
            self._known[id(descriptors)] = self._decode(descriptors)
        return self._known[id(descriptors)]

    def _decode(self, descriptors: Sequence[object]) -> StoredOnce | None:
        texts = [one for one in descriptors if type(one) is str]
        if len(texts) != len(descriptors):
            raise self._error("a descriptor that is not text")
        if not texts or not texts[0].startswith(_FAMILY):
            return None
        if texts[0] != FORMAT:
            raise self._error(shortened(texts[0]), hint="a newer dcp_hf_writer can read it")
        if len(texts) % _TEXTS_A_PART != 1:
            raise self._error(f"{len(texts)} descriptors, not 4 per part after the first")
        firsts = range(1, len(texts), _TEXTS_A_PART)
        return StoredOnce(tuple(self._part(*texts[i : i + _TEXTS_A_PART]) for i in firsts))

    def _part(self, path: str, key: str, start: str, geometry: str) -> StoredPart:
        if not _START.fullmatch(start) or not is_count(int(start)):
            raise self._error(f"a tensor that starts at {shortened(start)}")
        known = self._geometries.get(geometry)
        if known is None:
            known = self._geometries[geometry] = self._geometry(geometry)
        return StoredPart(path, key, int(start), *known)

    def _geometry(self, text: str) -> tuple[str, Shape, tuple[Copy, ...]]:
        # UTF-8 cannot encode a lone surrogate. Pass it on: the JSON parser refuses its bytes.
        value = parse_json(text.encode(errors="surrogatepass"), path=self._path)
        try:
            dtype, shape, copies = value
            found = dtype, tuple(shape), tuple(_copy(*one) for one in copies)
        except (TypeError, ValueError):
            found = None
        if found is None or not _is_geometry(*found):
            raise self._error(f"elements at {shortened(text)}")
        return found

    def _error(self, found: str, *, hint: str | None = None) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            "the metadata has invalid places of weights that are stored once",
            phase="read",
            path=self._path,
            found=found,
            hint=hint,
        )


def _copy(hf_start: Iterable[int], start: Iterable[int], loops: Iterable[Sequence[int]]) -> Copy:
    return Copy(tuple(hf_start), tuple(start), tuple(Loop(*loop) for loop in loops))


def is_part(part: StoredPart) -> bool:
    """Whether an untrusted part has valid fields and stays within its tensor."""
    return (
        type(part.path) is str
        and type(part.key) is str
        and is_count(part.start)
        and _is_geometry(part.dtype, part.shape, part.copies)
    )


def is_copy(copy: Copy) -> bool:
    """Whether an untrusted copy has valid fields."""
    return (
        are_counts(copy.hf_start)
        and are_counts(copy.start)
        and _are(Loop, copy.loops)
        and all(map(is_loop, copy.loops))
        and all(n.hf_dim < len(copy.hf_start) and n.dim < len(copy.start) for n in copy.loops)
    )


def is_loop(loop: Loop) -> bool:
    """Whether an untrusted loop has valid fields."""
    positive = (loop.extent, loop.hf_step, loop.step)
    return are_counts((*positive, loop.hf_dim, loop.dim)) and min(positive) > 0


def is_once(once: StoredOnce) -> bool:
    """Whether an untrusted object holds parts only; `is_part` has checked each part before."""
    return _are(StoredPart, once.parts)


def _is_geometry(dtype: Any, shape: Any, copies: Any) -> bool:
    return (
        type(dtype) is str
        and dtype in ITEMSIZE
        and are_counts(shape)
        and math.prod(shape) * ITEMSIZE[dtype] < _MAX_NBYTES
        and _are(Copy, copies)
        and all(is_copy(copy) and _is_within(copy, shape) for copy in copies)
    )


def _is_within(copy: Copy, shape: Shape) -> bool:
    last = list(copy.hf_start)
    for loop in copy.loops:
        last[loop.hf_dim] += (loop.extent - 1) * loop.hf_step
    return len(last) == len(shape) and all(i < n for i, n in zip(last, shape, strict=True))


def _are(kind: type, values: object) -> bool:
    return type(values) is tuple and all(type(one) is kind for one in values)
