"""A block of the export as the write phase reports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcp_hf_writer.tensors.boxes import Shape
    from dcp_hf_writer.tensors.strided_copies import IndexLoops


@dataclass(frozen=True, slots=True)
class WrittenBlock:
    """Elements of one tensor on disk, written by one rank."""

    key: str
    """HuggingFace name."""
    offsets: Shape
    """Index of its first element in the tensor on disk."""
    extent: Shape | IndexLoops
    """Its sizes, one per dimension, if it is a box without gaps; else its loops."""
    digest: str
    """xxh3_64 of its stored bytes, in hex; they are row-major, or in the order of its loops."""
