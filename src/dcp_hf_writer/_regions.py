"""What of a rank's chunk goes where in the output files: the same for save, load and streaming.

Pure.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer._copies import Copy, clip, copy_runs, source_span
from dcp_hf_writer._dtypes import ITEMSIZE, NAME_BY_TORCH

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    from dcp_hf_writer._boxes import Box, ByteRuns
    from dcp_hf_writer._layout import PartTarget


class TargetTable:
    """The targets of one runtime tensor, to be looked up by the rows of a chunk."""

    def __init__(self, targets: Sequence[PartTarget]) -> None:
        """Sort targets by their rows of the runtime tensor."""
        spans = [(*_rows(target), i) for i, target in enumerate(targets)]
        spans.sort()
        self._targets = tuple(targets[i] for _, _, i in spans)
        self._first = [first for first, _, _ in spans]
        self._last = list(itertools.accumulate((last for _, last, _ in spans), max))
        self._known: dict[tuple[int, int], tuple[PartTarget, ...]] = {}

    def near(self, chunk: Box | ChunkStorageMetadata) -> tuple[PartTarget, ...]:
        """Return the targets that may have elements in a chunk, and few others."""
        if not chunk.offsets:
            return self._targets
        first = chunk.offsets[0]
        return self.near_rows(first, first + chunk.sizes[0])

    def near_rows(self, first: int, stop: int) -> tuple[PartTarget, ...]:
        """Return the targets that may have elements in rows `[first, stop)`, and few others."""
        # Ranks that share these rows get the same tuple.
        found = self._known.get((first, stop))
        if found is None:
            start = bisect.bisect_left(self._last, first)
            found = self._targets[start : bisect.bisect_left(self._first, stop)]
            self._known[first, stop] = found
        return found


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
        """Return the bytes of the file that it fills, in order of the copy's loops."""
        target = self.target
        return copy_runs(
            self.copy, target.shape, itemsize=ITEMSIZE[target.dtype], tensor_start=target.start
        )


def chunk_regions(chunk: Box, targets: Iterable[PartTarget]) -> list[Region]:
    """Cut one chunk of a runtime tensor into what goes to each of its targets.

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
    """Whether a tensor of `dtype` is stored in another one."""
    return NAME_BY_TORCH.get(dtype) != target.dtype
