"""Plans of a stream, run by simulated ranks: random mappings, meshes, placements and buckets."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import HFExport, LoadSpec
from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.mapping.load_spec import Piece, ShardSpec
from dcp_hf_writer.plan.assign_hf_keys import RuntimeTensor
from dcp_hf_writer.plan.layout import plan_layout
from dcp_hf_writer.stream.buckets import LOCAL, Bucket, Chain, Held, fill_buckets, hf_tensors
from dcp_hf_writer.stream.local_shards import _cuts
from dcp_hf_writer.stream.plan_gathers import Gather, plan_steps, wire_dtype
from dcp_hf_writer.tensors.boxes import Box, whole
from dcp_hf_writer.tensors.shards import blocks_of, local_shape, shards_of
from dcp_hf_writer.tensors.strided_copies import hf_view, runtime_view

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from dcp_hf_writer.stream.plan_gathers import Move
    from dcp_hf_writer.tensors.boxes import Shape

# What the buffer and buckets hold before: an element that nobody fills must not go unseen.
UNFILLED = -1

# An example runs up to 27 ranks in turn.
SIMULATED = settings(deadline=None, max_examples=200)


@dataclass(frozen=True)
class Mesh:
    """A mesh of simulated ranks; its dimensions are process groups."""

    sizes: Shape
    first_group: int

    def coordinate(self, rank: int) -> Shape:
        found = []
        for size in reversed(self.sizes):
            found.append(rank % size)
            rank //= size
        return tuple(reversed(found))


@dataclass(frozen=True)
class Weight:
    """A runtime tensor: whole, and how simulated ranks hold it."""

    spec: LoadSpec
    full: torch.Tensor
    mesh: Mesh
    placements: tuple[Any, ...]

    @property
    def shape(self) -> Shape:
        return tuple(self.full.shape)

    def held(self, kept: int | None) -> Held:
        sizes = self.mesh.sizes
        dims = tuple(
            dim
            for dim, placement in enumerate(self.placements)
            if not placement.is_replicate() and sizes[dim] > 1 and dim != kept
        )
        groups = tuple(self.mesh.first_group + dim for dim in dims)
        stays = kept is not None and not self.placements[kept].is_replicate() and sizes[kept] > 1
        cuts = _cuts(self.placements, sizes, dims, kept if stays else None)
        chain = Chain(groups, tuple(sizes[dim] for dim in dims))
        return Held(self.spec.name, self.shape, self.full.dtype, chain, cuts)

    def local(self, rank: int) -> torch.Tensor:
        shards = shards_of(self.placements, self.mesh.sizes, self.mesh.coordinate(rank))
        return cut(self.full, shards)


def cut(full: torch.Tensor, shards: Sequence[ShardSpec]) -> torch.Tensor:
    local = torch.full(local_shape(tuple(full.shape), shards), UNFILLED, dtype=full.dtype)
    for block in blocks_of(tuple(full.shape), shards):
        part(local, block.local_box).copy_(part(full, block.global_box))
    return local


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    places = zip(box.offsets, box.sizes, strict=True)
    return tensor[tuple(slice(start, start + size) for start, size in places)]


def run_bucket(
    bucket: Bucket,
    places: Sequence[int],
    local: dict[str, torch.Tensor],
    results: dict[str, torch.Tensor],
    *,
    limit: int,
) -> Generator[tuple[Gather, torch.Tensor], None, None]:
    """Do what `_fill.Filler` does, and yield where it would call a collective."""
    tensors = [torch.full(one.shape, UNFILLED).to(one.dtype).contiguous() for one in bucket.tensors]
    steps = plan_steps(bucket, places=places, limit_nbytes=limit)
    for move in steps.moves:
        hf_view(tensors[move.number], move.copy).copy_(runtime_view(local[move.source], move.copy))
    for _, round_ in steps.rounds:
        buffer = torch.full((round_.nbytes,), 0xA5, dtype=torch.uint8)
        for move in round_.packs:
            vector = buffer.view(move.dtype)
            hf_view(vector, move.copy).copy_(runtime_view(local[move.source], move.copy))
        for gather in round_.gathers:
            yield gather, buffer
        for move in round_.unpacks:
            vector = buffer.view(move.dtype)
            hf_view(tensors[move.number], move.copy).copy_(runtime_view(vector, move.copy))
    results.update({one.key: t for one, t in zip(bucket.tensors, tensors, strict=True)})


class DeadlockError(Exception):
    """Simulated ranks wait for one another for ever."""


def run_all(streams: list[Any], members: dict[tuple[int, int], tuple[int, ...]]) -> int:
    """Run the ranks against one another; returns the number of collectives that rank 0 was in."""
    waiting: dict[int, tuple[Gather, torch.Tensor]] = {}
    done: set[int] = set()
    collectives = 0

    def advance(rank: int) -> None:
        try:
            waiting[rank] = next(streams[rank])
        except StopIteration:
            waiting.pop(rank, None)
            done.add(rank)

    for rank in range(len(streams)):
        advance(rank)
    while len(done) < len(streams):
        for rank in sorted(waiting):
            gather = waiting[rank][0]
            group = members[gather.group, rank]
            there = [waiting.get(other) for other in group]
            if all(one is not None and one[0].group == gather.group for one in there):
                collectives += 0 in group
                exchange([one for one in there if one is not None])
                for other in group:
                    advance(other)
                break
        else:
            raise DeadlockError({rank: gather for rank, (gather, _) in waiting.items()})
    return collectives


def exchange(there: Sequence[tuple[Gather, torch.Tensor]]) -> None:
    gathers = [gather for gather, _ in there]
    # Where it lies in the buffer may differ from rank to rank, what is sent may not.
    assert {tuple(n for _, n in gather.slots) for gather in gathers} == {
        tuple(n for _, n in gathers[0].slots)
    }
    assert {gather.is_even for gather in gathers} == {gathers[0].is_even}
    sent = [
        buffer[slice_of(gather.slots[member])].clone()
        for member, (gather, buffer) in enumerate(there)
    ]
    for gather, buffer in there:
        if gather.is_even:
            starts = [start for start, _ in gather.slots]
            nbytes = gather.slots[0][1]
            assert starts == [starts[0] + i * nbytes for i in range(len(starts))]
        for slot, data in zip(gather.slots, sent, strict=True):
            buffer[slice_of(slot)] = data


def slice_of(slot: tuple[int, int]) -> slice:
    return slice(slot[0], slot[0] + slot[1])


def groups_of(meshes: Sequence[Mesh], ranks: int) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return the members of each group, by number of the group and one of its ranks."""
    found = {}
    for mesh in meshes:
        at = {mesh.coordinate(rank): rank for rank in range(ranks)}
        for rank, dim in itertools.product(range(ranks), range(len(mesh.sizes))):
            own = mesh.coordinate(rank)
            row = tuple(at[(*own[:dim], i, *own[dim + 1 :])] for i in range(mesh.sizes[dim]))
            found[mesh.first_group + dim, rank] = row
    return found


@dataclass(frozen=True)
class Stream:
    """Weights on simulated ranks, how they are streamed, and what must come."""

    meshes: tuple[Mesh, ...]
    weights: tuple[Weight, ...]
    expected: dict[str, torch.Tensor]
    limit: int
    dtype: torch.dtype | None = None
    kept: int | None = None

    @property
    def ranks(self) -> int:
        return math.prod(self.meshes[0].sizes)

    def buckets_of(self, rank: int) -> list[Bucket]:
        tensors = [
            RuntimeTensor(w.spec.name, w.spec.name, w.shape, w.full.dtype, (whole(w.shape),))
            for w in self.weights
        ]
        export = HFExport(specs=[w.spec for w in self.weights], dtype=self.dtype)
        layout = plan_layout(tensors, export, tied=())
        held = [w.held(self.kept if w.mesh == self.meshes[0] else None) for w in self.weights]
        found = hf_tensors(held, layout.targets, preserve="kept")
        place = None if self.kept is None else self.meshes[0].coordinate(rank)[self.kept]
        return fill_buckets(found, place=place, limit_nbytes=self.limit)

    def places_of(self, rank: int) -> list[int]:
        return [index for mesh in self.meshes for index in mesh.coordinate(rank)]

    def run(self) -> tuple[list[list[Bucket]], list[dict[str, torch.Tensor]], int]:
        plans = [self.buckets_of(rank) for rank in range(self.ranks)]
        results: list[dict[str, torch.Tensor]] = [{} for _ in plans]

        def stream(rank: int) -> Generator[tuple[Gather, torch.Tensor], None, None]:
            local = {w.spec.name: w.local(rank) for w in self.weights}
            for bucket in plans[rank]:
                yield from run_bucket(
                    bucket, self.places_of(rank), local, results[rank], limit=self.limit
                )

        members = groups_of(self.meshes, self.ranks)
        count = run_all([stream(rank) for rank in range(self.ranks)], members)
        return plans, results, count


def numbers(shape: Shape, dtype: torch.dtype, first: int) -> torch.Tensor:
    """Return distinct elements, exact in any dtype for a few hundred of them."""
    return (torch.arange(math.prod(shape)) + first).remainder(251).reshape(shape).to(dtype)


@st.composite
def rearranged(draw: st.DrawFn, source: torch.Tensor) -> torch.Tensor:
    """View a part of a tensor in another order and shape."""
    view = source
    if view.ndim and draw(st.booleans()):
        dim = draw(st.integers(0, view.ndim - 1))
        factors = [n for n in range(1, view.shape[dim] + 1) if view.shape[dim] % n == 0]
        view = view.unflatten(dim, (draw(st.sampled_from(factors)), -1))
    return view.permute(draw(st.permutations(range(view.ndim)))) if view.ndim else view


def piece_of(key: str, shape: Shape, view: torch.Tensor, hf: torch.Tensor) -> Piece:
    """Say in loops that a view of a HuggingFace tensor equals one of a runtime tensor."""
    loops = tuple(zip(view.shape, hf.stride(), view.stride(), strict=True))
    return Piece(key, shape, loops, hf.storage_offset(), view.storage_offset())


@st.composite
def mapped(draw: st.DrawFn, name: str, first: int) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Map one or two runtime tensors of one shape to HuggingFace tensors.

    One is cut into parts along a dimension, some of them rearranged; of two, each pair of parts is
    one HuggingFace tensor, one after the other or interleaved.
    """
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    sources = [numbers(shape, dtype, first + 100 * i) for i in range(draw(st.integers(1, 2)))]
    dim = draw(st.integers(0, len(shape) - 1))
    borders = sorted(draw(st.sets(st.integers(1, shape[dim]), max_size=3)) | {shape[dim]})
    pieces: list[list[Piece]] = [[] for _ in sources]
    expected = {}
    start = 0
    for number, stop in enumerate(borders):
        key = f"{name}.{number}"
        parts = [one.narrow(dim, start, stop - start) for one in sources]
        if len(parts) == 1:
            view = draw(rearranged(parts[0]))
            hf = view.clone(memory_format=torch.contiguous_format)
            pieces[0].append(piece_of(key, tuple(hf.shape), view, hf))
        else:
            axis = draw(st.integers(0, 1))
            hf = torch.stack(parts, axis)
            for i, view in enumerate(parts):
                pieces[i].append(piece_of(key, tuple(hf.shape), view, hf.select(axis, i)))
        expected[key] = hf
        start = stop
    specs = [
        LoadSpec(f"{name}/{i}", global_shape=shape, pieces=some) for i, some in enumerate(pieces)
    ]
    return list(zip(specs, sources, strict=True)), expected


PLACEMENTS = ["replicate", "shard", "shard", "strided"]


@st.composite
def placements(draw: st.DrawFn, sizes: Shape, ndim: int) -> tuple[Any, ...]:
    found: list[Any] = []
    for _ in sizes:
        kind = draw(st.sampled_from(PLACEMENTS))
        dim = draw(st.integers(0, ndim - 1))
        if kind == "replicate":
            found.append(Replicate())
        elif kind == "shard":
            found.append(Shard(dim))
        else:
            found.append(_StridedShard(dim, split_factor=draw(st.integers(1, 3))))
    return tuple(found)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    meshes = (Mesh(sizes, 0), Mesh((math.prod(sizes),), len(sizes)))
    weights: list[Weight] = []
    expected: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(1, 3))):
        pairs, some = draw(mapped(f"w{number}", 17 * number))
        expected |= some
        for spec, full in pairs:
            mesh = draw(st.sampled_from(meshes))
            weights.append(Weight(spec, full, mesh, draw(placements(mesh.sizes, full.ndim))))
    limit = draw(st.sampled_from([20, 100, 300, 1000, 10_000]))
    dtype = draw(st.sampled_from([None, None, torch.bfloat16, torch.float32]))
    if dtype is not None:
        expected = {key: one.to(dtype) for key, one in expected.items()}
    return Stream(meshes, tuple(weights), expected, limit, dtype)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        assert found[key].dtype is want.dtype, key
        assert torch.equal(found[key], want), key


@SIMULATED
@given(streams())
def test_every_rank_gets_every_tensor(stream: Stream) -> None:
    _, results, _ = stream.run()
    for found in results:
        assert_equal(found, stream.expected)


@SIMULATED
@given(streams())
def test_buckets_are_alike_and_bounded(stream: Stream) -> None:
    plans = [stream.buckets_of(rank) for rank in range(stream.ranks)]
    first = plans[0]
    for plan in plans:
        assert [[one.key for one in bucket.tensors] for bucket in plan] == [
            [one.key for one in bucket.tensors] for bucket in first
        ]
    for bucket in first:
        assert len(bucket.tensors) == 1 or bucket.nbytes <= stream.limit
        stops = [s + one.nbytes for s, one in zip(bucket.starts, bucket.tensors, strict=True)]
        assert all(stop <= start for stop, start in itertools.pairwise(zip_flat(bucket, stops)))
        assert bucket.nbytes == stops[-1]


def zip_flat(bucket: Bucket, stops: Sequence[int]) -> list[int]:
    """Return where each tensor ends and the next one starts, in one ascending list."""
    return sorted([*bucket.starts[1:], *stops[:-1]])


@SIMULATED
@given(streams(), st.integers(0, 2))
def test_preserved_dimension_stays_or_is_refused_on_all_ranks(stream: Stream, dim: int) -> None:
    kept = dim % len(stream.meshes[0].sizes)
    stream = Stream(
        stream.meshes, stream.weights, stream.expected, stream.limit, stream.dtype, kept
    )
    refused = []
    for rank in range(stream.ranks):
        try:
            stream.buckets_of(rank)
        except SpecError as error:
            refused.append(str(error))
    if refused:
        assert len(refused) == stream.ranks
        assert len(set(refused)) == 1
        return
    plans, results, _ = stream.run()
    assert len({len(plan) for plan in plans}) == 1
    everything: dict[str, torch.Tensor] = {}
    for rank, found in enumerate(results):
        everything |= found
        assert_equal(found, {key: stream.expected[key] for key in found})
        for other, theirs in enumerate(results):
            own = stream.meshes[0].coordinate(rank)[kept]
            if own == stream.meshes[0].coordinate(other)[kept]:
                assert list(theirs) == list(found)
    assert_equal(everything, stream.expected)


def experts(count: int, rows: int, columns: int) -> tuple[LoadSpec, torch.Tensor]:
    """Return a stack of fused experts that come out as two tensors each."""
    full = numbers((count, 2 * rows, columns), torch.float32, 0)
    half = rows * columns
    spec = LoadSpec(
        "experts",
        global_shape=tuple(full.shape),
        pieces=[
            Piece(f"{e}.{part}", (rows, columns), ((half, 1, 1),), 0, (2 * e + i) * half)
            for e in range(count)
            for i, part in enumerate(("gate", "up"))
        ],
    )
    return spec, full


def expected_experts(full: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = full.shape[1] // 2
    return {
        f"{e}.{part}": full[e, i * rows : (i + 1) * rows]
        for e in range(len(full))
        for i, part in enumerate(("gate", "up"))
    }


@pytest.mark.parametrize("count", [8, 6, 5])
def test_each_place_keeps_its_experts_when_expert_parallelism_is_preserved(count: int) -> None:
    """As transformers shards them under FSDP and EP: no expert leaves its place."""
    spec, full = experts(count, 4, 5)
    mesh = Mesh((2, 4), 0)
    weight = Weight(spec, full, mesh, (_StridedShard(0, split_factor=4), Shard(0)))
    stream = Stream((mesh,), (weight,), expected_experts(full), 300, kept=1)
    plans, results, _ = stream.run()
    # A place with fewer experts gets as many buckets.
    assert len({len(plan) for plan in plans}) == 1
    a_place = -(-count // 4)
    for rank, found in enumerate(results):
        place = mesh.coordinate(rank)[1]
        kept = range(place * a_place, min((place + 1) * a_place, count))
        own = {f"{e}.{part}" for e in kept for part in ("gate", "up")}
        assert_equal(found, {key: stream.expected[key] for key in own})


def test_preserving_a_dimension_that_cuts_a_tensor_names_it() -> None:
    spec, full = experts(2, 4, 5)
    mesh = Mesh((2,), 0)
    stream = Stream((mesh,), (Weight(spec, full, mesh, (Shard(1),)),), {}, 300, kept=0)
    # The border of gate and up is that of the ranks.
    assert [one.key for bucket in stream.buckets_of(1) for one in bucket.tensors] == [
        "0.up",
        "1.up",
    ]
    mesh = Mesh((4,), 0)
    stream = Stream((mesh,), (Weight(spec, full, mesh, (Shard(1),)),), {}, 300, kept=0)
    with pytest.raises(SpecError, match="cuts through") as error:
        stream.buckets_of(0)
    assert (error.value.fqn, error.value.key) == ("experts", "0.gate")
    assert error.value.expected == "all of its elements at one index of 'kept'"
    assert error.value.found == "elements at index 0, index 1"


def only_round(stream: Stream, rank: int) -> Any:
    (bucket,) = stream.buckets_of(rank)
    steps = plan_steps(bucket, places=stream.places_of(rank), limit_nbytes=stream.limit)
    ((_, found),) = steps.rounds
    return found


def test_even_tensors_of_all_dtypes_come_by_one_collective_and_one_copy_each() -> None:
    mesh = Mesh((8,), 0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    weights = tuple(
        Weight(LoadSpec(f"w{i}", f"w{i}", (16, 4)), numbers((16, 4), dtype, i), mesh, (Shard(0),))
        for i, dtype in enumerate(dtypes)
    )
    stream = Stream((mesh,), weights, {w.spec.name: w.full for w in weights}, 10_000)
    found = only_round(stream, 3)
    assert [gather.is_even for gather in found.gathers] == [True]
    # Eight ranks' rows, and only one copy for each of the tensors.
    assert [move.source for move in found.unpacks] == ["w0", "w1", "w2", "w3"]
    assert found.nbytes == sum(w.full.nbytes for w in weights)
    assert stream.run()[2] == 1


def test_grid_of_shards_comes_by_one_collective_a_dimension_and_one_copy() -> None:
    mesh = Mesh((2, 4), 0)
    full = numbers((8, 8), torch.float32, 0)
    weight = Weight(LoadSpec("w", "w", (8, 8)), full, mesh, (Shard(0), Shard(1)))
    stream = Stream((mesh,), (weight,), {"w": full}, 10_000)
    found = only_round(stream, 5)
    # The outer dimension first: its links carry one part, not one for each inner rank.
    assert [gather.group for gather in found.gathers] == [0, 1]
    assert [gather.slots[0][1] for gather in found.gathers] == [32, 64]
    assert len(found.unpacks) == 1
    assert_equal(stream.run()[1][7], {"w": full})


def test_tensors_that_one_rank_holds_are_broadcast_without_padding() -> None:
    """Experts sharded by rows lie on one rank each: a padded gather would take all ranks' room."""
    spec, full = experts(8, 64, 256)
    mesh = Mesh((8,), 0)
    stream = Stream(
        (mesh,), (Weight(spec, full, mesh, (Shard(0),)),), expected_experts(full), 2 << 16
    )
    buckets = stream.buckets_of(0)
    assert [len(bucket.tensors) for bucket in buckets] == [2] * 8
    for bucket in buckets:
        steps = plan_steps(bucket, places=stream.places_of(0), limit_nbytes=stream.limit)
        ((_, found),) = steps.rounds
        assert found.nbytes == bucket.nbytes
        assert [n for _, n in found.gathers[0].slots if n] == [bucket.nbytes]


@SIMULATED
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(2, 4),
    st.sampled_from([100, 1000, 5000]),
)
def test_tensor_larger_than_a_bucket_comes_alone_in_rounds_of_a_bucket(
    rows: int, columns: int, ranks: int, limit: int
) -> None:
    mesh = Mesh((ranks,), 0)
    full = numbers((rows, columns), torch.float32, 0)
    small = numbers((3,), torch.float32, 0)
    weights = (
        Weight(LoadSpec("a", "a", (3,)), small, mesh, (Shard(0),)),
        Weight(LoadSpec("w", "w", (rows, columns)), full, mesh, (Shard(0),)),
        Weight(LoadSpec("z", "z", (3,)), small, mesh, (Shard(0),)),
    )
    stream = Stream((mesh,), weights, {"a": small, "w": full, "z": small}, limit)
    plans, results, _ = stream.run()
    assert_equal(results[-1], stream.expected)
    if full.nbytes <= limit:
        return
    (alone,) = [bucket for bucket in plans[0] if bucket.nbytes > limit]
    assert [one.key for one in alone.tensors] == ["w"]
    steps = plan_steps(alone, places=stream.places_of(0), limit_nbytes=limit)
    for _, found in steps.rounds:
        elements = sum(move.copy.numel for move in found.unpacks)
        # Each rank sends its share, and at least one element.
        assert elements * full.itemsize <= limit + ranks * full.itemsize
    assert sum(m.copy.numel for _, one in steps.rounds for m in one.unpacks) == full.numel()


def test_cast_that_widens_is_done_after_the_transfer() -> None:
    assert wire_dtype(torch.float32, torch.bfloat16) is torch.bfloat16
    assert wire_dtype(torch.bfloat16, torch.float32) is torch.bfloat16
    assert wire_dtype(torch.float16, torch.bfloat16) is torch.bfloat16
    mesh = Mesh((2,), 0)
    full = numbers((8, 64), torch.bfloat16, 0)
    weight = Weight(LoadSpec("w", "w", (8, 64)), full, mesh, (Shard(0),))
    wide = Stream((mesh,), (weight,), {"w": full.float()}, 10_000, torch.float32)
    assert only_round(wide, 0).nbytes == full.nbytes
    assert_equal(wide.run()[1][0], wide.expected)


def test_what_every_rank_holds_needs_no_collective() -> None:
    mesh = Mesh((2, 2), 0)
    full = numbers((4, 3), torch.float32, 0)
    weights = (
        Weight(LoadSpec("both", "both", (4, 3)), full, mesh, (Replicate(), Replicate())),
        Weight(LoadSpec("one", "one", (4, 3)), full, mesh, (Replicate(), Shard(0))),
    )
    stream = Stream((mesh,), weights, {"both": full, "one": full}, 10_000)
    _, results, count = stream.run()
    assert_equal(results[3], stream.expected)
    assert count == 1
    assert [move.source for move in moves_of(stream)] == ["both"]


def moves_of(stream: Stream) -> tuple[Move, ...]:
    (bucket,) = stream.buckets_of(0)
    return plan_steps(bucket, places=stream.places_of(0), limit_nbytes=stream.limit).moves


def test_tensor_without_elements_is_yielded() -> None:
    held = Held("none", (0, 5), torch.float32, LOCAL, (((),),))
    runtime = RuntimeTensor("none", "none", (0, 5), torch.float32, (whole((0, 5)),))
    layout = plan_layout([runtime], HFExport(), tied=())
    tensors = hf_tensors([held], layout.targets, preserve=None)
    (bucket,) = fill_buckets(tensors, place=None, limit_nbytes=10)
    assert [(one.key, one.shape, one.nbytes) for one in bucket.tensors] == [("none", (0, 5), 0)]
    assert plan_steps(bucket, places=[], limit_nbytes=10).rounds == ()


def test_simulation_finds_deadlocks() -> None:
    members = {(0, 0): (0, 1), (0, 1): (0, 1), (1, 0): (0, 1), (1, 1): (0, 1)}
    buffer = torch.zeros(2, dtype=torch.uint8)
    one, other = (Gather(group, ((0, 1), (1, 1))) for group in (0, 1))
    streams = [iter([(one, buffer), (other, buffer)]), iter([(other, buffer), (one, buffer)])]
    with pytest.raises(DeadlockError):
        run_all(streams, members)
