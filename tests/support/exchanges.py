"""Files whose tensors are cut among ranks, for tests of the exchange: as plans, without a save."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

from dcp_hf_writer.tensors.boxes import ByteRuns, whole
from dcp_hf_writer.tensors.strided_copies import clip, copy_of_box, copy_runs
from support.partitions import partitions_of, shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from dcp_hf_writer.tensors.boxes import Box, Shape

ITEMSIZES = st.sampled_from([1, 2, 4, 8])


@dataclass(frozen=True)
class HeldFiles:
    """Output files, and what each rank holds of them."""

    sizes: list[int]
    """Size of each file, in bytes."""
    held: list[list[tuple[int, ByteRuns]]]
    """By rank: files, and bytes in them."""

    def content(self, file: int) -> npt.NDArray[np.uint8]:
        """Return bytes for a file that differ from their neighbours, and are never 0."""
        return (np.arange(self.sizes[file]) * 7 + file) % 251 + 1


def offsets_of(runs: ByteRuns) -> npt.NDArray[np.int64]:
    """Return the offset of each byte of some runs, in their order."""
    starts = np.fromiter(runs.starts(), np.int64)
    return (starts[:, None] + np.arange(runs.nbytes)).reshape(-1)


def runs_of_box(box: Box, shape: Shape, *, itemsize: int, start: int) -> list[ByteRuns]:
    """Return the bytes of a box of a tensor that begins at `start` of its file."""
    copies = clip(copy_of_box(whole(shape)), box)
    return [copy_runs(one, shape, itemsize=itemsize, tensor_start=start) for one in copies]


def cut_among(tensors: Sequence[tuple[Shape, int]], parts: Sequence[Sequence[Box]]) -> HeldFiles:
    """Put tensors into one file behind a header; rank `i` holds the `i`-th part of each.

    Args:
        tensors: Shape and itemsize of each tensor.
        parts: Of each tensor, one box for each rank.
    """
    held: list[list[tuple[int, ByteRuns]]] = [
        [(0, ByteRuns(0, 96, ()))],
        *([] for _ in parts[0][1:]),
    ]
    start = 96
    for (shape, itemsize), boxes in zip(tensors, parts, strict=True):
        for rank, box in enumerate(boxes):
            found = runs_of_box(box, shape, itemsize=itemsize, start=start)
            held[rank] += [(0, runs) for runs in found]
        start += math.prod(shape) * itemsize
    return HeldFiles([start], held)


@st.composite
def held_files(draw: st.DrawFn, *, most_ranks: int = 5) -> HeldFiles:
    """Draw up to three files of tensors in any cut, spread over ranks in any way."""
    world_size = draw(st.integers(1, most_ranks))
    held: list[list[tuple[int, ByteRuns]]] = [[] for _ in range(world_size)]
    sizes = []
    for file in range(draw(st.integers(1, 3))):
        start = draw(st.integers(1, 40))
        held[0].append((file, ByteRuns(0, start, ())))
        for _ in range(draw(st.integers(0, 4))):
            shape, itemsize = draw(shapes(max_side=3)), draw(ITEMSIZES)
            for box in draw(partitions_of(whole(shape))):
                if box.numel:
                    rank = draw(st.integers(0, world_size - 1))
                    found = runs_of_box(box, shape, itemsize=itemsize, start=start)
                    held[rank] += [(file, runs) for runs in found]
            start += math.prod(shape) * itemsize
        sizes.append(start)
    return HeldFiles(sizes, held)
