"""Slabs and tables of other processes: who may read them, and for how long."""

from __future__ import annotations

import gc
import os
import pickle
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from dcp_hf_writer.errors import SaveAbortedError
from dcp_hf_writer.staging.neighbour_slabs import NeighbourSlabs, SlabPlace
from dcp_hf_writer.staging.shared_table import read_table, shared_table
from dcp_hf_writer.staging.slab import Slab, SlabPool
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator


def held() -> Counter[str]:
    """Count the descriptors and mappings of memory files that this process has."""
    gc.collect()
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor that listed the directory
            continue
        found[target] += "memfd:" in target
    with open("/proc/self/maps") as maps:
        found["maps"] = sum("memfd:" in line for line in maps)
    return +found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = held()
    yield
    assert held() == before


def view(slabs: NeighbourSlabs, place: SlabPlace, count: int) -> torch.Tensor:
    return slabs.view(place, offset=64, dtype=torch.int64, extents=(count,), strides=(1,))


def test_views_show_the_memory_of_the_slab_and_are_unmapped_at_the_end() -> None:
    slab = Slab(4096)
    slab.tensor(64, torch.int64, (3,)).copy_(torch.tensor([5, 6, 7]))
    place, before = SlabPlace.of(slab), held()
    with NeighbourSlabs() as slabs:
        slabs.open([place, place])
        assert held() - before == Counter({"maps": 1, os.readlink(f"/proc/self/fd/{slab.fd}"): 1})
        assert view(slabs, place, 3).tolist() == [5, 6, 7]
    assert held() == before


def test_view_that_an_error_keeps_stays_readable_and_is_unmapped_with_it() -> None:
    slab = Slab(4096)
    slab.tensor(64, torch.int64, (1,)).fill_(9)
    before, slabs = held(), NeighbourSlabs()
    slabs.open([SlabPlace.of(slab)])
    kept = view(slabs, SlabPlace.of(slab), 1)
    slabs.close()
    slabs.close()
    assert kept.item() == 9
    del kept
    assert held() == before


@pytest.mark.parametrize(
    "changed",
    [{"slab_id": "0" * 32}, {"turn": 7}, {"nbytes": 8192}, {"fd": 10_000}, {"pid": 1 << 22}],
    ids=lambda changed: next(iter(changed)),
)
def test_something_else_in_the_place_of_a_slab_is_refused(changed: dict[str, Any]) -> None:
    slab = Slab(4096)
    before = held()
    with NeighbourSlabs() as slabs, pytest.raises(OSError, match=r"Stale|not the rank|No such"):
        slabs.open([replace(SlabPlace.of(slab), **changed)])
    assert held() == before


def test_slab_of_a_later_save_is_found_out() -> None:
    pool = SlabPool()
    lease = pool.acquire(100, what="step", deadline=0.0, before_growth=lambda: None)[0]
    place = SlabPlace.of(lease.slab)
    with NeighbourSlabs() as slabs:
        slabs.open([place])
        slabs.check_turns()
        lease.release()
        slabs.check_turns()
        again = pool.acquire(100, what="step", deadline=0.0, before_growth=lambda: None)[0]
        with pytest.raises(SaveAbortedError, match="filled for save 2"):
            slabs.check_turns()
        assert again.slab is lease.slab


def test_try_again_with_the_same_content_is_no_later_save() -> None:
    pool = SlabPool()
    lease = pool.acquire(100, what="step", deadline=0.0, before_growth=lambda: None)[0]
    turn = lease.slab.turn
    lease.release()
    assert pool.take_again(lease).slab.turn == turn == 1


def test_all_processes_that_map_a_slab_see_its_turn() -> None:
    slab = Slab(4096)
    slab.begin_turn()
    copy = Slab(slab.nbytes, fd=os.dup(slab.fd), slab_id=slab.slab_id)
    slab.begin_turn()
    assert (slab.turn, copy.turn) == (2, 2)


def test_table_can_be_read_while_it_is_shown() -> None:
    data = pickle.dumps(list(range(100_000)))
    with shared_table(data) as place:
        assert place is not None
        assert read_table(place) == data
    with pytest.raises(OSError, match=r"No such|not the rank"):
        read_table(place)


@pytest.mark.parametrize("data", [b"", b"short", b"Columns"], ids=["none", "short", "other"])
def test_other_bytes_in_the_place_of_a_table_are_refused(data: bytes) -> None:
    with shared_table(b"columns") as shown, shared_table(data) as other:
        assert shown is not None
        assert other is not None
        with pytest.raises(OSError, match="not the rank"):
            read_table(replace(shown, fd=other.fd))


def test_table_is_none_when_no_memory_file_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "refused")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with shared_table(b"columns") as place:
        assert place is None


def read_each_other(rank: int, world_size: int) -> list[int]:
    """Each rank reads the slabs and the tables of all ranks."""
    slab = Slab(4096)
    slab.tensor(64, torch.int64, (1,)).fill_(10 + rank)
    with shared_table(f"rank {rank}".encode()) as table, NeighbourSlabs() as slabs:
        told: list[Any] = [None] * world_size
        dist.all_gather_object(told, (SlabPlace.of(slab), table))
        slabs.open([place for place, _ in told])
        found = [int(view(slabs, place, 1).item()) for place, _ in told]
        tables = [read_table(one) for _, one in told]
        dist.barrier()
    assert tables == [f"rank {other}".encode() for other in range(world_size)]
    return found


def test_ranks_of_a_host_read_the_memory_of_each_other() -> None:
    assert run_ranks(read_each_other, 2) == [[10, 11], [10, 11]]
