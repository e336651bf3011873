"""Many saves of one run with faults at random: after each, what was promised still holds."""

from __future__ import annotations

import errno
import math
import os
import random
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from dcp_hf_writer import CheckpointManager, verify
from dcp_hf_writer.manager.retention import KnownStep, Retention, plan_retention
from support.faults import BadCall, Resources, Strike, hits, looks_committed
from support.managed_runs import Seen, managed, report_steps
from support.named_bytes import save_held_by
from support.ranks import run_ranks, spawn_ranks

if TYPE_CHECKING:
    from support.faults import Fault

TIMEOUT_S = 8.0
KEEP = {"keep_last": 2, "keep_every": 10, "export_keep_last": 1}
OPTIONS: dict[str, Any] = {"save_every": 1, "export_every": 3, "timeout_s": TIMEOUT_S, **KEEP}


def fault_of(chance: random.Random) -> Fault | None:
    """Draw a fault of one rank that no process dies of; often none."""
    rank = chance.randrange(2)
    faults: list[Fault | None] = [
        *[None] * 4,
        BadCall(rank=rank, name="pwritev", errno=errno.ENOSPC, file="*.distcp", times=99),
        BadCall(rank=rank, name="fsync", errno=errno.EIO, file="*.distcp"),
        BadCall(rank=0, name="mkdir", errno=errno.ENOSPC, file=".incomplete-*"),
        Strike(rank=rank, point="local plan", action="raise"),
        Strike(rank=rank, point="before report", action="raise"),
        Strike(rank=0, point="before rename", action="raise"),
    ]
    return chance.choice(faults)


def run_many(  # noqa: PLR0917 - the arguments of a rank have no names
    rank: int, world_size: int, root: Path, first: int, count: int, seed: int
) -> tuple[Seen, list[int], list[str]]:
    """Report steps with faults on the way; both ranks draw the same ones."""
    del world_size
    chance = random.Random(seed)
    seen, struck = Seen(), []
    with managed(root, seen, **OPTIONS) as manager:
        manager.restore({})
        report_steps(manager, seen, [first])
        held = Resources(root, with_slots=rank == 0)
        for step in range(first + 1, first + count):
            fault = fault_of(chance)
            if fault is not None:
                struck.append(step)
            with ExitStack() as stack:
                if fault is not None:
                    stack.enter_context(fault.installed(rank, root))
                report_steps(manager, seen, [step])
        leaked = held.leaked()
    return seen, struck, leaked


def kept_of(committed: list[int], exported: list[int]) -> tuple[set[int], set[int]]:
    """Return the steps and the exports that retention leaves, by replaying every commit."""
    known: dict[int, KnownStep] = {}
    retention = Retention(**KEEP)
    for step in committed:
        known[step] = KnownStep(step, has_export=step in exported)
        plan = plan_retention(list(known.values()), retention, protected={step})
        for gone in plan.delete:
            del known[gone]
        for bare in plan.delete_export:
            known[bare] = KnownStep(bare)
    return set(known), {one.step for one in known.values() if one.has_export}


def check_tree(root: Path, committed: list[int], exported: list[int]) -> None:
    """Check I1, I2 and I7 of a run, and that retention is exact."""
    steps, exports = kept_of(committed, exported)
    assert looks_committed(root) - {"latest", "hf-latest"} == {f"step-{step}" for step in steps}
    for step in steps:
        path = root / f"step-{step}"
        assert verify(path).ok, path
        assert save_held_by(path, has_export=step in exports) == (step - 1) % 6 + 1
    if steps:
        assert os.readlink(root / "latest") == f"step-{max(steps)}"
    if exports:
        assert os.readlink(root / "hf-latest") == f"step-{max(exports)}/hf"
    assert not [p.name for p in root.iterdir() if p.name.startswith((".incomplete", ".deleted"))]


def run_and_check(root: Path, *, count: int, seed: int) -> None:
    print(f"seed {seed}, {count} saves")  # noqa: T201 - replays the run
    for seen, struck, leaked in run_ranks(run_many, 2, root, 1, count, seed, timeout_s=1800):
        assert set(seen.raised) == set(struck), "each fault is told at its own step, and no other"
        assert seen.saved == [step for step in range(1, count + 1) if step not in struck]
        assert leaked == []
        check_tree(root, seen.saved, seen.exported)
        assert seen.latest == max(seen.saved)
    assert len(hits(root)) >= len(struck)


@pytest.mark.timeout(300)
def test_some_saves_with_faults_keep_the_promises(tmp_path: Path) -> None:
    run_and_check(tmp_path / "run", count=20, seed=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_saves_with_faults_keep_the_promises(tmp_path: Path) -> None:
    run_and_check(tmp_path / "run", count=200, seed=5)


def die_at_random(rank: int, world_size: int, root: Path, seed: int) -> None:
    """Resume, and save until this rank kills itself at a random point of a random save."""
    chance = random.Random(seed)
    point = chance.choice(("local plan", "mid dcp", "before manifest", "after rename"))
    victim = 0 if point in {"before manifest", "after rename"} else chance.randrange(2)
    strike = Strike(rank=victim, point=point, action="kill", hit=chance.randrange(1, 4))
    seen = Seen()
    with managed(root, seen, **OPTIONS) as manager:
        start = manager.restore({}) or 0
        with strike.installed(rank, root):
            for step in range(start + 1, start + 12):
                report_steps(manager, seen, [step])
                if step in seen.raised:
                    os._exit(1)


def kill_often(root: Path, *, kills: int, seed: int, every: int) -> None:
    """Kill a rank again and again; after each kill, look at the run as the next start does.

    Args:
        root: Directory of the run.
        kills: Number of kills.
        seed: Replays the kills.
        every: How often the other rank lives until it has learned of the kill, which takes the
            deadline of a save. The other times it is killed too, as launchers do.
    """
    print(f"seed {seed}, {kills} kills")  # noqa: T201 - replays the run
    before = -1
    for n in range(kills):
        with spawn_ranks(die_at_random, 2, root, seed * 1000 + n, timeout_s=120) as handle:
            handle.outcomes(grace_s=math.inf if n % every == every - 1 else 0.0)
        assert len(hits(root)) == n + 1, "nobody was killed"
        manager = CheckpointManager(root)
        latest = manager.latest()
        for step in manager.steps():
            assert verify(manager.path_of(step)).ok
        assert latest is None or latest >= before
        before = -1 if latest is None else latest
        manager.close()
    assert before > 0


@pytest.mark.timeout(300)
def test_run_whose_ranks_are_killed_never_goes_back(tmp_path: Path) -> None:
    kill_often(tmp_path / "run", kills=2, seed=1, every=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_run_whose_ranks_are_killed_often_never_goes_back(tmp_path: Path) -> None:
    kill_often(tmp_path / "run", kills=40, seed=2, every=5)


Usage = dict[str, int]


def usage() -> Usage:
    """Return what the process uses: memory, descriptors, threads, shared memory files."""
    fields = Path("/proc/self/status").read_text()
    rss = next(line for line in fields.splitlines() if line.startswith("VmRSS"))
    fds = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return {
        "rss_kib": int(rss.split()[1]),
        "fds": len(fds),
        "threads": threading.active_count(),
        "memfds": sum("memfd:" in path for path in fds),
    }


def use_over_saves(
    rank: int, world_size: int, root: Path, count: int, checkpointer: Literal["thread", "process"]
) -> tuple[Usage, Usage]:
    early: Usage = {}
    options = {"save_every": 1, "keep_last": 1, "timeout_s": 150.0}
    with managed(root, Seen(), checkpointer=checkpointer, **options) as manager:
        for step in range(1, count + 1):
            report_steps(manager, Seen(), [step])
            if step == count // 5:
                time.sleep(0.3)
                early = usage()
        time.sleep(0.3)
        late = usage()
    return early, late


def check_flat(root: Path, count: int, checkpointer: str) -> None:
    for early, late in run_ranks(use_over_saves, 2, root, count, checkpointer, timeout_s=600):
        for name in ("fds", "threads", "memfds"):
            assert late[name] <= early[name], (name, early, late)
        assert late["rss_kib"] <= early["rss_kib"] * 1.02, (early, late)


@pytest.mark.timeout(300)
def test_nothing_grows_over_saves_in_a_thread(tmp_path: Path) -> None:
    check_flat(tmp_path / "run", 25, "thread")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("checkpointer", ["thread", "process"])
def test_nothing_grows_over_50_saves(tmp_path: Path, checkpointer: str) -> None:
    check_flat(tmp_path / "run", 50, checkpointer)


def run_in_process(rank: int, world_size: int, root: Path) -> Seen:
    seen = Seen()
    # torch starts its process at the first save, which takes long on a busy machine.
    options = {"save_every": 1, "keep_last": 1, "checkpointer": "process", "timeout_s": 150.0}
    with managed(root, seen, **options) as manager:
        report_steps(manager, seen, [1, 2])
    return seen


@pytest.mark.timeout(300)
def test_checkpointer_process_saves_a_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    found = run_ranks(run_in_process, 2, root, timeout_s=200)
    assert [(seen.raised, seen.saved, seen.latest) for seen in found] == [({}, [1, 2], 2)] * 2
    assert found[0].steps == [2]
    assert save_held_by(root / "step-2") == 2
