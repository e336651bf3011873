"""The device that is measured: its name, its memory, its time. With `cpu` nothing of a GPU is."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ranks import Rank

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where torch keeps the tensors that it shares
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Device:
    """The device of one process."""

    kind: str
    """`cuda` or `cpu`."""

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.kind == "cuda"

    def select(self) -> None:
        """Take GPU 0, which all ranks share; a mesh would take the one of number `LOCAL_RANK`."""
        if self.is_cuda:
            os.environ["LOCAL_RANK"] = "0"
            torch.cuda.set_device(0)

    def synchronize(self) -> None:
        """Wait until the device has nothing to do."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def memory(self) -> int:
        """Bytes that torch has allocated on the device."""
        return int(torch.cuda.memory_allocated()) if self.is_cuda else 0

    def reset_peak(self) -> None:
        """Start a new peak of `peak`."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Most bytes that torch had allocated on the device since `reset_peak`."""
        return int(torch.cuda.max_memory_allocated()) if self.is_cuda else 0

    def mark(self) -> Any:
        """Return a mark in the current stream, for `seconds_between`."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, first: Any, second: Any) -> float:
        """Time of the device between two marks that it has passed."""
        if not self.is_cuda:
            return float(second - first)
        return float(first.elapsed_time(second)) / 1000

    def facts(self) -> dict[str, Any]:
        """Return what a reader needs to know of the device."""
        if not self.is_cuda:
            return {"card": None, "cuda": torch.version.cuda}
        properties = torch.cuda.get_device_properties(0)
        return {
            "card": properties.name,
            "memory_nbytes": properties.total_memory,
            "cuda": torch.version.cuda,
            **_asked_of_driver(),
        }


class Reporter:
    """Tells the parent what was measured, as soon as it is; an error costs one part of it."""

    def __init__(self, rank: Rank, deadline: float) -> None:
        """Report through `rank`; the section ends at `deadline`, by the clock of the host."""
        self._rank, self._deadline = rank, deadline

    @property
    def left_s(self) -> float:
        """Seconds left to this section."""
        return self._deadline - time.monotonic()

    def fact(self, **facts: Any) -> None:
        """Report single values."""
        self._rank.emit(kind="fact", facts=facts)

    def sample(self, name: str, **values: float) -> None:
        """Report one sample of a contender."""
        self._rank.emit(kind="sample", name=name, values=values)

    def skip(self, name: str, why: str) -> None:
        """Report what is not measured."""
        self._rank.emit(kind="skip", name=name, why=why)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run one part of a section; report its error with the traceback, and go on behind it."""
        try:
            yield
        except Exception:  # noqa: BLE001 - the parent prints it and fails at the end
            self._rank.emit(kind="error", name=name, text=traceback.format_exc())

    @contextlib.contextmanager
    def peer(self, name: str) -> Iterator[None]:
        """Measure one of torch's own ways; that torch fails is a result, told in one line."""
        try:
            yield
        except PeerFailedError as error:
            self.skip(name, str(error))


class PeerFailedError(RuntimeError):
    """One of torch's own ways failed. Unlike an error of ours it fails no part of the run."""

    @classmethod
    def of(cls, error: Exception) -> PeerFailedError:
        """Make one of what torch raised, in one line."""
        return cls(f"it failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def lacks_shared_memory(nbytes: int) -> str | None:
    """Say so if torch cannot share that much: touching a page of a full one kills the process."""
    if not os.path.isdir(SHARED_MEMORY):
        return f"{SHARED_MEMORY} is not there"
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < nbytes + nbytes // 8:
        return f"{SHARED_MEMORY} has {free // _MIB} MiB free, {nbytes // _MIB} MiB are needed"
    return None


def allow_many_files() -> None:
    """Raise the soft limit of open files: torch keeps one for each tensor that it shares."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _asked_of_driver() -> dict[str, str]:
    """Driver and link of GPU 0; empty where `nvidia-smi` does not tell."""
    fields = ("driver_version", "pcie.link.gen.current", "pcie.link.width.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"{type(error).__name__}: {error}"}
    return dict(zip(fields, map(str.strip, answer.stdout.strip().split(",")), strict=False))
