"""`OpenFiles`: the threads that fsync the files of a save."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.storage.output_fsync import OpenFiles
from dcp_hf_writer.storage.posix_outputs import OutputFile

if TYPE_CHECKING:
    from pathlib import Path

_MANY = 12
"""More files than threads, so that some wait."""


@pytest.mark.parametrize("is_renewed", [False, True])
def test_a_save_that_is_given_up_closes_files_that_wait_for_their_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_renewed: bool
) -> None:
    answers, synced = threading.Event(), []

    def hang(fd: int) -> None:
        synced.append(fd)
        assert answers.wait(60)

    monkeypatch.setattr(os, "fsync", hang)
    files = OpenFiles()
    outputs = [OutputFile(str(tmp_path / str(n)), create=True) for n in range(_MANY)]
    before = set(threading.enumerate())
    for output in outputs:
        files.sync(output)
    if is_renewed:
        files.renew_threads()
    files.abandon()
    began = set(threading.enumerate()) - before
    answers.set()
    for thread in began:
        thread.join(60)
    assert 0 < len(synced) < _MANY
    assert {output._fd for output in outputs} == {-1}


def test_new_threads_leave_no_fsync_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, synced, fsync = threading.Event(), [], os.fsync

    def wait_first(fd: int) -> None:
        assert answers.wait(60)
        synced.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", wait_first)
    files = OpenFiles()
    for number in range(_MANY):
        files.sync(OutputFile(str(tmp_path / str(number)), create=True))
    files.renew_threads()
    files.sync(OutputFile(str(tmp_path / "last"), create=True))
    answers.set()
    assert files.join(deadline=time.monotonic() + 60) == []
    assert len(synced) == _MANY + 1
    files.close()


def test_a_file_is_made_durable_once_if_no_more_threads_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ThreadPoolExecutor.submit` queues the work before it finds that no thread starts."""
    answers, synced, fsync, start = threading.Event(), [], os.fsync, threading.Thread.start
    started: list[threading.Thread] = []

    def wait_in_the_thread(fd: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert answers.wait(60)
        synced.append(fd)
        fsync(fd)

    def start_one(thread: threading.Thread) -> None:
        if started:
            msg = "can't start new thread"
            raise RuntimeError(msg)
        started.append(thread)
        start(thread)

    monkeypatch.setattr(os, "fsync", wait_in_the_thread)
    monkeypatch.setattr(threading.Thread, "start", start_one)
    files = OpenFiles()
    outputs = [OutputFile(str(tmp_path / str(n)), create=True) for n in range(3)]
    fds = [output._fd for output in outputs]
    for output in outputs:
        files.sync(output)
    answers.set()
    assert files.join(deadline=time.monotonic() + 60) == []
    files.close()
    started[0].join(60)
    assert sorted(synced) == sorted(fds)
