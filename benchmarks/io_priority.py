"""How fast a data set is read beside a write of lower priority, by I/O scheduler of the device.

    sudo python benchmarks/io_priority.py

An XFS file system in a file is mounted by loop, and its loop device gets each scheduler in turn. A
thread writes `--mib` and fsyncs them, as a save does; meanwhile the main thread reads random parts
of another file past the page cache. The thread has in turns the usual priority, a nice value of 10,
what `WriteSlots(nice=10)` gives it, and the I/O class for idle devices.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

from dcp_hf_writer.save.low_priority import lower_priority
from dcp_hf_writer.storage import linux_calls
from machine import describe_machine
from performance_page import root_of

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEDULERS = ("bfq", "mq-deadline", "none")
NICE = 10
DATA_NBYTES = 512 << 20
READ_NBYTES = 128 << 10
PIECE = b"\x5a" * (4 << 20)
_IDLE_CLASS = 3 << 13


def usual() -> None:
    """Leave the priorities of the thread as they are."""


def nice_alone() -> None:
    """Raise the nice value, from which the kernel derives a priority of the device."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def as_a_save() -> None:
    """Do what a save does."""
    lower_priority(NICE)


def idle_class() -> None:
    """Write only while nobody else uses the device."""
    number = linux_calls._IOPRIO_SET[os.uname().machine]
    if ctypes.CDLL(None).syscall(ctypes.c_long(number), 1, 0, _IDLE_CLASS):
        msg = "ioprio_set refuses"
        raise OSError(msg)


WAYS: dict[str, Callable[[], None]] = {
    "usual priority": usual,
    "nice 10 alone": nice_alone,
    "WriteSlots(nice=10)": as_a_save,
    "idle class": idle_class,
}


def write(path: str, nbytes: int, prepare: Callable[[], None], took: list[float]) -> None:
    """Body of the thread: write and fsync a file, then remove it."""
    prepare()
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    began = time.perf_counter()
    for offset in range(0, nbytes, len(PIECE)):
        os.pwrite(fd, PIECE, offset)
    os.fsync(fd)
    took.append(time.perf_counter() - began)
    os.close(fd)
    os.unlink(path)


def measure(root: str, nbytes: int, prepare: Callable[[], None]) -> tuple[float, float, float]:
    """Return the seconds of the write, and of the reads beside it: their rate and 99th percentile.

    The latter is in milliseconds.
    """
    fd = os.open(os.path.join(root, "data"), os.O_RDONLY | os.O_DIRECT)
    memory, took, waits = mmap.mmap(-1, READ_NBYTES), list[float](), list[float]()
    thread = threading.Thread(
        target=write, args=(os.path.join(root, "save"), nbytes, prepare, took)
    )
    thread.start()
    began = time.perf_counter()
    while thread.is_alive():
        before = time.perf_counter()
        os.preadv(fd, [memory], random.randrange(DATA_NBYTES // READ_NBYTES) * READ_NBYTES)
        waits.append(time.perf_counter() - before)
    seconds = time.perf_counter() - began
    os.close(fd)
    os.sync()
    return took[0], len(waits) / seconds, 1e3 * statistics.quantiles(waits, n=100)[-1]


def set_scheduler(root: str, scheduler: str) -> None:
    """Give the device of a directory a scheduler; only for a loop device.

    The device then leaves out the page cache of the file system below it.
    """
    status = os.stat(root)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    path = os.path.realpath(f"/sys/dev/block/{device}")
    if not os.path.basename(path).startswith("loop"):
        msg = f"{root} is on {os.path.basename(path)}, which is no loop device"
        raise SystemExit(msg)
    device = os.path.join("/dev", os.path.basename(path))
    subprocess.run([shutil.which("losetup") or "losetup", "--direct-io=on", device], check=True)
    with open(os.path.join(path, "queue", "scheduler"), "w", encoding="ascii") as file:
        file.write(scheduler)


def run_all(root: str, options: argparse.Namespace) -> None:
    """Measure each scheduler and each way in turns, and print a line of the table for both."""
    with open(os.path.join(root, "data"), "wb") as file:
        file.writelines(os.urandom(1 << 20) for _ in range(DATA_NBYTES >> 20))
    os.sync()
    print(f"{describe_machine(root)}; {options.mib} MiB, medians of {options.rounds}\n")
    print(
        "| scheduler | the thread that writes has | write, s | reads a second | 99 % of reads, ms |"
    )
    print("|---|---|---|---|---|")
    for scheduler in SCHEDULERS:
        set_scheduler(root, scheduler)
        found = {way: list[tuple[float, float, float]]() for way in WAYS}
        for _ in range(options.rounds):
            for way, prepare in WAYS.items():
                found[way].append(measure(root, options.mib << 20, prepare))
        for way, samples in found.items():
            wrote, rate, slowest = (
                statistics.median(column) for column in zip(*samples, strict=True)
            )
            print(f"| {scheduler} | {way} | {wrote:.2f} | {rate:.0f} | {slowest:.1f} |", flush=True)


def main() -> int:
    """Mount the file system, and run this script within its mount namespace."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=768, help="size of a write [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count [%(default)s]")
    parser.add_argument("--mounted", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mounted:
        run_all(options.mounted, options)
        return 0
    with root_of("xfs") as root:
        if root is None:
            return 1
        inner = [sys.executable, __file__, *sys.argv[1:], "--mounted", root.path]
        return subprocess.run(root.command(inner), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
