"""Divide HuggingFace tensors into buckets, and find the ranks that hold their elements.

Pure: no tensors, no process group. Every rank computes the same plan from the same input, so the
plan is never sent.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.plan.layout import PartTarget
from dcp_hf_writer.plan.regions import TargetTable, chunk_regions
from dcp_hf_writer.tensors.dtypes import TORCH_BY_NAME
from dcp_hf_writer.tensors.shards import ShardBlock, blocks_of
from dcp_hf_writer.tensors.strided_copies import Copy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from dcp_hf_writer.mapping.load_spec import ShardSpec
    from dcp_hf_writer.tensors.boxes import Shape

# Tensors of a bucket start at multiples of this. Vectorised copies, and other processes that map
# the memory, need such an alignment. The tensors of CUDA's allocator have a similar one.
ALIGN_NBYTES = 256

# Number of cached results. The layers of a model are alike, and most have several kinds of tensors.
_KEPT = 256

Cuts = tuple["ShardSpec", ...] | None
"""How the part of one rank was cut; `None` if another rank sends the same part."""


@dataclass(frozen=True, slots=True)
class Chain:
    """Process groups over which the parts of a tensor are gathered, in the order of the gathers.

    A member of the chain has one index in each group; members are numbered row-major.
    """

    groups: tuple[int, ...]
    """The caller's number of each group."""
    sizes: Shape
    """Number of ranks of each group; at least 2."""


LOCAL = Chain((), ())
"""The chain of a tensor that each rank holds in full."""


@dataclass(frozen=True, slots=True)
class Held:
    """One runtime tensor, and how the ranks hold it."""

    fqn: str
    """FQN in the state dict."""
    shape: Shape
    """Global shape."""
    dtype: torch.dtype
    """Runtime dtype."""
    chain: Chain
    """Groups over which its parts are gathered."""
    cuts: tuple[tuple[Cuts, ...], ...]
    """The part of each member of the chain, at each place: `cuts[place][member]`.

    A place is an index along the preserved mesh dimension. There is one place if the tensor is not
    sharded along that dimension.
    """


@dataclass(frozen=True, slots=True)
class SourcePiece:
    """Elements of a HuggingFace tensor that one member of a chain holds."""

    member: int
    """Number of the member."""
    copy: Copy
    """The elements; `start` is an index in the member's local tensor."""


@dataclass(frozen=True, slots=True)
class Part:
    """The elements that one HuggingFace tensor takes from one runtime tensor."""

    held: Held
    """The runtime tensor."""
    pieces: tuple[SourcePiece, ...]
    """The elements, each once."""


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """One HuggingFace tensor that is streamed."""

    key: str
    """Its name."""
    shape: Shape
    """Its shape."""
    dtype: torch.dtype
    """Its dtype."""
    home: int | None
    """Index along the preserved dimension of the ranks that yield it; `None` if all ranks do."""
    parts: tuple[Part, ...]
    """Where its elements come from."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Bucket:
    """HuggingFace tensors that are yielded together."""

    tensors: tuple[StreamedTensor, ...] = ()
    """In the order in which they are yielded."""
    starts: tuple[int, ...] = ()
    """First byte of each within the memory of the bucket."""
    nbytes: int = 0
    """Size of that memory."""


def hf_tensors(
    held: Iterable[Held], targets: Mapping[str, Sequence[PartTarget]], *, preserve: str | None
) -> list[StreamedTensor]:
    """Find where the elements of each HuggingFace tensor are.

    Args:
        held: The runtime tensors, in state-dict order.
        targets: The HuggingFace tensors that take elements from each runtime tensor, by FQN.
        preserve: Name of the preserved mesh dimension, for error messages.

    Returns:
        The HuggingFace tensors, in the order of the first runtime tensor that each comes from.

    Raises:
        SpecError: If ranks at several indices of the preserved dimension hold parts of one tensor.
    """
    found: dict[str, list[tuple[Held, PartTarget, _Spread]]] = {}
    for one in held:
        wanted = targets.get(one.fqn, ())
        spread = _spread(one.shape, one.cuts, tuple(target.copies for target in wanted))
        for target, where in zip(wanted, spread, strict=True):
            found.setdefault(target.key, []).append((one, target, where))
    return [_hf_tensor(key, sources, preserve) for key, sources in found.items()]


def fill_buckets(
    tensors: Iterable[StreamedTensor], *, place: int | None, limit_nbytes: int
) -> list[Bucket]:
    """Divide tensors into buckets: first those that all ranks yield, then those of this rank.

    Args:
        tensors: All HuggingFace tensors.
        place: This rank's index along the preserved dimension; `None` if there is none.
        limit_nbytes: Largest size of a bucket; a larger tensor gets a bucket of its own.

    Returns:
        The buckets. Every rank gets the same number: shorter lists end with empty buckets.
    """
    by_home: dict[int | None, list[StreamedTensor]] = {}
    for tensor in tensors:
        by_home.setdefault(tensor.home, []).append(tensor)
    shared = _filled(by_home.pop(None, []), limit_nbytes)
    kept = {home: _filled(some, limit_nbytes) for home, some in by_home.items()}
    longest = max(map(len, kept.values()), default=0)
    own = [] if place is None else kept.get(place, [])
    return [*shared, *own, *itertools.repeat(Bucket(), longest - len(own))]


def aligned(nbytes: int, to: int = ALIGN_NBYTES) -> int:
    """Round up to a multiple of `to`."""
    return -(-nbytes // to) * to


_Spread = tuple[tuple[int, tuple[SourcePiece, ...]], ...]
"""`(place, pieces)` of one HuggingFace tensor, for each place that has any pieces."""


def _hf_tensor(
    key: str, sources: list[tuple[Held, PartTarget, _Spread]], preserve: str | None
) -> StreamedTensor:
    target = sources[0][1]
    homes = {
        place if len(held.cuts) > 1 else None for held, _, where in sources for place, _ in where
    }
    if len(homes) > 1:
        fqns = [held.fqn for held, _, _ in sources]
        shown = sorted("every rank" if home is None else f"index {home}" for home in homes)
        raise SpecError(
            "a mesh dimension cannot be preserved, because it cuts through a HuggingFace tensor",
            phase="plan",
            fqn=fqns[0] if len(fqns) == 1 else str(fqns),
            key=key,
            expected=f"all of its elements at one index of {preserve!r}",
            found=f"elements at {', '.join(shown)}",
            hint="shard that dimension by whole HuggingFace tensors, such as experts, or call "
            "without preserve",
        )
    parts = tuple(Part(held, pieces) for held, _, where in sources for _, pieces in where if pieces)
    home = next(iter(homes), None)
    return StreamedTensor(key, target.shape, TORCH_BY_NAME[target.dtype], home, parts)


@functools.lru_cache(maxsize=_KEPT)
def _spread(
    shape: Shape, cuts: tuple[tuple[Cuts, ...], ...], copies: tuple[tuple[Copy, ...], ...]
) -> tuple[_Spread, ...]:
    """Find the pieces of each target of a runtime tensor."""
    numbered = [PartTarget(str(i), 0, 0, "", (), some) for i, some in enumerate(copies)]
    table = TargetTable(numbered) if numbered else None
    found: list[dict[int, list[SourcePiece]]] = [{} for _ in copies]
    for place, members in enumerate(cuts):
        for member, cut in enumerate(members):
            for block in () if cut is None else blocks_of(shape, cut):
                for region in chunk_regions(
                    block.global_box, () if table is None else table.near(block.global_box)
                ):
                    piece = SourcePiece(member, _within_local(region.copy, block))
                    found[int(region.target.key)].setdefault(place, []).append(piece)
    return tuple(
        tuple((place, tuple(pieces)) for place, pieces in where.items()) for where in found
    )


def _within_local(copy: Copy, block: ShardBlock) -> Copy:
    offsets = block.local_box.offsets
    if not any(offsets):
        return copy
    start = tuple(s + o for s, o in zip(copy.start, offsets, strict=True))
    return Copy(copy.hf_start, start, copy.loops)


@dataclass(slots=True)
class _BucketFilling:
    tensors: list[StreamedTensor] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    nbytes: int = 0

    def done(self) -> Bucket:
        return Bucket(tuple(self.tensors), tuple(self.starts), self.nbytes)


def _filled(tensors: Iterable[StreamedTensor], limit_nbytes: int) -> list[Bucket]:
    buckets: list[Bucket] = []
    current = _BucketFilling()
    for tensor in tensors:
        start = aligned(current.nbytes)
        if current.tensors and start + tensor.nbytes > limit_nbytes:
            buckets.append(current.done())
            current, start = _BucketFilling(), 0
        current.tensors.append(tensor)
        current.starts.append(start)
        current.nbytes = start + tensor.nbytes
    if current.tensors:
        buckets.append(current.done())
    return buckets
