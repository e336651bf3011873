"""Start the ranks of one job as processes of this host, joined by a gloo group.

The parent hosts the TCP store, on a port of the loopback interface that the kernel picks, so that
runs beside each other never meet. Ranks report through one pipe each: events while they work, then
a result or the text of what went wrong. Whatever ends the job, no rank outlives `run_ranks`.
"""

from __future__ import annotations

import datetime as dt
import functools
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

LOOPBACK = "127.0.0.1"
_GRACE_S = 5.0
"""How long the other ranks may report too, once one has failed: its peers' errors are often the
consequence, but sometimes the cause."""

_LOG_LINES = 20


class RanksFailedError(RuntimeError):
    """One or more ranks did not end well; the text holds what each of them said."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What the code of a rank is given."""

    rank: int
    """Number of this rank in the default group."""
    world_size: int
    """Ranks of the job."""
    pipe: Connection
    """To the parent; used through `emit`."""

    def emit(self, **facts: Any) -> None:
        """Send facts to the parent's `on_event`; anything that pickles."""
        self.pipe.send(("event", facts))


@dataclass(frozen=True, slots=True)
class _Start:
    body: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    world_size: int
    port: int
    timeout_s: float
    threads: int
    log: str | None


def run_ranks(
    body: Callable[..., Any],
    *args: Any,
    world_size: int,
    timeout_s: float,
    on_event: Callable[[int, dict[str, Any]], None] | None = None,
    log: str | None = None,
    threads: int = 1,
) -> list[Any]:
    """Run `body(rank: Rank, *args)` in `world_size` fresh processes and return their results.

    Args:
        body: Module-level function; it finds the default process group (gloo) initialised.
        *args: Passed on; they must pickle.
        world_size: Number of ranks.
        timeout_s: Deadline for all of it, starting the processes included.
        on_event: Called in this process with rank and facts of each `Rank.emit`.
        log: File that takes stdout and stderr of the ranks; `None` leaves them on the screen.
        threads: Threads of torch's operators in each rank.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RanksFailedError: If a rank raised, died, or the deadline passed.
    """
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks: list[tuple[SpawnProcess, Connection]] = []
    try:
        for rank in range(world_size):
            here, there = context.Pipe()
            start = _Start(body, args, rank, world_size, store.port, timeout_s, threads, log)
            process = context.Process(target=_rank_main, args=(start, there))
            process.start()
            # Only the child may hold this end, or its death would not be seen as end of file.
            there.close()
            ranks.append((process, here))
        return _collect([pipe for _, pipe in ranks], timeout_s, on_event)
    except RanksFailedError as error:
        msg = f"{error}{_log_tail(log)}"
        raise RanksFailedError(msg) from None
    finally:
        for process, pipe in ranks:
            process.join(0.2 if sys.exc_info()[0] else _GRACE_S)
            process.kill()
            process.join()
            pipe.close()


def _collect(
    pipes: list[Connection],
    timeout_s: float,
    on_event: Callable[[int, dict[str, Any]], None] | None,
) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(pipes):
        open_ranks = [r for r in range(len(pipes)) if r not in results and r not in failures]
        left = deadline - time.monotonic()
        ready = multiprocessing.connection.wait([pipes[r] for r in open_ranks], max(left, 0))
        if not ready:
            late = ", ".join(map(str, open_ranks))
            if not failures:
                failures = dict.fromkeys(open_ranks, f"no answer within {timeout_s:.0f} s")
            msg = f"rank {late} did not end\n" + _describe(failures)
            raise RanksFailedError(msg)
        for rank in open_ranks:
            if pipes[rank] not in ready:
                continue
            kind, payload = _receive(pipes[rank])
            if kind == "event" and on_event is not None:
                on_event(rank, payload)
            elif kind == "result":
                results[rank] = payload
            elif kind == "error":
                failures[rank] = payload
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        raise RanksFailedError(_describe(failures))
    return [results[r] for r in range(len(pipes))]


def _receive(pipe: Connection) -> tuple[str, Any]:
    try:
        kind, payload = pipe.recv()
    except (EOFError, ConnectionResetError):
        return "error", "the process died without a word"
    return kind, payload


def _describe(failures: dict[int, str]) -> str:
    return "\n".join(f"rank {r}: {text.strip()}" for r, text in sorted(failures.items()))


def _log_tail(log: str | None) -> str:
    """What the ranks printed last: all there is when one of them crashed in C++."""
    if log is None or not os.path.exists(log):
        return ""
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = file.readlines()[-_LOG_LINES:]
    return "\n".join(["", "the ranks printed last:", *map(str.rstrip, lines)]) if lines else ""


def _rank_main(start: _Start, pipe: Connection) -> None:
    if start.log is not None:
        # The descriptors, not sys.stdout: C++ libraries write there directly.
        log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(start.threads)
        _join_group(start)
        result = start.body(Rank(start.rank, start.world_size, pipe), *start.args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send(("result", result))
    except BaseException:  # noqa: BLE001 - the parent raises it
        pipe.send(("error", traceback.format_exc()))
        # No orderly exit: a thread of a save in flight may wait for a rank that is gone.
        os._exit(1)


def _end_with_parent() -> None:
    # A parent that was killed cleans up nothing; a rank that waits for it would stay for minutes.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _join_group(start: _Start) -> None:
    # Without this gloo binds to what the host's name resolves to, which may be no address at all.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    # As torchrun tells it.
    os.environ["LOCAL_WORLD_SIZE"] = str(start.world_size)
    timeout = dt.timedelta(seconds=start.timeout_s)
    store = dist.TCPStore(LOOPBACK, start.port, is_master=False, timeout=timeout)
    dist.init_process_group(
        "gloo", store=store, rank=start.rank, world_size=start.world_size, timeout=timeout
    )


@functools.cache
def loopback_interface() -> str:
    """Name the loopback interface: `lo` on Linux, `lo0` on BSD and macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), names[0])
