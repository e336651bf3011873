"""The report of a rank to the coordinator about its part of a save, and the coverage check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from dcp_hf_writer.errors import CoverageError
from dcp_hf_writer.tensors.boxes import Box, Shape, tiling_fault
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE
from dcp_hf_writer.tensors.strided_copies import IndexLoops, coverage_fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import TypeGuard

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.plan.layout import Layout

DIGEST_NAME = "xxh3_64"


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


def is_solid(extent: Shape | IndexLoops) -> TypeGuard[Shape]:
    """Whether a block has sizes instead of loops."""
    return not (extent and isinstance(extent[0], tuple))


@dataclass(frozen=True, slots=True)
class DCPFile:
    """One `.distcp` file, written by one rank."""

    name: str
    """File name."""
    nbytes: int
    """Its size."""
    ranges: tuple[tuple[int, int, str], ...]
    """`(start, nbytes, digest)` of the data of each tensor, ascending."""
    rest: str
    """Digest of all other bytes of the file, in order."""


@dataclass(slots=True)
class RankReport:
    """What one rank did. It travels as the storage data of one extra `WriteResult`."""

    rank: int
    host: str
    blocks: list[WrittenBlock] = field(default_factory=list)
    dcp_files: list[DCPFile] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each phase."""
    nbytes: dict[str, int] = field(default_factory=dict)
    """Bytes written for each half, `dcp` and `hf`."""
    export_error: ExportError | None = None
    """Why this rank could not write its part of the export."""
    stamp: str = ""
    """Stamp of this rank's `LocalFacts` in this save."""
    parts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """On an object store: the parts that the rank sent of shared uploads, by key of the object."""
    samples: bytes | None = None
    """Samples of the `LocalFacts`, if DCP's plan cache did not send them to the coordinator."""


def check_coverage(layout: Layout, reports: Sequence[RankReport]) -> None:
    """Check that the reported blocks tile every tensor of every output file exactly.

    Without this check, a file with a slice that no rank wrote would look valid, with zeros there.

    Raises:
        CoverageError: If the blocks do not cover a key exactly once, or a rank reports a key that
            the export does not have. It names the first such key.
    """
    written: dict[str, list[WrittenBlock]] = {}
    for report in reports:
        for block in report.blocks:
            written.setdefault(block.key, []).append(block)
    shapes = _shapes(layout)
    for key, (shape, itemsize, file) in shapes.items():
        fault = _fault(written.pop(key, ()), shape)
        if fault is not None:
            msg = "the blocks that ranks report do not tile a tensor of the export"
            raise CoverageError(
                msg,
                phase="finish",
                path=file,
                key=key,
                expected=f"each of {_count(shape) * itemsize} bytes once",
                found=fault,
                hint="nothing was published; this is a bug in dcp-hf-writer, please report it",
            )
    if written:
        msg = "a rank reports a tensor that is not in the export"
        raise CoverageError(msg, phase="finish", key=next(iter(written)))


def _fault(blocks: Iterable[WrittenBlock], shape: Shape) -> str | None:
    boxes, parts = [], []
    for block in blocks:
        if is_solid(block.extent):
            boxes.append(Box(block.offsets, block.extent))
            loops = tuple((n, d, 1) for d, n in enumerate(block.extent))
            parts.append((block.offsets, loops))
        else:
            parts.append((block.offsets, cast("IndexLoops", block.extent)))
    if len(boxes) == len(parts):
        return tiling_fault(boxes, shape)
    return coverage_fault(parts, shape)


def _shapes(layout: Layout) -> Mapping[str, tuple[Shape, int, str]]:
    return {
        target.key: (target.shape, ITEMSIZE[target.dtype], layout.files[target.file].name)
        for parts in layout.targets.values()
        for target in parts
    }


def _count(shape: Iterable[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
