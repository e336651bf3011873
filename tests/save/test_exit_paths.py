"""Processes that end, or are told to, while a save is in flight."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer import HFDualWriter
from support.faults import (
    Outcome,
    Strike,
    check_outcomes,
    check_storage,
    hits,
    save,
    writer_options,
)
from support.named_bytes import sharded_state
from support.processes import FreshProcess

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

# How long a save is held up, so that it is still in flight when its process ends.
SLOW_S = 1.0
# How long an interpreter may need to start, with torch, on a busy machine.
LIMIT_S = 60.0
# Points at which different threads and calls of the save are still to come.
POINTS = ("local plan", "mid dcp", "before fsync", "before manifest")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a tree with save 1 as `step-1`."""
    tree = tmp_path / "run"
    tree.mkdir()
    check_outcomes([save(tree, "step-1", 1)], None)
    return tree


def begin_slow_save(root: Path, point: str, *, rank: int = 0) -> Future[Any]:
    """Begin save 2 as `step-2`, which takes its time at a point of this rank."""
    Strike(rank=rank, point=point, action="delay", seconds=SLOW_S).install(root)
    writer = HFDualWriter(root / "step-2", **writer_options(root))
    return dcp.async_save(
        sharded_state(2), storage_writer=writer, no_dist=not dist.is_initialized()
    )


def end_with_save_in_flight(root: Path, point: str) -> bool:
    future = begin_slow_save(root, point)
    return future.done()


@pytest.mark.parametrize("point", POINTS)
def test_process_that_ends_waits_for_its_save(point: str, root: Path) -> None:
    with FreshProcess(end_with_save_in_flight, root, point) as process:
        assert process.result() is False, "the save was over before the process ended"
        assert process.exitcode() == 0
    assert hits(root) == [f"0 delay {point}"]
    check_storage(root, {"step-1": 1, "step-2": 2})


def end_at_once(root: Path, point: str) -> None:
    begin_slow_save(root, point)
    wait_for_hit(root)
    os._exit(7)


def wait_for_hit(root: Path) -> None:
    until = time.monotonic() + LIMIT_S
    while not hits(root):
        assert time.monotonic() < until, "the save did not come to the point"
        time.sleep(0.005)


def test_waiting_is_what_commits_the_save_of_a_process_that_ends(root: Path) -> None:
    """The control: a process that ends without waiting commits nothing."""
    with FreshProcess(end_at_once, root, "mid dcp") as process:
        assert process.exitcode() == 7
    check_storage(root, {"step-1": 1}, may_leave=True)
    check_outcomes([save(root, "step-2", 3)], None)
    check_storage(root, {"step-1": 1, "step-2": 3})


SCRIPT = """
import sys
from pathlib import Path
from test_exit_paths import begin_slow_save
begin_slow_save(Path(sys.argv[1]), sys.argv[2])
print("the script ends")
"""


def test_interpreter_that_ends_waits_for_its_save(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(root), "mid dcp"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stdout) == (0, "the script ends\n"), done.stderr
    assert hits(root) == ["0 delay mid dcp"]
    check_storage(root, {"step-1": 1, "step-2": 2})


def end_one_of_two(rank: int, root: Path, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    begin_slow_save(root, "mid dcp", rank=rank)


def test_two_ranks_that_end_wait_for_their_save(root: Path, tmp_path: Path) -> None:
    meeting = str(tmp_path / "meeting")
    with (
        FreshProcess(end_one_of_two, 0, root, meeting) as first,
        FreshProcess(end_one_of_two, 1, root, meeting) as second,
    ):
        assert [process.exitcode() for process in (first, second)] == [0, 0]
    assert sorted(hits(root)) == ["0 delay mid dcp", "1 delay mid dcp"]
    check_storage(root, {"step-1": 1, "step-2": 2})


# Signals


def wait_for_save(root: Path, point: str) -> None:
    begin_slow_save(root, point).result(LIMIT_S)


def leave_at_sigterm(root: Path, point: str) -> None:
    def leave(*_: object) -> None:
        raise SystemExit(3)

    signal.signal(signal.SIGTERM, leave)
    wait_for_save(root, point)


def test_save_is_committed_when_its_waiter_is_interrupted(root: Path) -> None:
    with FreshProcess(wait_for_save, root, "mid dcp") as process:
        wait_for_hit(root)
        os.kill(process.pid, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            process.result()
        assert process.exitcode() == 0
    check_storage(root, {"step-1": 1, "step-2": 2})


def test_save_is_committed_when_a_handler_of_sigterm_leaves(root: Path) -> None:
    with FreshProcess(leave_at_sigterm, root, "mid dcp") as process:
        wait_for_hit(root)
        os.kill(process.pid, signal.SIGTERM)
        with pytest.raises(SystemExit):
            process.result()
        assert process.exitcode() == 0
    check_storage(root, {"step-1": 1, "step-2": 2})


@pytest.mark.parametrize("point", POINTS)
def test_previous_checkpoint_stays_when_sigterm_ends_the_process(point: str, root: Path) -> None:
    with FreshProcess(wait_for_save, root, point) as process:
        wait_for_hit(root)
        os.kill(process.pid, signal.SIGTERM)
        assert process.exitcode() == -signal.SIGTERM
    check_storage(root, {"step-1": 1}, may_leave=True)
    check_outcomes([save(root, "step-2", 3)], None)
    check_storage(root, {"step-1": 1, "step-2": 3})


def interrupt_self(root: Path) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(SLOW_S)


def save_interrupted(root: Path, point: str) -> list[Outcome]:
    with Strike(rank=0, point=point, action="call", call=interrupt_self).installed(0, root):
        struck = save(root, "step-2", 2, is_sync=True)
    check_storage(root, {"step-1": 1})
    return [struck, save(root, "step-2", 3, is_sync=True)]


@pytest.mark.parametrize("point", POINTS)
def test_synchronous_save_leaves_nothing_when_it_is_interrupted(point: str, root: Path) -> None:
    with FreshProcess(save_interrupted, root, point) as process:
        struck, again = process.result()
    assert hits(root) == [f"0 call {point}"]
    check_outcomes([struck], CheckpointException, ("KeyboardInterrupt",))
    check_outcomes([again], None)
    check_storage(root, {"step-1": 1, "step-2": 3})
