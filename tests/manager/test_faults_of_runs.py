"""Faults of the catalogue in a managed run: exits, other jobs, deletions that fail, lost ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from dcp_hf_writer import CheckpointManager, verify
from dcp_hf_writer.errors import RankLostError
from support.faults import Strike, hits
from support.managed_runs import Seen, managed, report_steps, state_at
from support.named_bytes import save_held_by
from support.processes import FreshProcess
from support.ranks import run_ranks, spawn_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MONTH_S = 30 * 24 * 3600
LIMIT_S = 60.0


def wait_until(is_there: Any) -> None:
    until = time.monotonic() + LIMIT_S
    while not is_there():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


# P5: the process ends, or is told to, with a save in flight


def end_without_close(root: Path, how: str) -> None:
    manager = CheckpointManager(root, save_every=1, timeout_s=LIMIT_S)
    Strike(rank=0, point="mid dcp", action="delay", seconds=0.5).install(root)
    if how == "return":
        manager.step(1, state_at(1))
        return
    with pytest.raises(KeyboardInterrupt):
        train_until_interrupted(manager)


def train_until_interrupted(manager: CheckpointManager) -> None:
    with manager:
        manager.step(1, state_at(1))
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["return", "interrupt"])
def test_save_in_flight_is_committed_when_the_process_ends(tmp_path: Path, how: str) -> None:
    root = tmp_path / "run"
    with FreshProcess(end_without_close, root, how) as process:
        process.result()
        assert process.exitcode() == 0
    assert hits(root) == ["0 delay mid dcp"]
    assert save_held_by(root / "step-1", has_export=False) == 1
    assert os.readlink(root / "latest") == "step-1"


# P12: a restart with another number of ranks, after a rank or the coordinator was killed


def save_and_die(rank: int, world_size: int, root: Path, strike: Strike) -> None:
    seen = Seen()
    with managed(root, seen, save_every=1) as manager:
        report_steps(manager, seen, [1])
        with strike.installed(rank, root):
            report_steps(manager, seen, [2])
    os._exit(1)


def resume_and_save(rank: int, world_size: int, root: Path, expected: int) -> Seen:
    seen = Seen()
    with managed(root, seen, save_every=1) as manager:
        loaded = state_at(6)
        assert manager.restore(loaded) == expected
        wanted = state_at(expected)["model"]
        for name, tensor in loaded["model"].items():
            mine, theirs = (getattr(one, "_local_tensor", one) for one in (tensor, wanted[name]))
            assert torch.equal(mine, theirs), name
        report_steps(manager, seen, [2, 3])
    return seen


@pytest.mark.parametrize(
    ("victim", "point", "world_size"), [(1, "mid dcp", 3), (0, "before manifest", 1)]
)
def test_run_goes_on_with_another_number_of_ranks_when_one_was_killed(
    tmp_path: Path, victim: int, point: str, world_size: int
) -> None:
    root = tmp_path / "run"
    strike = Strike(rank=victim, point=point, action="kill")
    with spawn_ranks(save_and_die, 2, root, strike) as handle:
        wait_until(lambda: hits(root))
        # As a launcher does: it ends all ranks when one has died.
        handle.outcomes(grace_s=0.0)
    found = run_ranks(resume_and_save, world_size, root, 1)
    assert [(seen.errors(), seen.steps) for seen in found] == [({}, [1, 2, 3])] * world_size
    assert [save_held_by(root / f"step-{step}") for step in (1, 2, 3)] == [1, 2, 3]
    assert not list(root.glob(".incomplete*"))


# R2: a deletion fails


@contextmanager
def immutable(path: Path, root: Path) -> Iterator[None]:
    """Let the kernel refuse every change of a file or a directory below `root`, also to root."""
    inode = path.stat().st_ino
    subprocess.run(["chattr", "+i", str(path)], check=True)
    try:
        yield
    finally:
        # A directory above it may have another name by now.
        (now,) = (one for one in root.rglob("*") if one.lstat().st_ino == inode)
        subprocess.run(["chattr", "-i", str(now)], check=True)


def why_not_immutable(directory: Path) -> str | None:
    """Return why nothing can be made immutable in a directory; `None` if it can."""
    if shutil.which("chattr") is None:
        return "chattr is not installed"
    tried = subprocess.run(
        ["chattr", "+i", str(directory)], check=False, capture_output=True, text=True
    )
    if tried.returncode != 0:
        return f"chattr +i fails here: {tried.stderr.strip()}"
    subprocess.run(["chattr", "-i", str(directory)], check=True)
    return None


@pytest.mark.parametrize("what", ["step-1", "step-1/.metadata", "step-1/hf/config.json"])
def test_step_that_cannot_be_deleted_goes_later(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    reason = why_not_immutable(tmp_path)
    if reason is not None:
        pytest.skip(reason)
    root, seen = tmp_path / "run", Seen()
    with managed(root, seen, save_every=1, keep_last=1) as manager:
        report_steps(manager, seen, [1])
        # What is open goes all the same.
        with (root / "step-1" / ".metadata").open("rb"), immutable(root / what, root):
            report_steps(manager, seen, [2])
            # Either the whole step is there, or nothing that looks like one.
            is_whole = what == "step-1"
            assert manager.steps() == ([1, 2] if is_whole else [2])
            assert [verify(manager.path_of(step)).ok for step in manager.steps()].count(False) == 0
            assert len(list(root.glob(".deleted-*"))) == (0 if is_whole else 1)
        assert "tries again" in caplog.text
        report_steps(manager, seen, [3])
    assert (seen.errors(), seen.steps) == ({}, [3])
    assert not list(root.glob(".deleted-*"))


# R3 and N5: one checkpoint is kept, and saves fail in each phase, on one rank


FAILING = {
    2: Strike(rank=1, point="local plan", action="raise"),
    3: Strike(rank=1, point="mid dcp", action="raise"),
    4: Strike(rank=0, point="before manifest", action="raise"),
}


def fail_in_each_phase(rank: int, world_size: int, root: Path) -> tuple[Seen, list[Any]]:
    seen, kept = Seen(), []
    with managed(root, seen, save_every=1, keep_last=1) as manager:
        report_steps(manager, seen, [1])
        for step, strike in FAILING.items():
            with strike.installed(rank, root):
                report_steps(manager, seen, [step])
            kept.append(manager.steps())
        report_steps(manager, seen, [5])
    return seen, kept


def test_only_checkpoint_stays_and_all_ranks_get_the_same_error_when_saves_fail(
    tmp_path: Path,
) -> None:
    root = tmp_path / "run"
    found = run_ranks(fail_in_each_phase, 2, root)
    assert len(hits(root)) == 3
    texts = [{step: str(one.error) for step, one in seen.raised.items()} for seen, _ in found]
    assert texts[0] == texts[1]
    for step, strike in FAILING.items():
        assert f"injected at {strike.point}" in texts[0][step]
    for seen, kept in found:
        assert kept == [[1]] * 3
        assert (seen.saved, seen.latest) == ([1, 5], 5)
    assert sorted(path.name for path in root.glob("step-*")) == ["step-5"]


# R5: a run cleans up beside a live save of another job, and beside directories of others


def save_and_wait(root: Path, go: Path) -> None:
    """Save step 7 of another job, held up in the midst until a file is there."""
    strike = Strike(rank=0, point="mid dcp", action="call", call=lambda _: wait_until(go.exists))
    strike.install(root)
    with CheckpointManager(root, timeout_s=LIMIT_S) as manager:
        manager.save(7, state_at(1), wait=True)


def test_live_save_and_foreign_directories_stay_when_a_run_cleans_up(tmp_path: Path) -> None:
    root, go, seen = tmp_path / "run", tmp_path / "go", Seen()
    with FreshProcess(save_and_wait, root, go) as other:
        wait_until(lambda: hits(root))
        (live,) = root.glob(".incomplete-*")
        foreign = root / "notes-of-somebody"
        (foreign / "step-1").mkdir(parents=True)
        (foreign / "file").write_text("mine")
        # As seen with a clock that is 30 days ahead.
        then = time.time() - MONTH_S
        for path in [live, *live.rglob("*"), foreign, *foreign.rglob("*")]:
            os.utime(path, (then, then), follow_symlinks=False)
        with managed(root, seen, save_every=1, keep_last=1) as manager:
            report_steps(manager, seen, [1, 2, 3])
            assert manager.steps() == [3]
        assert live.is_dir()
        go.touch()
        other.result()
    assert seen.errors() == {}
    assert (foreign / "file").read_text() == "mine"
    assert save_held_by(root / "step-7", has_export=False) == 1
    assert CheckpointManager(root).steps() == [3, 7]


# N2 and N3: the host of the store falls silent, or dies

STORE_TIMEOUT_S = 6.0


def told(root: Path) -> Path:
    return root.parent / "told"


def lose_the_store(rank: int, world_size: int, root: Path, strike: Strike) -> Seen:
    seen = Seen()
    with managed(root, seen, save_every=1, timeout_s=STORE_TIMEOUT_S) as manager:
        report_steps(manager, seen, [1])
        with strike.installed(rank, root):
            report_steps(manager, seen, [2])
        told(root).touch()
    return seen


def test_survivor_is_told_when_the_host_of_the_store_dies(tmp_path: Path) -> None:
    root = tmp_path / "run"
    strike = Strike(rank=0, point="mid dcp", action="kill")
    with spawn_ranks(lose_the_store, 2, root, strike, store="rank0") as handle:
        survivor = handle.outcomes(80)[1].value
    assert issubclass(survivor.errors()[2], RankLostError)
    assert "rank 0" in str(survivor.raised[2].error)
    assert survivor.steps == [1]


def test_survivor_is_told_when_the_host_of_the_store_falls_silent(tmp_path: Path) -> None:
    """N2: the connections stay open, and nothing answers."""
    root = tmp_path / "run"
    strike = Strike(rank=0, point="mid dcp", action="stop")
    with spawn_ranks(lose_the_store, 2, root, strike, store="rank0") as handle:
        wait_until(told(root).exists)
        handle.kill(0)
        survivor = handle.outcomes()[1].value
    assert issubclass(survivor.errors()[2], RankLostError)
    assert "rank 0" in str(survivor.raised[2].error)
    assert survivor.steps == [1]


# N4: the timeout of the training group is shorter than a save


TRAINING_TIMEOUT_S = 2.0


def train_beside_a_slow_save(rank: int, world_size: int, root: Path) -> tuple[Seen, bool]:
    training = dist.new_group(timeout=timedelta(seconds=TRAINING_TIMEOUT_S))
    strike = Strike(rank=1, point="mid dcp", action="delay", seconds=2 * TRAINING_TIMEOUT_S)
    seen = Seen()
    with managed(root, seen, save_every=1, timeout_s=LIMIT_S) as manager:
        with strike.installed(rank, root):
            manager.step(1, lambda: state_at(1))
            was_busy = False
            until = torch.tensor(float(bool(seen.saved)))
            while not until.item():
                # Equally often on all ranks, as a training loop.
                until = torch.tensor(float(bool(seen.saved)))
                dist.all_reduce(until, op=dist.ReduceOp.MIN, group=training)
                was_busy = was_busy or not until.item()
                time.sleep(0.02)
        manager.wait()
    return seen, was_busy


def test_training_with_a_short_timeout_goes_on_beside_a_slow_save_of_a_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    found = run_ranks(train_beside_a_slow_save, 2, root)
    assert hits(root) == ["1 delay mid dcp"]
    assert [(seen.errors(), seen.steps, busy) for seen, busy in found] == [({}, [1], True)] * 2
