"""Cells and their owners: each byte arrives once, in its cell, and no page has two writers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer.errors import CoverageError
from dcp_hf_writer.plan.cells import ExchangedFile, Grid, cell_owners
from dcp_hf_writer.plan.exchange_rounds import ExchangeMemory, Travel, plan_rounds
from dcp_hf_writer.plan.slice_cuts import (
    cuts_by_slice,
    decode_pieces,
    encode_pieces,
    pieces_of_owners,
)
from dcp_hf_writer.tensors.boxes import Box, ByteRuns
from support.exchanges import HeldFiles, cut_among, held_files, offsets_of

if TYPE_CHECKING:
    import numpy.typing as npt

FEW = settings(max_examples=30, deadline=None)
ORDERS = st.sampled_from(["any order", "in order"])


def files_of(held: HeldFiles, *, cell_nbytes: int, in_order: bool = False) -> list[ExchangedFile]:
    return [
        ExchangedFile(f"model-{number}", nbytes, cell_nbytes, in_order)
        for number, nbytes in enumerate(held.sizes)
    ]


def planned(
    held: HeldFiles, memory: ExchangeMemory, *, cell_nbytes: int, in_order: bool = False
) -> tuple[Grid, Travel]:
    files = files_of(held, cell_nbytes=cell_nbytes, in_order=in_order)
    grid = Grid(files, slice_nbytes=memory.slice_nbytes)
    shares = [grid.shares_of(pieces) for pieces in held.held]
    grid.check_whole(shares)
    return grid, Travel(grid, cell_owners(grid, shares), shares)


@st.composite
def memories(draw: st.DrawFn) -> ExchangeMemory:
    slice_nbytes = draw(st.integers(5, 40))
    return ExchangeMemory(
        slice_nbytes=slice_nbytes,
        travelling_nbytes=slice_nbytes + draw(st.integers(0, 100)),
        open_cells=draw(st.integers(1, 3)),
        buffers=4,
        bounce_nbytes=64,
    )


@FEW
@given(held_files(), memories(), st.integers(10, 100), ORDERS)
def test_each_byte_arrives_once_at_the_owner_of_its_cell(
    held: HeldFiles, memory: ExchangeMemory, cell_nbytes: int, order: str
) -> None:
    grid, travel = planned(held, memory, cell_nbytes=cell_nbytes, in_order=order == "in order")
    found = [np.zeros(nbytes, np.int64) for nbytes in held.sizes]
    cuts = [cuts_by_slice(grid, pieces) for pieces in held.held]
    for number in (one for slices in plan_rounds(grid, travel, memory) for one in slices):
        file, low, high = int(grid.file[number]), grid.start[number], grid.stop[number]
        for rank, pieces in enumerate(held.held):
            for cut in cuts[rank].get(number, ()):
                of_file, runs = pieces[cut.piece]
                offsets = offsets_of(runs)[cut.first : cut.stop]
                assert of_file == file
                assert low <= offsets.min()
                assert offsets.max() < high
                found[file][offsets] += held.content(file)[offsets]
    for file, content in enumerate(found):
        assert content.tolist() == held.content(file).tolist()


@FEW
@given(held_files(), memories(), st.integers(10, 100), ORDERS)
def test_a_round_keeps_its_limits_and_the_order_of_each_file(
    held: HeldFiles, memory: ExchangeMemory, cell_nbytes: int, order: str
) -> None:
    grid, travel = planned(held, memory, cell_nbytes=cell_nbytes, in_order=order == "in order")
    seen: list[int] = []
    incomplete: dict[int, int] = {}
    for slices in plan_rounds(grid, travel, memory):
        assert slices == sorted(slices)
        sent, received = Counter[int](), Counter[int]()
        touched = dict(incomplete)
        for number in slices:
            owner = int(travel.owner[number])
            ranks, nbytes = travel.sent(number)
            for rank, size in zip(ranks.tolist(), nbytes.tolist(), strict=True):
                sent[rank] += size
                received[owner] += size
            touched[int(grid.cell[number])] = owner
            incomplete[int(grid.cell[number])] = owner
            if grid.is_last_of_cell(number):
                del incomplete[int(grid.cell[number])]
        most = max([*sent.values(), *received.values()], default=0)
        assert most <= memory.travelling_nbytes
        assert max(Counter(touched.values()).values()) <= memory.open_cells
        seen += slices
    assert sorted(seen) == list(range(len(grid.start)))
    for file in range(len(held.sizes)):
        of_file = [number for number in seen if grid.file[number] == file]
        assert of_file == sorted(of_file)


@FEW
@given(held_files(), st.integers(10, 100), ORDERS)
def test_owners_share_the_bytes(held: HeldFiles, cell_nbytes: int, order: str) -> None:
    files = files_of(held, cell_nbytes=cell_nbytes, in_order=order == "in order")
    grid = Grid(files, slice_nbytes=7)
    shares = [grid.shares_of(pieces) for pieces in held.held]
    owners = cell_owners(grid, shares)
    owned = np.zeros(len(shares), np.int64)
    np.add.at(owned, owners[grid.cell], grid.stop - grid.start)
    largest = max(held.sizes) if order == "in order" else cell_nbytes
    assert owned.max() <= 1.25 * sum(held.sizes) / len(shares) + largest
    if order == "in order":
        for file in range(len(files)):
            assert len(set(owners[grid.cell[grid.file == file]].tolist())) <= 1


@FEW
@given(held_files(), st.integers(1, 100))
def test_an_owner_learns_the_cuts_that_the_sender_makes(held: HeldFiles, cell_nbytes: int) -> None:
    grid = Grid(files_of(held, cell_nbytes=cell_nbytes), slice_nbytes=7)
    shares = [grid.shares_of(pieces) for pieces in held.held]
    owner = cell_owners(grid, shares)[grid.cell]
    for pieces in held.held:
        sent = pieces_of_owners(grid, owner, pieces, world_size=len(shares))
        own = cuts_by_slice(grid, pieces)
        for rank, told in enumerate(sent):
            known = decode_pieces(encode_pieces(told))
            assert known == told
            cuts = cuts_by_slice(grid, known)
            for number in np.flatnonzero(owner == rank).tolist():
                assert [
                    (known[cut.piece], cut.first, cut.stop) for cut in cuts.get(number, ())
                ] == [(pieces[cut.piece], cut.first, cut.stop) for cut in own.get(number, ())]


def test_a_cell_goes_to_the_rank_with_most_of_its_bytes() -> None:
    rows = cut_among([((64, 100), 1)], [[Box((0, 0), (32, 100)), Box((32, 0), (32, 100))]])
    grid = Grid(files_of(rows, cell_nbytes=100), slice_nbytes=100)
    owners = cell_owners(grid, [grid.shares_of(pieces) for pieces in rows.held])
    assert owners.tolist() == [0] * 33 + [1] * 32


def test_ranks_with_equal_parts_of_each_cell_take_turns() -> None:
    columns = cut_among([((64, 100), 1)], [[Box((0, 0), (64, 50)), Box((0, 50), (64, 50))]])
    grid = Grid(files_of(columns, cell_nbytes=200), slice_nbytes=200)
    owners = cell_owners(grid, [grid.shares_of(pieces) for pieces in columns.held])
    longest = max(
        len(run)
        for run in "".join(map(str, owners.tolist()))
        .replace("01", "0 1")
        .replace("10", "1 0")
        .split()
    )
    assert longest <= 2


def test_files_with_one_owner_each_are_spread_when_one_rank_holds_everything() -> None:
    held = [[(file, ByteRuns(0, 1000, ())) for file in range(4)], [], [], []]
    files = files_of(HeldFiles([1000] * 4, held), cell_nbytes=100, in_order=True)
    grid = Grid(files, slice_nbytes=100)
    owners = cell_owners(grid, [grid.shares_of(pieces) for pieces in held])
    assert sorted(owners[::10].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "pieces", [[ByteRuns(0, 9, ())], [ByteRuns(0, 10, ()), ByteRuns(4, 1, ())]]
)
def test_bytes_that_no_rank_or_two_ranks_hold_are_refused(pieces: list[ByteRuns]) -> None:
    grid = Grid([ExchangedFile("model", 10, 4, in_order=False)], slice_nbytes=2)
    shares = [grid.shares_of([(0, runs)]) for runs in pieces]
    with pytest.raises(CoverageError, match=r"model.*2 bytes in \["):
        grid.check_whole(shares)


# F19: two page caches over one file system


def written_back(
    writes: list[list[npt.NDArray[np.int64]]],
    content: npt.NDArray[np.uint8],
    *,
    page_nbytes: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.uint8]:
    """Return the file after each rank's page cache wrote back whole pages, in random order.

    Args:
        writes: By rank, the offsets that it writes, as arrays.
        content: What belongs into the file.
        page_nbytes: Unit in which a cache writes back. It holds zeros where it wrote nothing.
        rng: Gives the order.
    """
    pages = []
    for of_rank in writes:
        cache: dict[int, npt.NDArray[np.uint8]] = {}
        for offsets in of_rank:
            for page in np.unique(offsets // page_nbytes).tolist():
                memory = cache.setdefault(page, np.zeros(page_nbytes, np.uint8))
                within = offsets[offsets // page_nbytes == page]
                memory[within - page * page_nbytes] = content[within]
        pages += list(cache.items())
    found = np.zeros(-(-len(content) // page_nbytes) * page_nbytes, np.uint8)
    for i in rng.permutation(len(pages)):
        page, memory = pages[i]
        found[page * page_nbytes : (page + 1) * page_nbytes] = memory
    return found[: len(content)]


F19_TENSORS = [((700, 1000), 2), ((333, 3), 4), ((5,), 8), ((1500, 1000), 2)]


@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("cell_nbytes", [4 << 10, 64 << 10, 2 << 20])
def test_page_caches_of_several_hosts_damage_a_file_only_without_exchange(
    cell_nbytes: int, kind: str
) -> None:
    held = cut_among(F19_TENSORS, [halves(shape, kind) for shape, _ in F19_TENSORS])
    content = held.content(0).astype(np.uint8)
    rng = np.random.default_rng(cell_nbytes)
    direct = [[offsets_of(runs) for _, runs in pieces] for pieces in held.held]
    # A page that two ranks write loses the bytes of one of them, whatever the order.
    damaged = written_back(direct, content, page_nbytes=cell_nbytes, rng=rng)
    assert not np.array_equal(damaged, content)

    memory = ExchangeMemory.within(16 << 20, largest_cell=cell_nbytes)
    grid, travel = planned(held, memory, cell_nbytes=cell_nbytes)
    exchanged: list[list[npt.NDArray[np.int64]]] = [[], []]
    for slices in plan_rounds(grid, travel, memory):
        for number in slices:
            exchanged[int(travel.owner[number])].append(
                np.arange(grid.start[number], grid.stop[number])
            )
    for _ in range(3):
        found = written_back(exchanged, content, page_nbytes=cell_nbytes, rng=rng)
        assert np.array_equal(found, content)


def halves(shape: tuple[int, ...], kind: str) -> list[Box]:
    dim = 1 if kind == "columns" and len(shape) > 1 else 0
    half = shape[dim] // 2
    first = tuple(half if d == dim else n for d, n in enumerate(shape))
    rest = tuple(n - half if d == dim else n for d, n in enumerate(shape))
    return [
        Box((0,) * len(shape), first),
        Box(tuple(half if d == dim else 0 for d in range(len(shape))), rest),
    ]


@FEW
@given(st.integers(1, 1 << 32), st.integers(1, 1 << 30))
def test_memory_stays_within_the_budget(budget: int, cell: int) -> None:
    memory = ExchangeMemory.within(budget, largest_cell=cell)
    assert memory.slice_nbytes <= memory.travelling_nbytes
    assert 1 <= memory.open_cells <= memory.buffers
    if budget >= max(4 * cell, 1024):
        used = memory.buffers * cell + 2 * memory.travelling_nbytes + memory.bounce_nbytes
        assert used <= budget
        assert memory.buffers >= 3
