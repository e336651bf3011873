"""Write slots between real processes: contention, holders that die or stop, forks."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import dcp_hf_writer
from dcp_hf_writer.errors import SlotTimeoutError
from dcp_hf_writer.storage.write_slots import HALF_ENV, SHARED_ENV, WriteSlots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerContext, ForkServerProcess

LIMIT_S = 30.0
"""How long a test waits for another process before it fails."""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SHARED_ENV, *HALF_ENV.values()):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Processes that share nothing with this one, forked from one that imported torch before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dcp_hf_writer.storage.write_slots", "pytest"])
    return context


@pytest.fixture
def start(context: ForkServerContext) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """Start `target(connection, *args)` in a process; kill what is left of it after the test."""
    processes: list[ForkServerProcess] = []

    def start_one(target: Any, *args: Any) -> tuple[ForkServerProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *args), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        return process, ours

    yield start_one
    for process in processes:
        process.kill()
        process.join(LIMIT_S)
        assert not process.is_alive()


@pytest.fixture
def slots(tmp_path: Path) -> WriteSlots:
    return WriteSlots(slots=1, directory=str(tmp_path / "locks"))


def receive(connection: Connection) -> Any:
    assert connection.poll(LIMIT_S), "the other process did not answer"
    return connection.recv()


def take_at_once(slots: WriteSlots, target: Path) -> None:
    """Take a slot that the kernel has freed: the first attempt gets it, so no time may pass."""
    with slots.hold(str(target), "dcp", deadline=0.0) as hold:
        assert hold.index is not None


def hold_until_told(connection: Connection, slots: WriteSlots, target: str) -> None:
    with slots.hold(target, "dcp", deadline=time.monotonic() + LIMIT_S):
        connection.send(os.getpid())
        connection.recv()
    connection.send("released")


# Contention


def write_in_turns(
    connection: Connection, slots: WriteSlots, target: str, log: str, turns: int
) -> None:
    connection.send("ready")
    connection.recv()
    lines = []
    for turn in range(turns):
        half: Any = ("dcp", "hf")[turn % 2]
        with slots.hold(target, half, deadline=time.monotonic() + LIMIT_S):
            # CLOCK_MONOTONIC is one clock for all processes of the machine.
            entered = time.monotonic_ns()
            time.sleep(0.01)
            left = time.monotonic_ns()
        lines.append(f"{entered} {left}\n")
    Path(log).write_text("".join(lines), encoding="ascii")
    connection.send("done")


def most_at_once(logs: list[Path]) -> tuple[int, int]:
    """Return how many intervals the logs hold, and how many of them overlap at most."""
    lines = [line for log in logs for line in log.read_text(encoding="ascii").splitlines()]
    intervals = [tuple(map(int, line.split())) for line in lines]
    # A leaving sorts before an entering at the same time.
    events = sorted(event for entered, left in intervals for event in ((entered, 1), (left, -1)))
    inside = most = 0
    for _, step in events:
        inside += step
        most = max(most, inside)
    return len(intervals), most


@pytest.mark.parametrize(("count", "expected"), [(1, {1}), (2, {2}), (0, {3, 4, 5, 6})])
def test_writers_never_exceed_the_slots_under_contention(
    start: Any, tmp_path: Path, count: int, expected: set[int]
) -> None:
    # With count 0, unbounded, the same measurement must find more writers than two: if it did
    # not, it would prove nothing for the others.
    slots = WriteSlots(slots=count, directory=str(tmp_path / "locks"))
    logs = [tmp_path / f"log-{number}" for number in range(6)]
    writers = [start(write_in_turns, slots, str(tmp_path), str(log), 5)[1] for log in logs]
    for writer in writers:
        assert receive(writer) == "ready"
    for writer in writers:
        writer.send("go")
    for writer in writers:
        assert receive(writer) == "done"
    held, most = most_at_once(logs)
    assert held == 30
    assert most in expected


def test_waiter_gets_the_slot_when_the_holder_is_done(
    start: Any, slots: WriteSlots, tmp_path: Path
) -> None:
    _, holder = start(hold_until_told, slots, str(tmp_path))
    receive(holder)
    _, waiter = start(hold_until_told, slots, str(tmp_path))
    assert not waiter.poll(0.3)
    holder.send("release")
    assert receive(holder) == "released"
    receive(waiter)
    waiter.send("release")
    assert receive(waiter) == "released"


# Holders that die or stop


def test_slot_is_free_at_once_when_the_holder_is_killed(
    start: Any, slots: WriteSlots, tmp_path: Path
) -> None:
    process, holder = start(hold_until_told, slots, str(tmp_path))
    receive(holder)
    os.kill(process.pid, signal.SIGKILL)
    process.join(LIMIT_S)
    assert process.exitcode == -signal.SIGKILL
    take_at_once(slots, tmp_path)


def test_waiter_in_another_process_gets_the_slot_of_a_killed_holder(
    start: Any, slots: WriteSlots, tmp_path: Path
) -> None:
    process, holder = start(hold_until_told, slots, str(tmp_path))
    receive(holder)
    _, waiter = start(hold_until_told, slots, str(tmp_path))
    assert not waiter.poll(0.2)
    os.kill(process.pid, signal.SIGKILL)
    receive(waiter)


def test_waiter_times_out_and_names_the_holder_when_it_is_stopped(
    start: Any, slots: WriteSlots, tmp_path: Path
) -> None:
    process, holder = start(hold_until_told, slots, str(tmp_path))
    pid = receive(holder)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with (
            pytest.raises(SlotTimeoutError, match=f"slot 0: pid {pid} on "),
            slots.hold(str(tmp_path), "hf", deadline=started + 0.3),
        ):
            raise AssertionError
        assert 0.3 <= time.monotonic() - started < LIMIT_S
    finally:
        os.kill(process.pid, signal.SIGCONT)
    holder.send("release")
    assert receive(holder) == "released"
    take_at_once(slots, tmp_path)


def test_slots_come_back_when_many_holders_are_killed_in_turn(start: Any, tmp_path: Path) -> None:
    slots = WriteSlots(slots=2, directory=str(tmp_path / "locks"))
    for _ in range(3):
        holders = [start(hold_until_told, slots, str(tmp_path)) for _ in range(2)]
        for process, holder in holders:
            receive(holder)
            os.kill(process.pid, signal.SIGKILL)
        for process, _ in holders:
            process.join(LIMIT_S)
    assert len(list((tmp_path / "locks").iterdir())) <= 2
    take_at_once(slots, tmp_path)


# Forks


def hold_through_fork(connection: Connection, slots: WriteSlots, target: str, how: str) -> None:
    """Fork while a slot is held, tell the pid of the child, and wait to be killed.

    Args:
        connection: To the test.
        slots: Of which one is held.
        target: Directory that the slot is for.
        how: `"sleep"`: the child lives on; `"leave"`: it leaves the `with` block and says so;
            `"plain"`: as sleep, but the lock is a plain flock, which nobody closes in the child.
    """
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(slots.hold(target, "dcp", deadline=time.monotonic() + LIMIT_S))
        if how == "plain":
            assert slots.directory is not None
            (path,) = Path(slots.directory).iterdir()
            stack.close()
            fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert held.index == 0
        child = os.fork()
        if child == 0:
            if how == "leave":
                stack.close()
                connection.send(os.getpid())
            signal.alarm(int(LIMIT_S))
            signal.pause()
            os._exit(1)
        if how != "leave":
            connection.send(child)
        connection.recv()


@contextlib.contextmanager
def ended_after(pid: int) -> Iterator[None]:
    """Kill the grandchild `pid` in the end; its parent is dead, so nobody else does."""
    try:
        yield
        os.kill(pid, 0)  # it must have lived through the body, or the body proved nothing
    finally:
        os.kill(pid, signal.SIGKILL)


def test_slot_is_free_at_once_when_the_holder_forked_and_was_killed(
    start: Any, slots: WriteSlots, tmp_path: Path
) -> None:
    process, holder = start(hold_through_fork, slots, str(tmp_path), "sleep")
    with ended_after(receive(holder)):
        with pytest.raises(SlotTimeoutError), slots.hold(str(tmp_path), "dcp", deadline=0.0):
            raise AssertionError
        os.kill(process.pid, signal.SIGKILL)
        process.join(LIMIT_S)
        take_at_once(slots, tmp_path)


def test_plain_flock_is_kept_by_a_forked_child(
    start: Any, slots: WriteSlots, tmp_path: Path
) -> None:
    # The control of the test above: without filelock's closing in the child it would fail.
    process, holder = start(hold_through_fork, slots, str(tmp_path), "plain")
    with ended_after(receive(holder)):
        os.kill(process.pid, signal.SIGKILL)
        process.join(LIMIT_S)
        with (
            pytest.raises(SlotTimeoutError),
            slots.hold(str(tmp_path), "dcp", deadline=time.monotonic() + 0.2),
        ):
            raise AssertionError


def test_forked_child_does_not_give_back_its_parents_slot(
    start: Any, slots: WriteSlots, tmp_path: Path
) -> None:
    process, holder = start(hold_through_fork, slots, str(tmp_path), "leave")
    with ended_after(receive(holder)):
        with (
            pytest.raises(SlotTimeoutError, match=f"pid {process.pid} on "),
            slots.hold(str(tmp_path), "dcp", deadline=0.0),
        ):
            raise AssertionError
        os.kill(process.pid, signal.SIGKILL)
        process.join(LIMIT_S)
        take_at_once(slots, tmp_path)


# Locks that fail

HOLD_ONCE = """
import logging, sys, time, types, warnings

# The package without its __init__, which imports torch: strace makes that slow.
package = types.ModuleType("dcp_hf_writer")
package.__path__ = [sys.argv[1]]
sys.modules["dcp_hf_writer"] = package
from dcp_hf_writer.errors import StorageError
from dcp_hf_writer.storage.write_slots import WriteSlots

logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
warnings.simplefilter("error")
try:
    with WriteSlots(slots=1, directory=sys.argv[2] + "/locks").hold(
        sys.argv[2], "dcp", deadline=time.monotonic()
    ) as hold:
        print("held", hold.index)
    print("left")
except StorageError as error:
    print(error.errno, error)
"""


def hold_with_failing_flock(injection: str, target: Path) -> tuple[str, str]:
    """Hold a slot while strace makes flock fail; return what was printed and the strace log."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace on PATH")
    log = target / "strace.log"
    prefix = [strace, "-f", "-qq", "-o", str(log), "-e", "trace=flock", "-e", f"inject={injection}"]
    allowed = subprocess.run(
        [strace, "-qq", "-o", "/dev/null", sys.executable, "-c", ""],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if allowed.returncode != 0:
        pytest.skip(f"strace may not trace here: {allowed.stderr.strip()}")
    package = str(Path(dcp_hf_writer.__path__[0]))
    done = subprocess.run(
        [*prefix, sys.executable, "-c", HOLD_ONCE, package, str(target)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = log.read_text(encoding="utf-8")
    assert "INJECTED" in text, "strace injected nothing"
    return done.stdout, text


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS"])
def test_failing_flock_is_an_error_and_leaves_no_soft_lock(tmp_path: Path, name: str) -> None:
    printed, _ = hold_with_failing_flock(f"flock:error={name}", tmp_path)
    number = {"ENOLCK": 37, "ENOSYS": 38}[name]
    assert printed.startswith(f"{number} ")
    assert "this file system has no locks" in printed
    assert "held" not in printed
    (path,) = (tmp_path / "locks").iterdir()
    assert path.read_bytes() == b""


def test_failing_release_is_logged_and_does_not_fail_the_write(tmp_path: Path) -> None:
    printed, log = hold_with_failing_flock("flock:error=EIO:when=2", tmp_path)
    lines = printed.splitlines()
    assert lines[0] == "held 0"
    assert lines[1].startswith("WARNING write slot ")
    assert lines[2] == "left"
    assert "LOCK_UN" in log
