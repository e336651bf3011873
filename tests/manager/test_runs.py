"""A run on several ranks: cadence, retention, callbacks, and what each rank gets back."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from dcp_hf_writer import CheckpointManager, LastStep, verify
from dcp_hf_writer.errors import (
    CallbackError,
    ConfigError,
    CorruptCheckpointError,
    MismatchError,
    StorageError,
)
from support.managed_runs import Seen, managed, report_steps, state_at
from support.named_bytes import sharded_state
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def run_ten(rank: int, world_size: int, root: Path) -> Seen:
    seen = Seen()
    options = {"save_every": 2, "export_every": 4, "keep_last": 2, "keep_every": 8}
    with managed(root, seen, **options, export_keep_last=1, on_failure="warn") as manager:
        report_steps(manager, seen, range(1, 11))
        # Rank 0 alone deletes steps. The others must not look before it has done so.
        dist.barrier()
    return seen


def test_run_saves_exports_and_keeps_what_it_should(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for seen in run_ranks(run_ten, 2, root):
        assert seen.raised == {}
        assert (seen.saved, seen.exported) == ([2, 4, 6, 8, 10], [4, 8])
        assert (seen.steps, seen.latest) == ([8, 10], 10)
    for step in (8, 10):
        assert verify(root / f"step-{step}").ok
    assert (root / "hf-latest").resolve() == root / "step-8" / "hf"
    assert (root / "latest").resolve() == root / "step-10"


def run_by_the_clock(rank: int, world_size: int, root: Path) -> Seen:
    """Train without collectives, one rank at a third of the speed of the other."""
    seen = Seen()
    begun: list[int] = []
    with managed(root, seen, save_every=timedelta(seconds=0.7), export=None) as manager:
        for step in range(1, 2000):
            if manager.step(step, lambda: state_at(step)):  # noqa: B023
                begun.append(step)
            if len(begun) == 3:
                break
            time.sleep(0.01 if rank == 0 else 0.02)
    seen.values["begun"] = begun
    return seen


def test_clock_saves_the_same_steps_on_ranks_of_different_speed(tmp_path: Path) -> None:
    fast, slow = run_ranks(run_by_the_clock, 2, tmp_path / "run")
    assert fast.values["begun"] == slow.values["begun"] == fast.saved
    assert fast.raised == slow.raised == {}
    assert fast.saved


class Loader:
    """Stands for a dataloader: it counts what it gave."""

    def __init__(self, rank: int) -> None:
        self.rank, self.count = rank, 0

    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "count": self.count, "ids": torch.arange(self.rank + 2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rank, self.count = state["rank"], state["count"]


def save_with_objects(rank: int, world_size: int, root: Path) -> float:
    loader = Loader(rank)
    loader.count = 100 + rank
    torch.manual_seed(rank)
    with CheckpointManager(
        root, rank_state={"dataloader": loader}, trainer_state={"tokens": 12}, save_every=1
    ) as manager:
        manager.step(1, sharded_state(1))
    return float(torch.rand(1))


def restore_objects(
    rank: int, world_size: int, root: Path, how: str
) -> tuple[Any, Any, Any, Any, float]:
    loader = Loader(-1)
    options: dict[str, Any] = {
        "plain": {},
        "merge": {"merge": {"dataloader": merged}},
        "without": {"load_dataset": False},
    }[how]
    with CheckpointManager(root, rank_state={"dataloader": loader}) as manager:
        start = manager.restore(sharded_state(0), **options)
        assert manager.restored is not None
        run = dict(manager.restored.trainer_state)
    return start, run, loader.rank, loader.count, float(torch.rand(1))


def merged(states: Sequence[Any], rank: int, world_size: int) -> dict[str, Any]:
    return {"rank": rank, "count": sum(state["count"] for state in states) // world_size}


def test_every_rank_gets_its_own_objects_back(tmp_path: Path) -> None:
    drawn = run_ranks(save_with_objects, 2, tmp_path / "run")
    found = run_ranks(restore_objects, 2, tmp_path / "run", "plain")
    assert found == [(1, {"tokens": 12}, rank, 100 + rank, drawn[rank]) for rank in (0, 1)]


def test_other_number_of_ranks_needs_a_function_or_a_choice(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_ranks(save_with_objects, 2, root)
    with pytest.raises(ConfigError, match="number of ranks has changed") as caught:
        run_ranks(restore_objects, 3, root, "plain")
    assert "merge={'dataloader': function}" in str(caught.value)
    found = run_ranks(restore_objects, 3, root, "merge")
    assert [one[:4] for one in found] == [(1, {"tokens": 12}, rank, 67) for rank in range(3)]
    found = run_ranks(restore_objects, 1, root, "without")
    assert [one[:4] for one in found] == [(1, {"tokens": 12}, -1, 0)]


def break_a_callback(rank: int, world_size: int, root: Path) -> Seen:
    seen = Seen()

    def bad(step: int, path: str, report: Any) -> None:
        msg = f"no disk for step {step}"
        raise ValueError(msg)

    with managed(root, seen, save_every=1, on_saved=bad if rank == 1 else None) as manager:
        report_steps(manager, seen, [1, 2])
    return seen


def test_error_of_a_callback_comes_up_and_the_checkpoint_stays(tmp_path: Path) -> None:
    quiet, loud = run_ranks(break_a_callback, 2, tmp_path / "run")
    assert quiet.raised == {}
    assert loud.errors() == {1: CallbackError, 2: CallbackError}
    assert "no disk for step 1" in str(loud.raised[1].error)
    assert quiet.steps == loud.steps == [1, 2]


def restore_after(rank: int, world_size: int, root: Path, what: str) -> tuple[Any, ...]:
    with CheckpointManager(root) as manager:
        state = sharded_state(0)
        if what == "misfit":
            state["model"]["more"] = torch.zeros(3)
        start = manager.restore(state)
        return start, manager.restored


def save_three(rank: int, world_size: int, root: Path) -> None:
    with CheckpointManager(root, save_every=1, save_rng=False) as manager:
        for step in (1, 2, 3):
            manager.step(step, sharded_state(step))


def test_damaged_newest_is_passed_over_and_all_damaged_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_ranks(save_three, 2, root)
    (root / "step-3" / ".metadata").write_bytes(b"")
    # Right size, wrong content: only the load itself can tell.
    data = root / "step-2" / "__1_0.distcp"
    data.write_bytes(bytes(data.stat().st_size))
    for start, restored in run_ranks(restore_after, 2, root, "plain"):
        assert start == 1
        assert [text.partition(":")[0] for text in restored.skipped] == [
            str(root / "step-3"),
            str(root / "step-2"),
        ]
    (root / "step-1" / "dcp-hf.json").write_bytes(b"{}")
    with pytest.raises(CorruptCheckpointError, match="no checkpoint of the run can be loaded"):
        run_ranks(restore_after, 2, root, "plain")


def test_state_dict_that_does_not_fit_is_an_error_and_no_reason_to_go_back(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    run_ranks(save_three, 2, root)
    with pytest.raises(MismatchError, match="more"):
        run_ranks(restore_after, 2, root, "misfit")


def make_with_paths(rank: int, world_size: int, root: Path) -> None:
    CheckpointManager(root / f"of-rank-{rank}", timeout_s=20)


def test_ranks_with_different_directories_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="do not see the directory of the run"):
        run_ranks(make_with_paths, 2, tmp_path)


def close_with_last(rank: int, world_size: int, root: Path) -> list[int]:
    with CheckpointManager(root, save_every=LastStep()) as manager:
        for step in range(1, 6):
            manager.step(step, lambda: sharded_state(step))  # noqa: B023
        assert manager.steps() == []
    return CheckpointManager(root).steps()


def test_last_step_is_saved_when_the_manager_closes(tmp_path: Path) -> None:
    assert run_ranks(close_with_last, 2, tmp_path / "run") == [[5], [5]]
