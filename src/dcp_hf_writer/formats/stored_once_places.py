"""Weights stored once: how DCP's metadata says where they are, in torch's own words.

torch keeps a `_StorageInfo` for every chunk. For a chunk that no `.distcp` file holds,
its `relative_path` is `NOTICE`. No such file exists, so each reader of torch's fails with an error
that prints the notice. Its `transform_descriptors` are plain text: `FORMAT`, then four for each
part: file, key, start, and geometry. So torch opens the metadata without this package.

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
from dcp_hf_writer.formats.strict_json import is_count, parse_json, shortened
from dcp_hf_writer.tensors.dtypes import ITEMSIZE
from dcp_hf_writer.tensors.strided_copies import Copy, Loop

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dcp_hf_writer.tensors.boxes import Shape

NOTICE = "weights stored once - load with HFDualReader, or convert with dcp_hf_writer.materialize"
"""What stands in place of a file. A valid file name everywhere: no slash, below 255 bytes."""

_FAMILY = "stored-once@dcp_hf_writer/"
FORMAT = f"{_FAMILY}1"
"""First descriptor; in the form that torch gives to the names of its extensions."""

# File, key, start, geometry.
_TEXTS_A_PART = 4

_START = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)

_MAX_NBYTES = 1 << 63


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Elements of a chunk that lie in one safetensors file."""

    path: str
    """File, as a path within the checkpoint."""
    key: str
    """HuggingFace name of the tensor that they are part of."""
    start: int
    """Offset of that tensor's first byte in the file."""
    dtype: str
    """safetensors dtype."""
    shape: Shape
    """Shape of that tensor."""
    copies: tuple[Copy, ...]
    """Where the elements stand there; `start` is within the chunk."""


@dataclass(frozen=True, slots=True)
class StoredOnce:
    """Where a chunk is that no `.distcp` file holds."""

    parts: tuple[StoredPart, ...]
    """Parts that together are the chunk, each element once."""

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk."""
        return sum(c.numel * ITEMSIZE[part.dtype] for part in self.parts for c in part.copies)


def encode_stored_once(once: StoredOnce) -> tuple[str, ...]:
    """Return the descriptors that say where a chunk is."""
    texts = [FORMAT]
    for part in once.parts:
        geometry = _encode_geometry(part.dtype, part.shape, part.copies)
        texts += (part.path, part.key, str(part.start), geometry)
    return tuple(texts)


# Layers are alike, and pickle writes a string that occurs again as a number of a few bytes.
@functools.lru_cache(maxsize=4096)
def _encode_geometry(dtype: str, shape: Shape, copies: tuple[Copy, ...]) -> str:
    return json.dumps([dtype, shape, [astuple(copy) for copy in copies]], separators=(",", ":"))


class StoredOnceDecoder:
    """Decodes the descriptors of one checkpoint, which are not trusted.

    Text and lists that occur many times are decoded once, so that time and memory are bounded by
    the size of the metadata, whatever it shares.
    """

    def __init__(self, path: str) -> None:
        """Name `path` in errors."""
        self._path = path
        # By id: the metadata that holds them outlives this decoder.
        self._known: dict[int, StoredOnce | None] = {}
        self._geometries: dict[str, tuple[str, Shape, tuple[Copy, ...]]] = {}

    def decode(self, descriptors: Sequence[object]) -> StoredOnce | None:
        """Return where a chunk is; `None` if the descriptors are those of torch's extensions.

        Raises:
            CorruptCheckpointError: If they are no text, or say what cannot be.
        """
        if id(descriptors) not in self._known:
            self._known[id(descriptors)] = self._decode(descriptors)
        return self._known[id(descriptors)]

    def _decode(self, descriptors: Sequence[object]) -> StoredOnce | None:
        texts = [one for one in descriptors if type(one) is str]
        if len(texts) != len(descriptors):
            raise self._error("a descriptor that is no text")
        if not texts or not texts[0].startswith(_FAMILY):
            return None
        if texts[0] != FORMAT:
            raise self._error(shortened(texts[0]), hint="a newer dcp_hf_writer can read it")
        if len(texts) % _TEXTS_A_PART != 1:
            raise self._error(f"{len(texts)} descriptors")
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
        # Half a character cannot be encoded: it is passed on, and refused with the document.
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
            "the metadata does not say where weights are that are stored once",
            phase="read",
            path=self._path,
            found=found,
            hint=hint,
        )


def _copy(hf_start: Iterable[int], start: Iterable[int], loops: Iterable[Sequence[int]]) -> Copy:
    return Copy(tuple(hf_start), tuple(start), tuple(Loop(*loop) for loop in loops))


def is_part(part: StoredPart) -> bool:
    """Whether a part from an untrusted source has valid fields, and stays within its tensor."""
    return (
        type(part.path) is str
        and type(part.key) is str
        and is_count(part.start)
        and _is_geometry(part.dtype, part.shape, part.copies)
    )


def is_copy(copy: Copy) -> bool:
    """Whether a copy from an untrusted source has valid fields."""
    return (
        _are_counts(copy.hf_start)
        and _are_counts(copy.start)
        and _are(Loop, copy.loops)
        and all(map(is_loop, copy.loops))
        and all(n.hf_dim < len(copy.hf_start) and n.dim < len(copy.start) for n in copy.loops)
    )


def is_loop(loop: Loop) -> bool:
    """Whether a loop from an untrusted source has valid fields."""
    positive = (loop.extent, loop.hf_step, loop.step)
    return _are_counts((*positive, loop.hf_dim, loop.dim)) and min(positive) > 0


def is_once(once: StoredOnce) -> bool:
    """Whether an object from an untrusted source holds parts, each checked before."""
    return _are(StoredPart, once.parts)


def _is_geometry(dtype: Any, shape: Any, copies: Any) -> bool:
    return (
        type(dtype) is str
        and dtype in ITEMSIZE
        and _are_counts(shape)
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


def _are_counts(values: object) -> bool:
    return type(values) is tuple and all(map(is_count, values))
