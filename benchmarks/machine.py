"""What this machine is, and what a process holds of it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import threading
from dataclasses import dataclass

import torch

_RESET_PEAK = "5"
"""Written to /proc/self/clear_refs it sets the peak (VmHWM) to the memory held now: proc(5)."""


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds at one moment."""

    rss_nbytes: int
    """Resident memory, shared pages included; 0 where /proc is not there."""
    fds: int
    """Open file descriptors, -1 where they cannot be counted."""
    threads: int
    """Threads of the kernel's count where there is one, else those that Python knows."""


def describe_machine(directory: str) -> str:
    """One line: processor, cores, memory, file system of `directory`, versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{_processor()}, {cores} cores, {memory:.0f} GiB; {file_system(directory)} "
        f"({shutil.disk_usage(directory).free / (1 << 30):.0f} GiB free); "
        f"{platform.system()} {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def file_system(directory: str) -> str:
    """Type of the file system that holds `directory`, such as `ext4`; `unknown` without /proc."""
    real = os.path.realpath(directory)
    best, kind = "", "unknown"
    for line in _read("/proc/self/mounts").splitlines():
        _, mount, this_kind, *_ = line.split()
        mount = mount.replace("\\040", " ")
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, this_kind
    return kind


def held() -> Held:
    """Measure this process."""
    fds = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else -1
    threads = _status("Threads") or threading.active_count()
    return Held(_status("VmRSS") * 1024, fds, threads)


def reset_peak() -> bool:
    """Start a new peak of resident memory; False where the system does not allow it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_rss_nbytes() -> int:
    """Highest resident memory since `reset_peak`."""
    return _status("VmHWM") * 1024


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+)", _read("/proc/self/status"), re.MULTILINE)
    return int(found.group(1)) if found else 0


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
