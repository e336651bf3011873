"""How the slices of an exchange cut the bytes that a rank holds, and how another rank learns it.

Pure. The sender of a slice and its owner go through the same cuts in the same order, so the bytes
travel without any description of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dcp_hf_writer.tensors.boxes import ByteRuns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dcp_hf_writer.plan.cells import Grid, Numbers

    Piece = tuple[int, ByteRuns]
    """Number of a file, and bytes in it."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a piece that lies in one slice."""

    piece: int
    """Index of the piece among those of the rank."""
    first: int
    """First position in the piece."""
    stop: int
    """One past the last position."""


def cuts_by_slice(grid: Grid, pieces: Sequence[Piece]) -> dict[int, list[Cut]]:
    """Return the cuts of each slice in which a rank holds bytes, in the order of the pieces.

    Args:
        grid: The slices.
        pieces: What the rank holds; each piece has at least one byte.
    """
    found: dict[int, list[Cut]] = {}
    for number, (file, runs) in enumerate(pieces):
        first, positions = grid.touched(file, runs)
        for i in np.flatnonzero(np.diff(positions)):
            cut = Cut(number, int(positions[i]), int(positions[i + 1]))
            found.setdefault(first + int(i), []).append(cut)
    return found


def pieces_of_owners(
    grid: Grid, owner_of_slice: Numbers, pieces: Sequence[Piece], *, world_size: int
) -> list[list[Piece]]:
    """Return for each rank the pieces that reach into cells of that rank, in their order.

    Args:
        grid: The slices.
        owner_of_slice: The owner of each slice.
        pieces: What this rank holds.
        world_size: Number of ranks.
    """
    found: list[list[Piece]] = [[] for _ in range(world_size)]
    for file, runs in pieces:
        first, positions = grid.touched(file, runs)
        slices = first + np.flatnonzero(np.diff(positions))
        for owner in np.unique(owner_of_slice[slices]):
            found[int(owner)].append((file, runs))
    return found


def encode_pieces(pieces: Iterable[Piece]) -> Numbers:
    """Return pieces as flat numbers, to send them to another rank."""
    flat: list[int] = []
    for file, runs in pieces:
        flat += (file, runs.start, runs.nbytes, len(runs.loops))
        for count, stride in runs.loops:
            flat += (count, stride)
    return np.array(flat, np.int64)


def decode_pieces(flat: Numbers) -> list[Piece]:
    """Return the pieces that `encode_pieces` encoded."""
    numbers = iter(flat.tolist())
    return [
        (file, ByteRuns(next(numbers), next(numbers), _loops(next(numbers), numbers)))
        for file in numbers
    ]


def _loops(count: int, numbers: Iterator[int]) -> tuple[tuple[int, int], ...]:
    return tuple((next(numbers), next(numbers)) for _ in range(count))
