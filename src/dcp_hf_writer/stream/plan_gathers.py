"""Plan the copies and collectives that gather the tensors of a bucket.

Pure. Each rank packs its elements of a bucket into its slot of a byte buffer. A few collectives
fill the slots of the other ranks. Strided copies then move the elements from the buffer to the
tensors. Every rank can compute where each packed byte belongs, so tensors of all dtypes are sent
together.

A tensor that is sharded over several mesh dimensions needs one step per dimension. A gather of
tensors would have to undo the innermost cut first. Packed bytes do not depend on the order, so the
order of the steps is free: here the outermost dimension comes first. A rank receives the same
`(ranks - 1)` parts in any order, but the first step moves single parts and the last step moves the
most. With `a x b` ranks, the outer groups carry `a - 1` parts per rank instead of `b * (a - 1)`.
The outermost dimension of a mesh has the slow links.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dcp_hf_writer.stream.buckets import Bucket, Chain, Part, SourcePiece, StreamedTensor, aligned
from dcp_hf_writer.tensors.strided_copies import Copy, Loop, split, strides_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt
    import torch

    from dcp_hf_writer.tensors.boxes import Shape

# Packed pieces start at multiples of this, the size of the largest elements of any dtype. It also
# lets copies be vectorised.
_PIECE_ALIGN = 16

# One collective gathers parts of one size. So unequal parts are padded if the padding is at most
# 1/8 of the parts, or if the padded parts together are small. Otherwise each part is broadcast.
_MAX_WASTE = 8
_SMALL_NBYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Move:
    """Elements to copy on this rank."""

    source: str
    """FQN of the runtime tensor that the elements come from."""
    number: int
    """Index, within the bucket, of the HuggingFace tensor that gets the elements; -1 in a pack."""
    dtype: torch.dtype
    """Dtype in which the elements are sent."""
    copy: Copy
    """From the local tensor (runtime side) to the HuggingFace tensor.

    In a pack or unpack, the buffer replaces one of the two, as a vector of `dtype`.
    """


@dataclass(frozen=True, slots=True)
class Gather:
    """One collective step over a process group: each member's slot reaches all members."""

    group: int
    """Number of the group."""
    slots: tuple[tuple[int, int], ...]
    """`(first byte, bytes)` of each member's slot in the buffer, by its rank in the group."""

    @property
    def is_even(self) -> bool:
        """Whether all slots have one size, so that one all-gather fills them."""
        return len({nbytes for _, nbytes in self.slots}) == 1


@dataclass(frozen=True, slots=True)
class Round:
    """One use of the buffer: pack, gather, unpack."""

    nbytes: int
    """Bytes of the buffer that are used."""
    packs: tuple[Move, ...]
    """Local tensors -> this rank's slot."""
    gathers: tuple[Gather, ...]
    """The collective steps, in order."""
    unpacks: tuple[Move, ...]
    """Buffer -> HuggingFace tensors."""


@dataclass(frozen=True, slots=True)
class Steps:
    """All that this rank does to fill one bucket."""

    moves: tuple[Move, ...]
    """Local tensors -> HuggingFace tensors, for tensors that each rank holds in full."""
    rounds: tuple[tuple[Chain, Round], ...]
    """The rounds of each chain, in the same order on all ranks of the chain."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """Pieces that are sent in one round."""

    number: int
    source: str
    dtype: torch.dtype
    pieces: tuple[SourcePiece, ...]

    def packed_nbytes(self, align: int = _PIECE_ALIGN) -> int:
        sizes = (piece.copy.numel * self.dtype.itemsize for piece in self.pieces)
        return sum(aligned(nbytes, align) for nbytes in sizes)


def plan_steps(bucket: Bucket, *, places: Sequence[int], limit_nbytes: int) -> Steps:
    """Plan how this rank takes part in filling a bucket.

    Args:
        bucket: What to fill.
        places: This rank's index in each group.
        limit_nbytes: Most bytes of one round; a larger tensor takes several rounds.
    """
    moves: list[Move] = []
    units: dict[Chain, list[_Unit]] = {}
    for number, tensor in enumerate(bucket.tensors):
        for part in tensor.parts:
            held = part.held
            if held.chain.groups:
                known = units.setdefault(held.chain, [])
                known += _units(number, tensor, part, limit_nbytes)
            else:
                moves += [Move(held.fqn, number, held.dtype, one.copy) for one in part.pieces]
    rounds = tuple(
        (chain, _round(chain, together, places))
        for chain, some in units.items()
        for together in _filled(some, limit_nbytes)
    )
    return Steps(tuple(moves), rounds)


def wire_dtype(source: torch.dtype, target: torch.dtype) -> torch.dtype:
    """Return the dtype in which elements are sent: they are cast first unless that widens them."""
    return target if target.itemsize <= source.itemsize else source


def fused(copies: Iterable[Copy]) -> list[Copy]:
    """Join copies at a constant distance, because a GPU runs a few large copies faster."""
    found = list(copies)
    while True:
        alike: dict[tuple[Loop, ...], list[Copy]] = {}
        for copy in found:
            alike.setdefault(copy.loops, []).append(copy)
        joined = [one for some in alike.values() for one in _joined(some)]
        if len(joined) == len(found):
            return joined
        found = joined


def _units(number: int, tensor: StreamedTensor, part: Part, limit_nbytes: int) -> Iterator[_Unit]:
    """Cut a part into units of at most `limit_nbytes`; each unit has pieces of all members."""
    held = part.held
    dtype = wire_dtype(held.dtype, tensor.dtype)
    whole = _Unit(number, held.fqn, dtype, part.pieces)
    nbytes = whole.packed_nbytes(align=1)
    if nbytes <= limit_nbytes:
        yield whole
        return
    cut = [_cut(piece, nbytes, limit_nbytes) for piece in part.pieces]
    for level in itertools.zip_longest(*cut):
        yield _Unit(number, held.fqn, dtype, tuple(piece for piece in level if piece is not None))


def _cut(piece: SourcePiece, whole_nbytes: int, limit_nbytes: int) -> list[SourcePiece]:
    # Each member sends its share of each unit, so that all links are used and units are even.
    share = max(1, piece.copy.numel * limit_nbytes // whole_nbytes)
    return [SourcePiece(piece.member, some) for some in split(piece.copy, share)]


def _filled(units: Iterable[_Unit], limit_nbytes: int) -> Iterator[list[_Unit]]:
    current: list[_Unit] = []
    nbytes = 0
    for unit in units:
        packed = unit.packed_nbytes()
        if current and nbytes + packed > limit_nbytes:
            yield current
            current, nbytes = [], 0
        current.append(unit)
        nbytes += packed
    if current:
        yield current


def _round(chain: Chain, units: Iterable[_Unit], places: Sequence[int]) -> Round:
    own = tuple(places[group] for group in chain.groups)
    me = int(np.ravel_multi_index(own, chain.sizes))
    filled = [0] * math.prod(chain.sizes)
    packed: list[tuple[_Unit, SourcePiece, int]] = []
    for unit in units:
        for piece in unit.pieces:
            packed.append((unit, piece, filled[piece.member]))
            nbytes = piece.copy.numel * unit.dtype.itemsize
            filled[piece.member] += aligned(nbytes, _PIECE_ALIGN)
    starts, gathers, nbytes = _slots(filled, chain, own)
    packs: dict[tuple[str, int, torch.dtype], list[Copy]] = {}
    unpacks: dict[tuple[str, int, torch.dtype], list[Copy]] = {}
    for unit, piece, within in packed:
        at = (starts[piece.member] + within) // unit.dtype.itemsize
        if piece.member == me:
            # One entry (-1) for all HuggingFace tensors: neighbours in the runtime tensor become
            # one copy.
            packs.setdefault((unit.source, -1, unit.dtype), []).append(_packing(piece.copy, at))
        kind = (unit.source, unit.number, unit.dtype)
        unpacks.setdefault(kind, []).append(_unpacking(piece.copy, at))
    return Round(nbytes, _moves(packs), gathers, _moves(unpacks))


def _moves(copies: dict[tuple[str, int, torch.dtype], list[Copy]]) -> tuple[Move, ...]:
    return tuple(Move(*kind, copy) for kind, some in copies.items() for copy in fused(some))


def _packing(copy: Copy, at: int) -> Copy:
    return Copy((at,), copy.start, _loops_in_buffer(copy.loops)[0])


def _unpacking(copy: Copy, at: int) -> Copy:
    return Copy(copy.hf_start, (at,), _loops_in_buffer(copy.loops)[1])


# Cached: the pieces of a tensor have the same loops, and so have those of similar layers.
@functools.lru_cache(maxsize=1024)
def _loops_in_buffer(loops: tuple[Loop, ...]) -> tuple[tuple[Loop, ...], tuple[Loop, ...]]:
    """Return the loops into and out of a vector that holds the elements one after another."""
    pairs = list(zip(loops, strides_of(tuple(loop.extent for loop in loops)), strict=True))
    into = tuple(Loop(loop.extent, 0, step, loop.dim, loop.step) for loop, step in pairs)
    out_of = tuple(Loop(loop.extent, loop.hf_dim, loop.hf_step, 0, step) for loop, step in pairs)
    return into, out_of


def _slots(
    filled: list[int], chain: Chain, own: Shape
) -> tuple[list[int], tuple[Gather, ...], int]:
    """Lay out the buffer, so that each step fills a consecutive part of it.

    Returns:
        The first byte of each member's slot, the steps of this rank, and the size of the buffer in
        bytes.
    """
    sizes = chain.sizes
    held: npt.NDArray[np.int64] = np.array(filled, np.int64).reshape(sizes)
    starts = np.zeros(sizes, np.int64)
    # For each step: the first byte of each slot within the slot of the next step, and its size.
    levels: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for size in sizes:
        total, most = held.sum(axis=0), held.max(axis=0)
        waste = most * size - total
        is_padded = (waste * _MAX_WASTE <= total) | (most * size <= _SMALL_NBYTES)
        slots = np.where(is_padded, np.broadcast_to(most, held.shape), held)
        offsets = np.cumsum(slots, axis=0) - slots
        starts += offsets
        levels.append((offsets, slots))
        held = slots.sum(axis=0)
    steps: list[Gather] = []
    base = 0
    for axis in range(len(sizes) - 1, -1, -1):
        offsets, slots = (_column(level, own[axis + 1 :]) for level in levels[axis])
        places = zip((base + offsets).tolist(), slots.tolist(), strict=True)
        if slots.any():
            steps.append(Gather(chain.groups[axis], tuple(places)))
        base += int(offsets[own[axis]])
    return starts.reshape(-1).tolist(), tuple(reversed(steps)), int(held)


def _column(level: npt.NDArray[np.int64], at: Shape) -> npt.NDArray[np.int64]:
    """Return the values of the members of one group, at this rank's index in the later groups."""
    return level.reshape(len(level), -1)[:, int(np.ravel_multi_index(at, level.shape[1:]))]


def _joined(copies: list[Copy]) -> Iterator[Copy]:
    """Join runs of copies with equal loops; a run becomes a copy with one more loop."""
    copies.sort(key=lambda copy: copy.hf_start)
    run = [copies[0]]
    step: tuple[int, int, int, int] | None = None
    for copy in copies[1:]:
        between = _step(run[-1], copy)
        if between is None or (len(run) > 1 and between != step):
            yield _run(run, step)
            run = []
        else:
            step = between
        run.append(copy)
    yield _run(run, step)


def _step(first: Copy, second: Copy) -> tuple[int, int, int, int] | None:
    """Return `(hf_dim, hf_step, dim, step)` between copies; `None` if one step is not enough."""
    hf, runtime = _along(first.hf_start, second.hf_start), _along(first.start, second.start)
    return None if hf is None or runtime is None else (*hf, *runtime)


def _along(first: Shape, second: Shape) -> tuple[int, int] | None:
    apart = [(d, b - a) for d, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    return apart[0] if len(apart) == 1 and apart[0][1] > 0 else None


def _run(run: list[Copy], step: tuple[int, int, int, int] | None) -> Copy:
    first = run[0]
    if len(run) == 1 or step is None:
        return first
    hf_dim, hf_step, dim, runtime_step = step
    loop = Loop(len(run), hf_dim, hf_step, dim, runtime_step)
    return Copy(first.hf_start, first.start, (loop, *first.loops))
