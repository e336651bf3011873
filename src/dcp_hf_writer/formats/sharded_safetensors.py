"""Find the tensors whose parts torch's `HuggingFaceStorageWriter(save_distributed=True)` wrote.

Each rank writes safetensors files of its own. A tensor of such a file is a part of a tensor, under
the FQN of the whole one, and the metadata of the header says where the part begins. No file says
what shape the whole tensor has, so the parts must tile a box.

Pure.

Source:
    torch, `hf_storage.py` and `_hf_utils.py`: `DCP_SHARDING_INFO`, `saved_offsets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.strict_json import are_counts, parse_json, shortened
from dcp_hf_writer.tensors.boxes import Box, tiling_fault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.formats.parse_safetensors_header import FileHeader, StoredTensor
    from dcp_hf_writer.tensors.boxes import Shape

_INFO = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"

# The borders of the parts cut a tensor into cells; a check of more cells would exhaust memory.
_MAX_PARTS = 1 << 16


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A part of a tensor, as one file holds it."""

    file: str
    """Name of the file."""
    stored: StoredTensor
    """The part in the header of that file."""
    box: Box
    """The part, in indices of the whole tensor."""


@dataclass(frozen=True, slots=True)
class PiecedTensor:
    """A tensor, and the parts in which the files hold it."""

    dtype: str
    """safetensors dtype of every part."""
    shape: Shape
    """Shape of the whole tensor."""
    pieces: tuple[StoredPiece, ...]
    """Parts that hold each element once."""


def has_pieces(header: FileHeader) -> bool:
    """Whether torch's writer has noted in a header where the tensors of the file begin."""
    return _INFO in header.metadata


def join_pieces(headers: Mapping[str, FileHeader], *, path: str) -> dict[str, PiecedTensor]:
    """Join the parts of tensors.

    Args:
        headers: Header of each file, by file name. All of them have pieces.
        path: The directory, for error messages.

    Returns:
        Every tensor by key, also those that one file holds as a whole.

    Raises:
        CorruptCheckpointError: If a file does not say where a part begins, or if the parts of a
            tensor differ in dtype, overlap, or leave a gap.
    """
    found: dict[str, list[StoredPiece]] = {}
    for name, header in headers.items():
        offsets = _offsets(header, f"{path}/{name}")
        for key, stored in header.tensors.items():
            if key not in offsets:
                _refuse(f"{path}/{name}", "does not say where a part begins", key)
            at = offsets[key]
            if len(at) != len(stored.torch_shape):
                found_text = f"offsets {list(at)}, shape {list(stored.torch_shape)}"
                _refuse(f"{path}/{name}", "says wrongly where a part begins", key, found_text)
            piece = StoredPiece(name, stored, Box(at, stored.torch_shape))
            found.setdefault(key, []).append(piece)
    return {key: _joined(key, pieces, path) for key, pieces in found.items()}


def _offsets(header: FileHeader, path: str) -> dict[str, Shape]:
    text = header.metadata.get(_INFO)
    if text is None:
        _refuse(path, "lacks the places that other files of the directory have", None)
    info = parse_json(text.encode(errors="surrogatepass"), path=path)
    if not isinstance(info, dict):
        _refuse(path, "has places of another form", None, shortened(info))
    found: dict[str, Shape] = {}
    for key, entry in info.items():
        at = entry.get(_OFFSETS) if isinstance(entry, dict) else None
        if not isinstance(at, list) or not are_counts(tuple(at)):
            _refuse(path, "has a place of another form", key, shortened(entry))
        found[key] = tuple(at)
    return found


def _joined(key: str, pieces: list[StoredPiece], path: str) -> PiecedTensor:
    dtypes = sorted({piece.stored.dtype for piece in pieces})
    if len(dtypes) > 1 or len({len(piece.box.offsets) for piece in pieces}) > 1:
        _refuse(path, "has parts of one tensor that differ in kind", key, ", ".join(dtypes))
    ends = [map(sum, zip(p.box.offsets, p.box.sizes, strict=True)) for p in pieces]
    shape = tuple(map(max, zip(*ends, strict=True)))
    fault = None
    if len(pieces) > _MAX_PARTS:
        fault = f"{len(pieces)} parts"
    elif len(pieces) > 1 or pieces[0].box != Box((0,) * len(shape), shape):
        fault = tiling_fault([piece.box for piece in pieces], shape)
    if fault is not None:
        _refuse(
            path,
            "lacks a part of a tensor, or holds one twice",
            key,
            fault,
            expected=f"parts that tile {list(shape)}",
        )
    return PiecedTensor(dtypes[0], shape, tuple(pieces))


def _refuse(
    path: str, problem: str, key: str | None, found: str | None = None, *, expected: object = None
) -> NoReturn:
    raise CorruptCheckpointError(
        f"what torch's HuggingFaceStorageWriter saved in parts {problem}",
        phase="read",
        path=path,
        key=key,
        expected=expected,
        found=found,
        hint="copy all files of the directory, or save it again",
    )
