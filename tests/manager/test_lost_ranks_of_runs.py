"""A rank of a run is killed or stopped during a save: who learns it, and what the run can do."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.errors import RankLostError, SaveTimeoutError
from dcp_hf_writer.manager import agree_on_outcome
from support.faults import Strike, hits
from support.managed_runs import Seen, managed, report_steps, run_with_faults
from support.ranks import run_ranks, spawn_ranks

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 6.0
OPTIONS = {"save_every": 1, "timeout_s": TIMEOUT_S}


@pytest.mark.parametrize("point", ["local plan", "mid dcp", "before report"])
def test_rank_that_is_killed_is_named_and_the_step_before_stays(tmp_path: Path, point: str) -> None:
    root = tmp_path / "run"
    strike = Strike(rank=1, point=point, action="kill")
    with spawn_ranks(run_with_faults, 2, root, [1, 2], {2: strike}, OPTIONS) as handle:
        survivor = handle.outcomes()[0].value
    assert survivor.errors()[2] is RankLostError
    assert "rank" in str(survivor.raised[2].error)
    assert (survivor.steps, survivor.latest) == ([1], 1)
    assert hits(root) == [f"1 kill {point}"]


def test_coordinator_that_is_killed_is_named(tmp_path: Path) -> None:
    root = tmp_path / "run"
    strike = Strike(rank=0, point="before manifest", action="kill")
    with spawn_ranks(run_with_faults, 2, root, [1, 2], {2: strike}, OPTIONS) as handle:
        survivor = handle.outcomes()[1].value
    assert survivor.errors()[2] is RankLostError
    assert survivor.steps == [1]


def run_with_a_pause(rank: int, world_size: int, root: Path) -> Seen:
    """Report three steps; rank 1 is stopped in the second, past its deadline, and goes on."""
    seen = Seen()
    with managed(root, seen, **OPTIONS) as manager:
        report_steps(manager, seen, [1])
        if rank == 1:
            pid, child = os.getpid(), os.fork()
            if child == 0:
                time.sleep(TIMEOUT_S + 3)
                os.kill(pid, signal.SIGCONT)
                os._exit(0)
            strike = Strike(rank=1, point="mid dcp", action="stop")
            with strike.installed(rank, root):
                report_steps(manager, seen, [2])
            os.waitpid(child, 0)
        else:
            report_steps(manager, seen, [2])
        report_steps(manager, seen, [3])
        manager.wait()
    return seen


def test_rank_that_comes_back_saves_again_in_a_new_group(tmp_path: Path) -> None:
    root = tmp_path / "run"
    found = run_ranks(run_with_a_pause, 2, root, timeout_s=110)
    assert hits(root) == ["1 stop mid dcp"]
    for seen in found:
        assert issubclass(seen.errors()[2], SaveTimeoutError)
        assert set(seen.raised) == {2}
        assert (seen.steps, seen.latest) == ([1, 3], 3)


def test_errors_of_a_broken_collective_break_the_group() -> None:
    assert agree_on_outcome.breaks_group(RuntimeError("connection closed by peer"))
    assert agree_on_outcome.breaks_group(RankLostError("gone"))
    assert not agree_on_outcome.breaks_group(None)
