"""Parse the header of a safetensors file without trusting it.

Pure. `encode_safetensors_header` is the other direction. This parser refuses everything that
safetensors' own reader refuses. It also refuses some headers that safetensors accepts: a key that
occurs twice, an empty key, unknown fields, white space before the JSON, more than 64 dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.encode_safetensors_header import MAX_HEADER_NBYTES
from dcp_hf_writer.formats.strict_json import is_count, is_text, parse_json, shortened
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.tensors.boxes import Shape

LENGTH_NBYTES = 8
"""Size of the length field at the start of a file; the field is unsigned and little-endian."""

_METADATA = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_MAX_NBYTES = 1 << 63
# The limit of torch; it also keeps the product of a hostile shape from growing without bound.
_MAX_DIMS = 64

# A header counts values, and two F4 values share a byte.
_BITS = {name: 8 * nbytes for name, nbytes in ITEMSIZE.items()} | {"F4": 4}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the header of its file declares it, already checked."""

    key: str
    """HuggingFace name."""
    dtype: str
    """Name of the safetensors dtype."""
    shape: Shape
    """Shape as declared. For F4 it counts values; torch packs two of them into one element."""
    start: int
    """Offset of the first byte, in bytes from the start of the file."""
    nbytes: int
    """Size of the data in bytes."""

    @property
    def torch_shape(self) -> Shape:
        """Shape in torch elements."""
        return (*self.shape[:-1], self.shape[-1] // 2) if self.dtype == "F4" else self.shape


@dataclass(frozen=True, slots=True)
class FileHeader:
    """A checked header; its tensors cover the rest of the file without gap or overlap."""

    nbytes: int
    """Size of header and length field in bytes; the first tensor starts here."""
    tensors: Mapping[str, StoredTensor]
    """Tensors by key, in the order of their data."""
    metadata: Mapping[str, str]
    """The `__metadata__` entry; empty if the header has none."""


def header_nbytes(start: bytes, *, file_nbytes: int, path: str) -> int:
    """Return the size of a file's header in bytes, including the length field.

    Call this before you read the header, to know how much memory that needs.

    Args:
        start: The first 8 bytes of the file; fewer only if the file is shorter.
        file_nbytes: Size of the file.
        path: The file, for error messages.

    Raises:
        CorruptCheckpointError: If the file is too short for the header that it declares, or the
            header is larger than readers accept.
    """
    if len(start) < LENGTH_NBYTES:
        _refuse(path, "a file is too short for a safetensors header", f"{file_nbytes} bytes")
    declared = int.from_bytes(start[:LENGTH_NBYTES], "little")
    if declared > MAX_HEADER_NBYTES:
        _refuse(
            path,
            "a safetensors header is larger than readers accept",
            f"a length field of {declared} bytes",
            expected=f"at most {MAX_HEADER_NBYTES} bytes",
        )
    if declared > file_nbytes - LENGTH_NBYTES:
        _refuse(
            path,
            "a safetensors header reaches beyond the end of its file",
            f"a length field of {declared} bytes in a file of {file_nbytes}",
        )
    return LENGTH_NBYTES + declared


def parse_header(header: bytes, *, file_nbytes: int, path: str) -> FileHeader:
    """Parse and check the header of a safetensors file.

    Args:
        header: The first bytes of the file, as many as `header_nbytes` returned.
        file_nbytes: Size of the file.
        path: The file, for error messages.

    Raises:
        CorruptCheckpointError: If the header is invalid, or its tensors leave a gap or overlap.

    Source:
        safetensors README, "Format", and `Metadata::validate` in its reader.
    """
    body = header[LENGTH_NBYTES:]
    if not body.startswith(b"{"):
        _refuse(path, "a safetensors header is not a JSON object", shortened(body[:16]))
    entries = parse_json(body, path=path)
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(map(is_text, metadata.values())):
        _refuse(
            path, "the metadata of a safetensors header does not map names to text", key=_METADATA
        )
    tensors = [_tensor(key, entry, len(header), path) for key, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    _check_tiling(tensors, len(header), file_nbytes, path)
    return FileHeader(len(header), {tensor.key: tensor for tensor in tensors}, metadata)


def _tensor(key: str, entry: Any, data_start: int, path: str) -> StoredTensor:
    if not key or not is_text(key):
        _refuse(path, "a tensor has no usable name", shortened(key))
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        names = sorted(entry) if isinstance(entry, dict) else entry
        _refuse(
            path,
            "a tensor has other fields than readers expect",
            shortened(names),
            key=key,
            expected=shortened(sorted(_FIELDS)),
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        _refuse(path, "a tensor has an unknown dtype", shortened(dtype), key=key)
    if not _are_counts(shape, _MAX_DIMS):
        _refuse(path, "the shape of a tensor is not a list of sizes", shortened(shape), key=key)
    if not _are_counts(offsets, 2) or len(offsets) != 2:  # noqa: PLR2004 - start and stop
        _refuse(
            path,
            "the data_offsets of a tensor are not two byte offsets",
            shortened(offsets),
            key=key,
        )
    start, stop = offsets
    nbytes = _nbytes(dtype, shape, key, path)
    if stop - start != nbytes:
        _refuse(
            path,
            "the data_offsets of a tensor do not match its shape and dtype",
            f"offsets {start} to {stop}",
            key=key,
            expected=f"{nbytes} bytes for {dtype} of shape {shape}",
        )
    return StoredTensor(key, dtype, tuple(shape), data_start + start, nbytes)


def _are_counts(value: object, at_most: int) -> bool:
    return isinstance(value, list) and len(value) <= at_most and all(map(is_count, value))


def _nbytes(dtype: str, shape: list[int], key: str, path: str) -> int:
    bits = math.prod(shape) * _BITS[dtype]
    if bits >= _MAX_NBYTES or (0 in shape and math.prod(n for n in shape if n) >= _MAX_NBYTES):
        _refuse(path, "a tensor has too many elements", f"shape {shape}", key=key)
    if dtype == "F4" and (not shape or shape[-1] % 2):
        _refuse(path, "a tensor ends in the middle of a byte", f"{dtype} of shape {shape}", key=key)
    return bits // 8


def _check_tiling(
    tensors: list[StoredTensor], data_start: int, file_nbytes: int, path: str
) -> None:
    reached = data_start
    for tensor in tensors:
        if tensor.start != reached:
            what = "overlap" if tensor.start < reached else "leave a hole"
            _refuse(
                path,
                f"tensors {what} in the data of a safetensors file",
                f"a tensor at byte {tensor.start}",
                key=tensor.key,
                expected=f"a tensor at byte {reached}",
            )
        reached += tensor.nbytes
    if reached != file_nbytes:
        _refuse(
            path,
            "a safetensors file does not end with its last tensor",
            f"{file_nbytes} bytes",
            expected=f"{reached} bytes, as its header declares",
        )


def _refuse(
    path: str,
    problem: str,
    found: object = None,
    *,
    key: str | None = None,
    expected: str | None = None,
) -> NoReturn:
    raise CorruptCheckpointError(
        problem, phase="read", path=path, key=key, expected=expected, found=found
    )
