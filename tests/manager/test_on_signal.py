"""Signals: a last save on all ranks within a budget, and what happens when it does not fit."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer import CheckpointManager, OnSignal
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.failpoints import set_hook
from support.managed_runs import state_at
from support.processes import FreshProcess
from support.ranks import spawn_ranks

if TYPE_CHECKING:
    from pathlib import Path


def train(rank: int, world_size: int, root: Path, options: dict[str, Any]) -> tuple[Any, ...]:
    """Train until a signal ends the run; each rank has a speed of its own."""
    code = None
    with CheckpointManager(root, on_signal=OnSignal(**options), timeout_s=30) as manager:
        (root / f"ready-{rank}").touch()
        try:
            for step in range(1, 2000):
                manager.step(step, lambda: state_at(step))  # noqa: B023
                time.sleep(0.01 * (rank + 1))
        except SystemExit as stop:
            code = stop.code
        steps = manager.steps()
    return code, steps


def wait_for(root: Path, ranks: int) -> None:
    until = time.monotonic() + 60
    while not all((root / f"ready-{rank}").exists() for rank in range(ranks)):
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)


def test_stop_signal_to_one_rank_saves_the_same_step_on_all_and_ends_them(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    with spawn_ranks(train, 2, root, {"grace_s": 60}) as handle:
        wait_for(root, 2)
        handle.kill(1, signal.SIGTERM)
        first, second = handle.results()
    assert first == second
    code, steps = first
    assert code == 128 + signal.SIGTERM
    assert len(steps) == 1


def test_save_signal_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    options = {"save": (signal.SIGUSR2,)}
    with spawn_ranks(train, 2, root, options) as handle:
        wait_for(root, 2)
        handle.kill(0, signal.SIGUSR2)
        until = time.monotonic() + 60
        while not list(root.glob("step-*")):
            assert time.monotonic() < until
            time.sleep(0.05)
        handle.kill(1, signal.SIGTERM)
        found = handle.results()
    assert [code for code, _ in found] == [143, 143]
    assert len(found[0][1]) == 2


def stuck(root: Path) -> None:
    """Take the signal while a save hangs, and never end by itself."""
    manager = CheckpointManager(root, on_signal=OnSignal(grace_s=0.5))
    set_hook(lambda point: time.sleep(60) if point == "before manifest" else None)
    manager.save(1, state_at(1))
    (root / "ready-0").touch()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_process_ends_when_the_budget_is_used_up_and_nothing_is_visible(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    with FreshProcess(stuck, root) as process:
        assert process.exitcode() == 128 + signal.SIGTERM
    assert time.time() - (root / "ready-0").stat().st_mtime < 30
    assert CheckpointManager(root).latest() is None


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    manager = CheckpointManager(tmp_path, on_signal=OnSignal())
    assert signal.getsignal(signal.SIGTERM) is not before
    manager.close()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "options",
    [
        {"stop": (signal.SIGKILL,)},
        {"stop": (signal.SIGTERM,), "save": (signal.SIGTERM,)},
        {"grace_s": 0},
    ],
)
def test_signals_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OnSignal(**options)
