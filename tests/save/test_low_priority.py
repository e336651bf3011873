"""`WriteSlots(nice=)`: a save in the background writes at a lower priority than training."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from dcp_hf_writer import HFDualWriter, WriteSlots
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.save.low_priority import run_at_low_priority
from dcp_hf_writer.save.write_phase import WritePhase
from dcp_hf_writer.storage import linux_calls

if TYPE_CHECKING:
    from pathlib import Path


# Class 2, level 7, as ioprio_get(2) tells it.
BEST_EFFORT_7 = 2 << 13 | 7


def io_priority_of_thread() -> int:
    # The number of ioprio_get(2) follows that of ioprio_set(2) on each of these machines.
    number = linux_calls._IOPRIO_SET[os.uname().machine] + 1
    found = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), 1, 0)
    assert found >= 0, os.strerror(ctypes.get_errno())
    return int(found)


def set_io_priority_of_thread(value: int) -> None:
    number = linux_calls._IOPRIO_SET[os.uname().machine]
    found = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), 1, 0, value)
    assert found == 0, os.strerror(ctypes.get_errno())


def nice_of_thread() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much nicer than this thread the thread of each write phase was."""
    found: list[int] = []
    run, base = WritePhase.run, nice_of_thread()

    def watched(phase: WritePhase) -> object:
        found.append(nice_of_thread() - base)
        return run(phase)

    monkeypatch.setattr(WritePhase, "run", watched)
    return found


def never() -> None:
    msg = "nobody interrupted the save"
    raise AssertionError(msg)


class FailingWrite:
    def run(self) -> None:
        assert threading.current_thread() is not threading.main_thread()
        msg = "disk full"
        raise OSError(msg)


GENTLE = WriteSlots(nice=5)
STATE = {"weight": torch.arange(6.0)}


@pytest.mark.parametrize(("slots", "nice"), [({}, 0), ({"nice": 3}, 3), ({"nice": 19}, 19)])
def test_a_save_in_the_background_writes_at_a_lower_priority(
    tmp_path: Path, seen: list[int], slots: dict[str, int], nice: int
) -> None:
    room = 19 - nice_of_thread()
    writer = HFDualWriter(tmp_path / "step-1", slots=WriteSlots(**slots))
    dcp.async_save(STATE, storage_writer=writer).result()
    assert seen == [min(nice, room)]
    loaded = {"weight": torch.zeros(6)}
    dcp.load(loaded, checkpoint_id=tmp_path / "step-1")
    assert torch.equal(loaded["weight"], STATE["weight"])


def test_the_files_get_durable_at_a_lower_priority_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: set[tuple[str, int, int]] = set()
    fsync = os.fsync

    def noted(fd: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        found.add((name, nice_of_thread() - base, io_priority_of_thread()))
        fsync(fd)

    base, usual = nice_of_thread(), io_priority_of_thread()
    monkeypatch.setattr(os, "fsync", noted)
    writer = HFDualWriter(tmp_path / "step-1", slots=GENTLE)
    dcp.async_save(STATE, storage_writer=writer).result()
    gentle = min(5, 19 - base)
    assert {one for one in found if one[0].endswith((".distcp", ".safetensors"))} == {
        ("__0_0.distcp", gentle, BEST_EFFORT_7),
        ("model.safetensors", gentle, BEST_EFFORT_7),
        ("digests-00000.safetensors", gentle, BEST_EFFORT_7),
    }
    assert io_priority_of_thread() == usual


def test_training_keeps_its_priority(tmp_path: Path) -> None:
    before = nice_of_thread()
    for step in (1, 2):
        writer = HFDualWriter(tmp_path / f"step-{step}", slots=GENTLE)
        dcp.async_save(STATE, storage_writer=writer).result()
    assert nice_of_thread() == before


def test_a_synchronous_save_writes_in_the_thread_of_its_caller(
    tmp_path: Path, seen: list[int]
) -> None:
    dcp.save(STATE, storage_writer=HFDualWriter(tmp_path / "step-1", slots=GENTLE))
    assert seen == [0]


def test_a_writer_of_the_user_runs_at_the_usual_priority(tmp_path: Path, seen: list[int]) -> None:
    given = FileSystemWriter(tmp_path / "unused")
    writer = HFDualWriter(tmp_path / "step-1", dcp_writer=given, slots=GENTLE)
    dcp.async_save(STATE, storage_writer=writer).result()
    assert seen == [0]


@pytest.mark.parametrize("nice", [-1, 20, 1.5, True, "5"])
def test_a_nice_value_that_linux_does_not_have_is_refused(nice: object) -> None:
    with pytest.raises(ConfigError, match="nice must be"):
        WriteSlots(nice=nice)  # type: ignore[arg-type]


def test_an_error_is_raised_in_the_calling_thread_and_keeps_nothing_alive() -> None:
    held = FailingWrite()
    alive = weakref.ref(held)
    gc.disable()
    try:
        with pytest.raises(OSError, match="disk full") as caught:
            run_at_low_priority(held.run, nice=1, stop=never)
        del held, caught
        assert alive() is None
    finally:
        gc.enable()


def test_a_save_that_linux_gives_no_lower_priority_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", refuse)
    assert run_at_low_priority(nice_of_thread, nice=5, stop=never) == nice_of_thread()
    assert "runs at the priority of training" in caplog.text


def test_a_thread_of_the_class_for_idle_devices_keeps_it() -> None:
    found = []

    def body() -> None:
        set_io_priority_of_thread(3 << 13)
        found.append(run_at_low_priority(io_priority_of_thread, nice=5, stop=never))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert [one >> 13 for one in found] == [3]


@pytest.mark.parametrize("machine", ["x86_64", "a machine of its own"])
def test_a_save_that_gets_no_lower_io_priority_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, machine: str
) -> None:
    # The kernel knows no call of this number.
    monkeypatch.setattr(linux_calls, "_IOPRIO_SET", {"x86_64": 100000})
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    assert run_at_low_priority(lambda: 3, nice=5, stop=never) == 3
    assert "at the I/O priority of training: " in caplog.text


def test_an_interpreter_that_starts_no_threads_writes_in_the_calling_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: threading.Thread) -> None:
        msg = "can't create new thread at interpreter shutdown"
        raise RuntimeError(msg)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert (
        run_at_low_priority(threading.current_thread, nice=5, stop=never)
        is threading.current_thread()
    )


def test_an_interrupt_stops_the_write_before_it_is_raised() -> None:
    stopped, ended = threading.Event(), threading.Event()

    def write() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        assert stopped.wait(60)
        ended.set()

    # Not SIGINT: a shell starts what runs in the background with that one ignored.
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_at_low_priority(write, nice=1, stop=stopped.set)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended.is_set()
