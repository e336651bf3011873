"""Find the data of a tensor in the archive that `torch.save` wrote for it.

A load can then read any part of the data straight into its target. `torch.load` cannot: it reads
the whole tensor into fresh memory first.
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.parse_dcp_metadata import DTYPES
from dcp_hf_writer.formats.restricted_unpickle import Admitted, Constant, Function, unpickle
from dcp_hf_writer.formats.strict_json import are_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcp_hf_writer.tensors.boxes import Shape

_END_NBYTES = 22
"""Size in bytes of the record that ends an archive; the record has no comment."""

# Everything read from an archive here is small. This limits the memory for a hostile one.
_MAX_NBYTES = 1 << 17


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """Where the data of a tensor is in its archive, and how it is laid out."""

    start: int
    """Offset of the first element, in bytes from the start of the archive."""
    dtype: torch.dtype
    shape: Shape
    strides: Shape
    """Strides of the stored data, in elements; not always row-major."""


class UnusualArchiveError(Exception):
    """A possibly valid archive that this parser does not support; `torch.load` may read it."""


def find_tensor(read: Callable[[int, int], bytes], nbytes: int, *, path: str) -> ArchivedTensor:
    """Find the tensor in an archive.

    Args:
        read: Returns bytes of the archive, given the offset of the first one and their count.
        nbytes: Size of the archive in bytes.
        path: The file, for error messages.

    Raises:
        UnusualArchiveError: If the archive holds anything else than one plain, uncompressed tensor.
        CorruptCheckpointError: If `torch.save` did not write it, or it contradicts itself.

    Source:
        torch.serialization, `_save`; for the local header, APPNOTE.TXT of zip, 4.3.7.
    """
    records = _directory(read, nbytes, path)
    pickles = [name for name in records if name.endswith("data.pkl")]
    if len(pickles) != 1:
        raise UnusualArchiveError(sorted(records)[:8])
    root = pickles[0].removesuffix("data.pkl")
    order = records.get(f"{root}byteorder")
    if order is not None and _content(read, order, nbytes, path) != b"little":
        raise UnusualArchiveError("big-endian")
    found = _describe(_content(read, records[pickles[0]], nbytes, path), path)
    record = records.get(f"{root}data/{found.storage.key}")
    if record is None:
        _refuse(path, "lacks the storage of its tensor", found=found.storage.key)
    if record.file_size != found.storage.nbytes:
        _refuse(
            path,
            "has a storage of the wrong size for its tensor",
            expected=f"{found.storage.nbytes} bytes",
            found=f"{record.file_size} bytes",
        )
    start = _data_start(read, record, nbytes, path)
    last = found.first + sum((n - 1) * s for n, s in zip(found.shape, found.strides, strict=True))
    if 0 not in found.shape and (last + 1) * found.dtype.itemsize > record.file_size:
        _refuse(
            path,
            "has a storage that ends before its tensor does",
            found=f"shape {list(found.shape)}",
        )
    return ArchivedTensor(
        start + found.first * found.dtype.itemsize, found.dtype, found.shape, found.strides
    )


class _View(io.RawIOBase):
    """Presents an archive to `zipfile` as a seekable file."""

    def __init__(self, read: Callable[[int, int], bytes], nbytes: int) -> None:
        self._read, self._nbytes, self._at = read, nbytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise OSError("seek to before the start of the archive")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._nbytes - self._at)
        count = left if size is None or size < 0 else min(size, left)
        if count > _MAX_NBYTES:
            raise zipfile.BadZipFile("a zip directory that is too large")
        data = self._read(self._at, count)
        self._at += count
        return data


def _directory(
    read: Callable[[int, int], bytes], nbytes: int, path: str
) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(_View(read, nbytes)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as e:
        found = str(e)
    else:
        # zipfile ignores bytes before and after an archive; torch writes none there.
        end = read(nbytes - _END_NBYTES, _END_NBYTES)
        if (
            end.startswith(b"PK\x05\x06")
            and min((e.header_offset for e in entries), default=1) == 0
        ):
            return {entry.filename: entry for entry in entries}
        found = "other bytes before or after the archive"
    return _refuse(path, "was not written by torch.save", found=found)


def _data_start(
    read: Callable[[int, int], bytes], record: zipfile.ZipInfo, nbytes: int, path: str
) -> int:
    """Return the offset of a record's data; only its local header tells it, not the directory."""
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise UnusualArchiveError("a compressed or encrypted record")
    header_nbytes = 30
    if record.header_offset + header_nbytes > nbytes:
        _refuse(path, "has a record beyond its end", found=f"offset {record.header_offset}")
    header = read(record.header_offset, header_nbytes)
    mark, name_nbytes, extra_nbytes = struct.unpack("<4s22xHH", header)
    start: int = record.header_offset + header_nbytes + name_nbytes + extra_nbytes
    if mark != b"PK\x03\x04" or start + record.file_size > nbytes:
        _refuse(
            path, "has no record where its directory says", found=f"{record.filename!r} at {start}"
        )
    return start


def _content(
    read: Callable[[int, int], bytes], record: zipfile.ZipInfo, nbytes: int, path: str
) -> bytes:
    if record.file_size > _MAX_NBYTES:
        raise UnusualArchiveError("a large object")
    return read(_data_start(read, record, nbytes, path), record.file_size)


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype | None
    """`None` for an untyped storage."""
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class _Described:
    storage: _Storage
    first: int
    shape: Shape
    strides: Shape
    dtype: torch.dtype


def _describe(pickled: bytes, path: str) -> _Described:
    try:
        found = unpickle(pickled, TENSOR_GLOBALS, path=path, persistent=described_storage)
    except CorruptCheckpointError as error:
        # torch.load(weights_only=True) supports more classes of tensors, and runs no code either.
        raise UnusualArchiveError(str(error)) from error
    if not isinstance(found, _Described):
        raise UnusualArchiveError(type(found).__name__)
    return found


@dataclass(frozen=True, slots=True)
class _StorageKind:
    dtype: torch.dtype | None


def described_storage(value: Any) -> _Storage:
    """Return the description of the storage that a persistent id stands for.

    Raises:
        ValueError: If the id is not that of a storage.
        TypeError: If the id is not a tuple.
    """
    word, kind, key, location, numel = value
    if word != "storage" or not isinstance(kind, _StorageKind) or type(location) is not str:
        raise ValueError("a persistent id that is not a storage")
    if type(key) is not str or not are_counts((numel,)):
        raise ValueError("a storage without a name or a size")
    return _Storage(kind.dtype, key, numel)


def _rebuild(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> _Described:
    return _described(storage, getattr(storage, "dtype", None), (first, shape, strides), rest)


def _rebuild_with_dtype(storage: Any, first: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    requires_grad, hooks, dtype, *more = rest
    return _described(storage, dtype, (first, shape, strides), (requires_grad, hooks, *more))


def _described(storage: Any, dtype: Any, where: tuple[Any, Any, Any], rest: Any) -> _Described:
    first, shape, strides = where
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without a storage or a dtype")
    if not are_counts((first,)) or not are_counts(shape) or not are_counts(strides):
        raise ValueError("a tensor with an invalid offset, shape or strides")
    requires_grad_and_hooks = 2
    if len(shape) != len(strides) or len(rest) != requires_grad_and_hooks or 0 in strides:
        # For example a conjugated tensor: its stored data differs from its values.
        raise ValueError("a tensor that is not plain")
    return _Described(storage, first, shape, strides, dtype)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _no_hooks(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise ValueError("hooks")
    return {}


_STORAGES: Mapping[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

TENSOR_GLOBALS: Mapping[tuple[str, str], Admitted] = {
    **{("torch", name): Constant(dtype) for name, dtype in DTYPES.items()},
    **{("torch", name): Constant(_StorageKind(dtype)) for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): Constant(_StorageKind(None)),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild),
    ("torch._utils", "_rebuild_tensor_v3"): Function(_rebuild_with_dtype),
    ("torch._utils", "_rebuild_parameter"): Function(_rebuild_parameter),
    ("collections", "OrderedDict"): Function(_no_hooks),
}
"""What the pickle of a tensor may refer to."""


def _refuse(path: str, problem: str, *, found: object = None, expected: object = None) -> NoReturn:
    raise CorruptCheckpointError(
        f"an archive {problem}", phase="read", path=path, found=found, expected=expected
    )
