"""Cut a rank's chunk into regions, each with its place in an output file.

Pure. Save, load and streaming use the same regions.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.tensors.dtype_names import ITEMSIZE
from dcp_hf_writer.tensors.dtypes import NAME_BY_TORCH
from dcp_hf_writer.tensors.strided_copies import Copy, clip, copy_runs, source_span

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    from dcp_hf_writer.plan.layout import PartTarget
    from dcp_hf_writer.tensors.boxes import Box, ByteRuns


class RowIndex:
    """Finds, by rows of one runtime tensor, the numbers of the targets that take elements there.

    It holds for all tensors whose targets have the same copies, such as the stacks of experts.
    """

    def __init__(self, targets: Sequence[PartTarget]) -> None:
        """Sort the targets by the rows of the runtime tensor that they take elements from."""
        spans = [(*_rows(target), i) for i, target in enumerate(targets)]
        spans.sort()
        self.numbers = [i for _, _, i in spans]
        self._first = [first for first, _, _ in spans]
        self._last = list(itertools.accumulate((last for _, last, _ in spans), max))
        self._known: dict[frozenset[tuple[int, int]], tuple[int, ...]] = {}

    def near(self, first: int, stop: int) -> range:
        """Return positions in `numbers`: those of all targets with elements in `[first, stop)`.

        There may be a few others among them.
        """
        return range(bisect.bisect_left(self._last, first), bisect.bisect_left(self._first, stop))

    def near_rows(self, rows: frozenset[tuple[int, int]]) -> tuple[int, ...]:
        """Return the numbers of all targets with elements in some rows, and possibly a few others.

        Args:
            rows: For each chunk, its first row and one past its last row.

        Returns:
            Each number once, in the order of the rows.
        """
        found = self._known.get(rows)
        if found is None:
            places = sorted({i for first, stop in rows for i in self.near(first, stop)})
            found = self._known[rows] = tuple(self.numbers[i] for i in places)
        return found


class TargetTable:
    """Finds the targets of one runtime tensor by the rows of a chunk."""

    def __init__(self, targets: Sequence[PartTarget]) -> None:
        """Sort the targets by the rows of the runtime tensor that they take elements from."""
        self._index = RowIndex(targets)
        self._targets = tuple(targets[i] for i in self._index.numbers)

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self._targets)

    def near(self, chunk: Box | ChunkStorageMetadata) -> tuple[PartTarget, ...]:
        """Return all targets that have elements in a chunk, and possibly a few others."""
        if not chunk.offsets:
            return self._targets
        first = chunk.offsets[0]
        found = self._index.near(first, first + chunk.sizes[0])
        return self._targets[found.start : found.stop]

    def regions(self, chunk: Box) -> list[Region]:
        """Cut a chunk as `chunk_regions` does, looking only at the targets near it."""
        return chunk_regions(chunk, self.near(chunk))


def _rows(target: PartTarget) -> tuple[int, int]:
    if len(target.copies) == 1:
        return source_span(target.copies[0])
    spans = [source_span(copy) for copy in target.copies]
    return min((s[0] for s in spans), default=0), max((s[1] for s in spans), default=0)


@dataclass(frozen=True, slots=True)
class Region:
    """Elements that a rank copies from its local tensor into one output file."""

    target: PartTarget
    """The tensor on disk."""
    copy: Copy
    """The elements; `start` is within the rank's chunk."""

    def hf_runs(self) -> ByteRuns:
        """Return the bytes of the file that this region fills, in the order of the copy's loops."""
        target = self.target
        return copy_runs(
            self.copy, target.shape, itemsize=ITEMSIZE[target.dtype], tensor_start=target.start
        )


def chunk_regions(chunk: Box, targets: Iterable[PartTarget]) -> list[Region]:
    """Cut one chunk of a runtime tensor into the regions that go to its targets.

    Args:
        chunk: The chunk, in indices of the runtime tensor; a rank holds it as a local tensor.
        targets: Targets of that runtime tensor.
    """
    if not chunk.numel:
        return []
    return [
        Region(target, part)
        for target in targets
        for copy in target.copies
        for part in clip(copy, chunk)
    ]


def needs_cast(dtype: torch.dtype, target: PartTarget) -> bool:
    """Whether the target stores a tensor of `dtype` in another dtype."""
    return NAME_BY_TORCH.get(dtype) != target.dtype
