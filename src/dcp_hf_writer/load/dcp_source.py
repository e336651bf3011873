"""Read from the DCP half: find the bytes of each tensor, and read objects that are not tensors."""

from __future__ import annotations

import io
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.parse_torch_archive import (
    ArchivedTensor,
    UnusualArchiveError,
    find_tensor,
)
from dcp_hf_writer.formats.weights_once_places import StoredOnce
from dcp_hf_writer.load.check_objects import check_object
from dcp_hf_writer.load.read_phase import is_direct
from dcp_hf_writer.load.read_plan import Expected, Fetch, fetch_of_bytes, fetch_of_copy
from dcp_hf_writer.tensors.boxes import Box
from dcp_hf_writer.tensors.dtypes import TORCH_BY_NAME
from dcp_hf_writer.tensors.strided_copies import clip, strides_of
from dcp_hf_writer.torch_seam.stream_transforms import StreamTransforms

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import ReadItem

    from dcp_hf_writer.storage.input_contract import InputFile
    from dcp_hf_writer.storage.open_inputs import OpenInputs

# Number of archives that one task of a thread looks at.
_GROUP = 64

# What torch writes before the data of a tensor fits into this many bytes, and so does what it
# writes after the data.
_END_NBYTES = 2048

# Usually far fewer bytes precede the data of an archive. A longer prefix is not kept.
_MAX_PREFIX_NBYTES = 4096

# Limits of what a transformed item may become. An archive may store a tensor in a wider form.
_MOST_TIMES = 2
_MOST_BESIDE_NBYTES = 16 << 20
_MAX_OBJECT_NBYTES = 1 << 32


@dataclass(frozen=True, slots=True)
class Wanted:
    """A part of a stored tensor, and the tensor to read it into."""

    item: ReadItem
    """The part, as DCP's planner requests it."""
    target: torch.Tensor
    """Has the shape of the part; any dtype, device and strides."""


@dataclass(frozen=True, slots=True)
class WholeRead:
    """A tensor whose archive only `torch.load` can read."""

    wanted: Wanted
    where: _StorageInfo


def fetch_of_archive(read: WholeRead) -> Fetch:
    """Return the fetch of all bytes of an archive, for a check of its digests."""
    where = read.where
    return fetch_of_bytes(where.relative_path, where.offset, where.length)


class DCPSource:
    """The DCP half of one checkpoint; thread-safe."""

    def __init__(
        self,
        inputs: OpenInputs,
        metadata: Metadata,
        transforms: StreamTransforms | None = None,
    ) -> None:
        """Read the items of `metadata`, which `parse_metadata` returned.

        Args:
            inputs: The files.
            metadata: The metadata.
            transforms: Undoes what extensions of torch's writer did to the bytes; `None` undoes
                what torch's own extensions did.
        """
        self._inputs = inputs
        self._metadata = metadata
        self._transforms = StreamTransforms(None) if transforms is None else transforms
        self._storage: Mapping[MetadataIndex, _StorageInfo | StoredOnce] = (
            metadata.storage_data or {}
        )
        # Archives of the same length, dtype and shape differ only in the data of the tensor. For
        # each such kind: the bytes before the data, and where the data is.
        self._known: dict[tuple[int, torch.dtype, torch.Size], tuple[bytes, ArchivedTensor]] = {}

    def fetches(self, wanted: Sequence[Wanted]) -> tuple[list[Fetch], list[WholeRead]]:
        """Find the bytes of parts of tensors; looks at the archive of each tensor.

        Returns:
            What to fetch, and what `load_whole` must load. The number of a target is its index in
            `wanted`.

        Raises:
            CorruptCheckpointError: If a file contradicts the metadata.
            ReadError: If a file cannot be read.
        """
        places = self._places(wanted)
        return self._fetches(wanted, self._find_all(places))

    def guessed_fetches(
        self, wanted: Sequence[Wanted]
    ) -> tuple[list[Fetch], list[WholeRead], list[Expected]]:
        """Find the bytes of parts of tensors, but look only at one archive of each kind.

        Archives of the same length, dtype and shape differ only in the data of the tensor. So all
        archives of a kind are assumed to be like the one looked at. The caller must compare the
        bytes before the data of each, and call `fetches` for those where these bytes differ.

        Returns:
            As `fetches`, and the bytes that must precede the data of each archive that was not
            looked at. Their number is an index in `wanted` of an item of that archive.

        Raises:
            CorruptCheckpointError: If a file contradicts the metadata.
            ReadError: If a file cannot be read.
        """
        places = self._places(wanted)
        users = {one.item.storage_index: number for number, one in enumerate(wanted)}
        kinds = {self._kind(index, where): (index, where) for index, where in places.items()}
        found = self._find_all(dict(kinds.values()))
        expected: list[Expected] = []
        others: dict[MetadataIndex, _StorageInfo] = {}
        for index, where in places.items():
            known = self._known.get(self._kind(index, where))
            if known is None:
                others[index] = where
            elif index not in found:
                self._check(index, where)
                content, found[index] = known
                expected.append(Expected(where.relative_path, where.offset, content, users[index]))
        found |= self._find_all(others)
        return *self._fetches(wanted, found), expected

    def _places(self, wanted: Sequence[Wanted]) -> dict[MetadataIndex, _StorageInfo]:
        places: dict[MetadataIndex, _StorageInfo] = {}
        for one in wanted:
            where = self._where(one.item)
            if not isinstance(where, StoredOnce) and not where.transform_descriptors:
                places.setdefault(one.item.storage_index, where)
        return places

    def _fetches(
        self, wanted: Sequence[Wanted], found: Mapping[MetadataIndex, ArchivedTensor | None]
    ) -> tuple[list[Fetch], list[WholeRead]]:
        fetches: list[Fetch] = []
        whole: list[WholeRead] = []
        for number, one in enumerate(wanted):
            where = self._where(one.item)
            if isinstance(where, StoredOnce):
                fetches += self._of_once(number, one, where)
            elif (archived := found.get(one.item.storage_index)) is None:
                whole.append(WholeRead(one, where))
            else:
                fetches.append(_of_archive(number, one, where, archived))
        return fetches, whole

    def load_whole(self, read: WholeRead) -> None:
        """Load a tensor whose archive is unusual or transformed, and copy the wanted part of it.

        Raises:
            ConfigError: If the reader cannot undo the transform.
            CorruptCheckpointError: If the archive holds anything but a tensor of the shape in the
                metadata.
            ReadError: If the file cannot be read.
        """
        item, where = read.wanted.item, read.where
        chunk = self._chunk_sizes(item.storage_index)
        most = _MOST_TIMES * math.prod(chunk) * self._dtype_of(item.storage_index).itemsize
        with self._inputs.use(where.relative_path) as file:
            data = self._content(file, where, item, max_nbytes=most + _MOST_BESIDE_NBYTES)
            try:
                tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
                _refuse(file.path, "an archive holds no tensor", item, found=str(error)[:200])
            if not isinstance(tensor, torch.Tensor) or tensor.shape != chunk:
                _refuse(
                    file.path,
                    "an archive holds another tensor than the metadata says",
                    item,
                    expected=f"a tensor of shape {list(chunk)}",
                    found=getattr(tensor, "shape", type(tensor)),
                )
        for dim, (offset, length) in enumerate(
            zip(item.storage_offsets, item.lengths, strict=True)
        ):
            # Not every subclass can be cut, along every dimension: 8-bit optimizer state cannot.
            if (offset, length) != (0, tensor.shape[dim]):
                tensor = tensor.narrow(dim, offset, length)
        read.wanted.target.detach().copy_(tensor)

    def read_objects(
        self, items: Sequence[ReadItem], *, allow_pickled_objects: bool
    ) -> list[io.BytesIO]:
        """Read the bytes of objects that are not tensors.

        torch's planners unpickle these bytes without any restriction, so they are checked here.

        Args:
            items: The objects to read.
            allow_pickled_objects: Skip the check.

        Raises:
            PickledObjectError: If loading an object would run code that the object names.
            CorruptCheckpointError: If a file contradicts the metadata.
            ReadError: If a file cannot be read.
        """
        # A read from the page cache takes less time than starting a thread. A read from a remote
        # store takes more.
        far = not self._inputs.files.reads_ahead
        with ThreadPoolExecutor(self._inputs.files.readers if far else 1) as pool:
            each = pool.map(self._read_object, items) if far else map(self._read_object, items)
            found = list(each)
        if not allow_pickled_objects:
            safe: set[bytes] = set()
            for item, data in zip(items, found, strict=True):
                # An optimizer stores its options once per parameter. Most are equal: check each
                # distinct one once.
                if data not in safe:
                    path = f"{self._inputs.files.path}/{self.file_of(item)}"
                    check_object(data, fqn=item.storage_index.fqn, path=path)
                    safe.add(data)
        return [io.BytesIO(data) for data in found]

    def _read_object(self, item: ReadItem) -> bytes:
        where = self._where(item)
        if isinstance(where, StoredOnce):
            _refuse(self._inputs.files.path, "the metadata stores an object as a tensor", item)
        with self._inputs.use(where.relative_path) as file:
            return self._content(file, where, item, max_nbytes=_MAX_OBJECT_NBYTES)

    def _content(
        self, file: InputFile, where: _StorageInfo, item: ReadItem, *, max_nbytes: int
    ) -> bytes:
        """Return the bytes of an item, without the transforms of torch's extensions."""
        _check_place(file, where, item)
        data = file.read(where.offset, where.length)
        descriptors = where.transform_descriptors
        if not descriptors:
            return data
        fqn = item.storage_index.fqn
        return self._transforms.undo(
            data, descriptors, max_nbytes=max_nbytes, fqn=fqn, path=file.path
        )

    def check_transforms(self, items: Iterable[ReadItem]) -> None:
        """Check that the reader can undo all transforms of some items. Reads nothing.

        Raises:
            ConfigError: If it cannot.
        """
        known: set[tuple[str, ...]] = set()
        for item in items:
            where = self._storage.get(item.storage_index)
            found = tuple(getattr(where, "transform_descriptors", None) or ())
            if found and found not in known:
                known.add(found)
                path = f"{self._inputs.files.path}/{self.file_of(item)}"
                self._transforms.check(found, fqn=item.storage_index.fqn, path=path)

    def file_of(self, item: ReadItem) -> str:
        """Return the name of the file that holds an object; empty if it is stored as a tensor."""
        where = self._where(item)
        return "" if isinstance(where, StoredOnce) else where.relative_path

    def _where(self, item: ReadItem) -> _StorageInfo | StoredOnce:
        where = self._storage.get(item.storage_index)
        if where is None:
            _refuse(self._inputs.files.path, "the metadata does not say where an item is", item)
        return where

    def _dtype_of(self, index: MetadataIndex) -> torch.dtype:
        entry = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.properties.dtype

    def _chunk_sizes(self, index: MetadataIndex) -> torch.Size:
        entry = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        number = index.index
        if number is not None and 0 <= number < len(entry.chunks):
            chunk = entry.chunks[number]
            if chunk.offsets == index.offset:
                return chunk.sizes
        return next(chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)

    def _find_all(
        self, places: Mapping[MetadataIndex, _StorageInfo]
    ) -> dict[MetadataIndex, ArchivedTensor | None]:
        """Find where the data is in many archives; `None` for an unusual archive."""
        ordered = sorted(places.items(), key=lambda one: (one[1].relative_path, one[1].offset))
        groups = [ordered[i : i + _GROUP] for i in range(0, len(ordered), _GROUP)]
        readers = min(self._inputs.files.readers, len(groups))
        if readers <= 1:
            return dict(one for group in groups for one in self._find_group(group))
        with ThreadPoolExecutor(readers, thread_name_prefix="dcp-hf-read") as pool:
            return dict(one for found in pool.map(self._find_group, groups) for one in found)

    def _find_group(
        self, group: Iterable[tuple[MetadataIndex, _StorageInfo]]
    ) -> list[tuple[MetadataIndex, ArchivedTensor | None]]:
        return [(index, self._find(index, where)) for index, where in group]

    def _find(self, index: MetadataIndex, where: _StorageInfo) -> ArchivedTensor | None:
        kind = self._kind(index, where)
        known = self._known.get(kind)
        self._check(index, where)
        with self._inputs.use(where.relative_path) as file:
            if known is not None and file.read(where.offset, len(known[0])) == known[0]:
                return known[1]
            ends = _Ends(file, where)
            try:
                found = find_tensor(ends.read, where.length, path=file.path)
            except UnusualArchiveError:
                return None
            if (found.dtype, found.shape) != kind[1:]:
                _refuse(
                    file.path,
                    "an archive holds another tensor than the metadata says",
                    index,
                    expected=f"{kind[1]} of shape {list(kind[2])}",
                    found=f"{found.dtype} of shape {list(found.shape)}",
                )
            if found.start <= _MAX_PREFIX_NBYTES:
                self._known[kind] = (ends.read(0, found.start), found)
        return found

    def _kind(
        self, index: MetadataIndex, where: _StorageInfo
    ) -> tuple[int, torch.dtype, torch.Size]:
        """Return length, dtype and shape: archives that agree in these differ only in the data."""
        return where.length, self._dtype_of(index), self._chunk_sizes(index)

    def _check(self, index: MetadataIndex, where: _StorageInfo) -> None:
        with self._inputs.use(where.relative_path) as file:
            _check_place(file, where, index)

    def _of_once(self, number: int, wanted: Wanted, where: StoredOnce) -> Iterable[Fetch]:
        item, target = wanted.item, wanted.target
        _check_parts(where, self._chunk_sizes(item.storage_index), item, self._inputs.files.path)
        box = Box(tuple(item.storage_offsets), tuple(item.lengths))
        for part in where.parts:
            dtype, strides = TORCH_BY_NAME[part.dtype], strides_of(part.shape)
            for copy in (inner for whole in part.copies for inner in clip(whole, box)):
                yield fetch_of_copy(
                    copy,
                    file=part.path,
                    start=part.start,
                    dtype=dtype,
                    strides=strides,
                    target=number,
                    target_strides=target.stride(),
                    is_direct=is_direct(target, dtype),
                )


class _Ends:
    """The first and last bytes of an archive; each end is one request to a remote store."""

    def __init__(self, file: InputFile, where: _StorageInfo) -> None:
        self._file, self._where = file, where
        self._tail_start = max(0, where.length - _END_NBYTES)
        self._head = b""
        self._tail = file.read(where.offset + self._tail_start, where.length - self._tail_start)

    def read(self, start: int, nbytes: int) -> bytes:
        """Return `nbytes` bytes of the archive from `start` on."""
        if start >= self._tail_start:
            first = start - self._tail_start
            return self._tail[first : first + nbytes]
        if start + nbytes <= min(_END_NBYTES, self._where.length):
            self._head = self._head or self._file.read(
                self._where.offset, min(_END_NBYTES, self._where.length)
            )
            return self._head[start : start + nbytes]
        return self._file.read(self._where.offset + start, nbytes)


def _of_archive(
    number: int, wanted: Wanted, where: _StorageInfo, archived: ArchivedTensor
) -> Fetch:
    item, target, strides = wanted.item, wanted.target, archived.strides
    first = sum(o * s for o, s in zip(item.storage_offsets, strides, strict=True))
    return Fetch(
        file=where.relative_path,
        start=where.offset + archived.start + first * archived.dtype.itemsize,
        dtype=archived.dtype,
        target=number,
        target_start=0,
        loops=tuple(zip(item.lengths, strides, target.stride(), strict=True)),
        is_direct=is_direct(target, archived.dtype),
    )


def _check_place(file: InputFile, where: _StorageInfo, item: ReadItem | MetadataIndex) -> None:
    if where.offset + where.length > file.nbytes:
        _refuse(
            file.path,
            "a file is too short for an item that the metadata places in it",
            item,
            expected=f"at least {where.offset + where.length} bytes",
            found=f"{file.nbytes} bytes",
        )


def _check_parts(where: StoredOnce, chunk: torch.Size, item: ReadItem, path: str) -> None:
    copies = [copy for part in where.parts for copy in part.copies]
    for copy in copies:
        last = list(copy.start)
        for loop in copy.loops:
            last[loop.dim] += (loop.extent - 1) * loop.step
        if len(last) != len(chunk) or any(i >= n for i, n in zip(last, chunk, strict=True)):
            _refuse(
                path,
                "the metadata places elements outside their chunk",
                item,
                expected=f"indices within a chunk of shape {list(chunk)}",
                found=last,
            )
    if sum(copy.numel for copy in copies) != math.prod(chunk):
        _refuse(path, "the metadata does not say where each element of a chunk is stored", item)


def _refuse(
    path: str,
    problem: str,
    item: ReadItem | MetadataIndex,
    *,
    expected: object = None,
    found: object = None,
) -> NoReturn:
    index = item if isinstance(item, MetadataIndex) else item.storage_index
    raise CorruptCheckpointError(
        problem, phase="read", path=path, fqn=index.fqn, expected=expected, found=found
    )
