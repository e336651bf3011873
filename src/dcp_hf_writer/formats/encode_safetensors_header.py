"""The header of a safetensors file, byte for byte as the safetensors library writes it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from dcp_hf_writer.errors import LayoutError
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE, SORT_RANK
from dcp_hf_writer.tensors.dtypes import stored_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcp_hf_writer.tensors.boxes import Shape

# Readers refuse a header above 100 MB (safetensors, MAX_HEADER_SIZE).
MAX_HEADER_NBYTES = 100_000_000

_LENGTH_NBYTES = 8

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class HeaderEntry(Protocol):
    """What a header says of a tensor."""

    @property
    def key(self) -> str:
        """HuggingFace name."""

    @property
    def dtype(self) -> str:
        """Name of the safetensors dtype."""

    @property
    def shape(self) -> Shape:
        """Shape in torch elements; `()` for a scalar."""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""


@dataclass(frozen=True, slots=True)
class HFTensor:
    """One tensor of a file."""

    key: str
    """HuggingFace name."""
    dtype: str
    """Name of the safetensors dtype."""
    shape: Shape
    """Shape in torch elements; `()` for a scalar."""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return nbytes_of(self.dtype, self.shape)


def nbytes_of(dtype: str, shape: Shape) -> int:
    """Return the size of a tensor's data in bytes."""
    return math.prod(shape) * ITEMSIZE[dtype]


Entry = TypeVar("Entry", bound=HeaderEntry)


def in_file_order(tensors: Sequence[Entry]) -> list[Entry]:
    """Sort tensors as safetensors does: by dtype, widest first, then by name.

    Names compare as UTF-8 bytes, as Rust strings do.
    """
    return sorted(tensors, key=lambda t: (SORT_RANK[t.dtype], t.key.encode()))


def encode_header(
    tensors: Sequence[HeaderEntry], *, metadata: Mapping[str, str], align: int
) -> tuple[bytes, dict[str, int]]:
    """Encode the header of one output file.

    Args:
        tensors: The tensors of the file, in file order.
        metadata: Entries to add to `__metadata__`, after `format: pt`.
        align: Alignment in bytes of the start of the data; a multiple of 8.

    Returns:
        First, the bytes that the file starts with: length field, header and padding. Second, by
        key, the offset of each tensor's first byte from the start of the file.

    Raises:
        LayoutError: If the header is larger than readers accept, or a scalar has a packed dtype.

    Source:
        safetensors README, "Format".
    """
    entries = [f'"__metadata__":{_json({"format": "pt", **metadata})}']
    starts: dict[str, int] = {}
    position = 0
    # Most tensors of a model have one of a few forms, whose JSON is encoded once.
    forms: dict[tuple[str, Shape], str] = {}
    for tensor in tensors:
        key, dtype, shape = tensor.key, tensor.dtype, tensor.shape
        form = forms.get((dtype, shape))
        if form is None:
            stored = list(stored_shape(dtype, shape, key=key))
            form = forms[dtype, shape] = f'"dtype":{_json(dtype)},"shape":{_json(stored)}'
        stop = position + tensor.nbytes
        starts[key] = position
        entries.append(f'{_json(key)}:{{{form},"data_offsets":[{position},{stop}]}}')
        position = stop
    body = f"{{{','.join(entries)}}}".encode()
    body += b" " * (-(_LENGTH_NBYTES + len(body)) % align)
    if len(body) > MAX_HEADER_NBYTES:
        msg = "the header of an output file is larger than readers accept"
        raise LayoutError(
            msg,
            phase="plan",
            expected=f"at most {MAX_HEADER_NBYTES} bytes",
            found=f"{len(body)} bytes for {len(tensors)} tensors",
            hint="lower max_shard_size to spread the tensors over more files",
        )
    header = len(body).to_bytes(_LENGTH_NBYTES, "little") + body
    return header, {key: start + len(header) for key, start in starts.items()}
