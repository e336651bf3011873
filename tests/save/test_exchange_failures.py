"""Ranks that fail, die or fall silent while ranks write cells for each other."""

from __future__ import annotations

import errno
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer import WriteSlots
from dcp_hf_writer.errors import CheckpointError, ExportError, RankLostError, SlotTimeoutError
from dcp_hf_writer.plan.exchange_rounds import ExchangeMemory
from dcp_hf_writer.save import exchange_group, write_strategy
from support.faults import (
    AFTER_DEADLINE_S,
    BadCall,
    Case,
    Episodes,
    Outcome,
    Strike,
    check_episodes,
    check_outcomes,
    check_storage,
    hits,
    save,
)
from support.ranks import run_ranks, spawn_ranks

if TYPE_CHECKING:
    from pathlib import Path

WORLD_SIZE = 3
EXCHANGE: dict[str, Any] = {"strategy": "exchange"}
STOP_TIMEOUT_S = 4.0

pytestmark = pytest.mark.timeout(240)


def small_cells(patch: pytest.MonkeyPatch) -> None:
    """Make cells and rounds so small that a save has many of both."""
    memory = ExchangeMemory(512, 1024, open_cells=2, buffers=4, bounce_nbytes=512)
    patch.setattr(ExchangeMemory, "within", lambda *_, **__: memory)
    patch.setattr(write_strategy, "cell_nbytes_for", lambda *_: 512)


# A rank fails and lives on

CASES = {
    **{
        f"its own bytes on rank {rank}": Case(
            fault=Strike(rank=rank, point="mid exchange", action="raise"),
            kind=ExportError,
            words=("injected at mid exchange",),
            committed="dcp",
            options=EXCHANGE,
        )
        for rank in (0, 1)
    },
    "a write of rank 2": Case(
        fault=BadCall(rank=2, name="pwrite", errno=errno.ENOSPC, file="model*.safetensors"),
        kind=ExportError,
        words=("ENOSPC", "rank 2"),
        committed="dcp",
        options=EXCHANGE,
    ),
    "before the exchange on rank 1": Case(
        fault=Strike(rank=1, point="before slot", action="raise"),
        kind=CheckpointException,
        words=("injected at before slot",),
        options=EXCHANGE,
    ),
    "after the exchange on rank 1": Case(
        fault=Strike(rank=1, point="mid dcp", action="raise"),
        kind=CheckpointException,
        words=("injected at mid dcp",),
        options=EXCHANGE,
    ),
}


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Episodes:
    return Episodes(tmp_path_factory.mktemp("failing"), CASES, WORLD_SIZE)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_gets_the_error_at_once_when_one_fails(name: str, lives: Episodes) -> None:
    check_episodes(lives.root, name, CASES[name], lives.of(name))


# A rank is lost


def save_and_lose(
    rank: int, world_size: int, root: Path, strike: Strike, timeout_s: float
) -> tuple[Outcome, bool]:
    """Save once, then with a fault; return that outcome, and whether a group is kept."""
    with pytest.MonkeyPatch.context() as patch:
        small_cells(patch)
        check_outcomes([save(root, "step-1", 1, **EXCHANGE)], None)
        assert exchange_group.KEPT._kept
        with strike.installed(rank, root):
            struck = save(root, "step-2", 2, timeout_s=timeout_s, **EXCHANGE)
        return struck, bool(exchange_group.KEPT._kept)


@pytest.mark.parametrize("lost", [0, 1])
def test_survivors_are_told_at_once_when_a_rank_dies_in_the_exchange(
    lost: int, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    strike = Strike(rank=lost, point="mid exchange", action="kill", hit=2)
    with spawn_ranks(save_and_lose, WORLD_SIZE, root, strike, 30.0) as handle:
        outcomes = handle.outcomes(60)
    assert outcomes[lost].exitcode == -signal.SIGKILL
    survivors = [one.value for one in outcomes if one.rank != lost]
    told = [outcome for outcome, _ in survivors]
    check_outcomes(told, RankLostError, (f"rank {lost}", "step-2"), within_s=15)
    assert not any(is_kept for _, is_kept in survivors)
    check_storage(root, {"step-1": 1}, may_leave=lost == 0)


def test_survivors_are_told_by_the_deadline_when_a_rank_falls_silent_in_the_exchange(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    strike = Strike(rank=1, point="mid exchange", action="stop", hit=2)
    args = (root, strike, STOP_TIMEOUT_S)
    with spawn_ranks(save_and_lose, WORLD_SIZE, *args) as handle:
        limit_s = STOP_TIMEOUT_S + 2 * AFTER_DEADLINE_S
        for rank in (0, 2):
            handle._connections[rank].poll(limit_s + 60)
        handle.kill(1, signal.SIGCONT)
        outcomes = handle.outcomes(60)
    told = [outcomes[rank].value[0] for rank in (0, 2)]
    assert hits(root) == ["1 stop mid exchange"]
    words = ("rank 1", "step-2")
    check_outcomes(told, RankLostError, words, within_s=STOP_TIMEOUT_S + AFTER_DEADLINE_S)
    assert isinstance(outcomes[1].value[0].error, CheckpointError)
    check_storage(root, {"step-1": 1})


# The group


def save_five_times(rank: int, world_size: int, root: Path) -> tuple[list[str], int, int]:
    """Save again and again; return the names of the groups, and the counts of torch's groups."""
    names = []
    before = dist.distributed_c10d._world.group_count
    with pytest.MonkeyPatch.context() as patch:
        small_cells(patch)
        for number in range(1, 6):
            check_outcomes([save(root, f"step-{number}", number, **EXCHANGE)], None)
            (kept,) = exchange_group.KEPT._kept
            names.append(kept.name)
            if number == 3 and rank == 1:
                # This rank alone has no group any more, so all of them need a new one.
                exchange_group.KEPT._kept.clear()
    return names, before, dist.distributed_c10d._world.group_count


def test_saves_in_a_row_use_one_group_as_long_as_all_ranks_kept_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    found = run_ranks(save_five_times, WORLD_SIZE, root)
    names = found[0][0]
    assert all(one[0] == names for one in found)
    assert [len({*names[:3]}), len({*names[3:]}), len({*names})] == [1, 1, 2]
    assert all(before == after for _, before, after in found)
    check_storage(root, {f"step-{number}": number for number in range(1, 6)})


# Slots


def save_with_one_slot(rank: int, world_size: int, root: Path) -> Outcome:
    slots = WriteSlots(1, directory=f"{root}.slots")
    with pytest.MonkeyPatch.context() as patch:
        small_cells(patch)
        return save(root, "step-1", 1, slots=slots, **EXCHANGE)


def test_four_ranks_exchange_with_one_slot(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    check_outcomes(run_ranks(save_with_one_slot, 4, root), None)
    check_storage(root, {"step-1": 1})


def save_without_a_slot(rank: int, world_size: int, root: Path) -> Outcome:
    """Save while this rank alone finds no free slot."""
    slots = WriteSlots(1, directory=f"{root}.slots-{rank}", timeout_s=0.2)
    with pytest.MonkeyPatch.context() as patch:
        small_cells(patch)
        if rank == 1:
            with slots.hold(str(root), "dcp", deadline=0.0):
                return save(root, "step-1", 1, slots=slots, **EXCHANGE)
        return save(root, "step-1", 1, slots=slots, **EXCHANGE)


def test_every_rank_is_told_when_one_gets_no_slot_in_the_exchange(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    outcomes = run_ranks(save_without_a_slot, WORLD_SIZE, root)
    check_outcomes(outcomes, CheckpointError, within_s=15)
    assert isinstance(outcomes[1].error, SlotTimeoutError)
    check_storage(root, {})
