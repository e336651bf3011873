"""torch's checkpointer process: it can be ended, so that torch starts another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from torch.distributed.checkpoint import _async_process_executor

from dcp_hf_writer.errors import UnsupportedTorchError
from dcp_hf_writer.torch_seam.checkpointer_process import end_checkpointer_process

_NAME = "_CHECKPOINT_PROCESS"


class Kept:
    """Holds a process as torch's object does."""

    def __init__(self, process: Any) -> None:
        self._save_process = process


class Process(subprocess.Popen[bytes]):
    """A real process with the methods of one of `multiprocessing` that are used."""

    def join(self, timeout_s: float) -> None:
        self.wait(timeout_s)

    def is_alive(self) -> bool:
        return self.poll() is None


def test_nothing_happens_without_a_process() -> None:
    assert getattr(_async_process_executor, _NAME) is None
    end_checkpointer_process()
    assert getattr(_async_process_executor, _NAME) is None


def test_stopped_process_ends_and_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    with Process([sys.executable, "-S", "-c", "import time; time.sleep(600)"]) as process:
        monkeypatch.setattr(_async_process_executor, _NAME, Kept(process))
        os.kill(process.pid, signal.SIGSTOP)
        end_checkpointer_process()
        assert process.returncode == -signal.SIGKILL
        assert getattr(_async_process_executor, _NAME) is None


def test_process_that_torch_keeps_elsewhere_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_async_process_executor, _NAME, object())
        with pytest.raises(UnsupportedTorchError, match="_save_process"):
            end_checkpointer_process()
    monkeypatch.delattr(_async_process_executor, _NAME)
    with pytest.raises(UnsupportedTorchError, match="checkpointer process"):
        end_checkpointer_process()
