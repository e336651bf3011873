"""The header of a safetensors file, byte for byte as the safetensors library writes it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import LayoutError
from dcp_hf_writer.tensors.dtypes import ITEMSIZE, SORT_RANK, stored_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcp_hf_writer.tensors.boxes import Shape

# Readers refuse a header above 100 MB (safetensors, MAX_HEADER_SIZE).
MAX_HEADER_NBYTES = 100_000_000

_LENGTH_NBYTES = 8


@dataclass(frozen=True, slots=True)
class HFTensor:
    """One tensor of the export."""

    key: str
    """Its HuggingFace name."""
    dtype: str
    """Its safetensors dtype name."""
    shape: Shape
    """Its shape in elements of torch; `()` for a scalar."""
    nbytes: int = field(init=False, compare=False)
    """Size of its data in bytes."""

    def __post_init__(self) -> None:
        """Count the bytes, which planning asks for again and again."""
        object.__setattr__(self, "nbytes", math.prod(self.shape) * ITEMSIZE[self.dtype])


def in_file_order(tensors: Sequence[HFTensor]) -> list[HFTensor]:
    """Sort tensors as safetensors lays them out: by dtype, widest first, then by name.

    Names compare as UTF-8 bytes, as Rust strings do.
    """
    return sorted(tensors, key=lambda t: (SORT_RANK[t.dtype], t.key.encode()))


def encode_header(
    tensors: Sequence[HFTensor], *, metadata: Mapping[str, str], align: int
) -> tuple[bytes, dict[str, int]]:
    """Encode the header of one output file.

    Args:
        tensors: Tensors of the file, in file order.
        metadata: Pairs that follow `format: pt` in `__metadata__`.
        align: The data starts at a multiple of this many bytes; a multiple of 8.

    Returns:
        The first bytes of the file, length field and padding included; and the offset of each
        tensor's first byte, counted from the start of the file.

    Raises:
        LayoutError: If the header is larger than readers accept, or a scalar has a packed dtype.

    Source:
        safetensors README, "Format".
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    starts: dict[str, int] = {}
    position = 0
    for tensor in tensors:
        stop = position + tensor.nbytes
        starts[tensor.key] = position
        entries[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(stored_shape(tensor.dtype, tensor.shape, key=tensor.key)),
            "data_offsets": [position, stop],
        }
        position = stop
    body = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    body += b" " * (-(_LENGTH_NBYTES + len(body)) % align)
    if len(body) > MAX_HEADER_NBYTES:
        msg = "header of an output file is larger than readers accept"
        raise LayoutError(
            msg,
            phase="plan",
            expected=f"at most {MAX_HEADER_NBYTES} bytes",
            found=f"{len(body)} bytes for {len(tensors)} tensors",
            hint="lower max_shard_size, so that the tensors spread over more files",
        )
    header = len(body).to_bytes(_LENGTH_NBYTES, "little") + body
    return header, {key: start + len(header) for key, start in starts.items()}
