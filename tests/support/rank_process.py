"""What one rank does in its own process: join the group, run a function, send what came of it.

The other side of `ranks`, which starts these processes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import pickle
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from multiprocessing import connection
    from pathlib import Path

    from typing_extensions import Self

# A rank ends itself this long after its deadline, should the parent be gone by then.
ORPHAN_MARGIN_S = 60
# First message of a rank; `encode_outcome` makes the second.
JOINED = b"joined"


class RankFailedError(Exception):
    """A rank ended without a result, or raised what cannot be pickled."""


class RankTracebackError(Exception):
    """Cause of an error that a rank raised: its traceback and the end of its output, as text."""


@dataclass(frozen=True, slots=True)
class Raised:
    """An error that a rank caught, so that it may go on and tell at the end; it pickles."""

    error: BaseException
    """What was raised."""
    text: str
    """Its traceback."""

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Keep an error that was just caught."""
        return cls(error, "".join(traceback.format_exception(error)))

    def reraise(self) -> NoReturn:
        """Raise the error again, in another process, from where it came."""
        raise self.error from RankTracebackError(self.text)


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank needs besides the call itself."""

    rank: int
    world_size: int
    timeout_s: float
    store_port: int | None
    """Port of the parent's store; None if rank 0 holds it and writes the port to `port_file`."""
    log: Path
    port_file: Path


def rank_main(job: Job, call: bytes, conn: connection.Connection) -> None:
    """Body of one rank: join the group, run the function, send what came of it, leave."""
    with job.log.open("ab", buffering=0) as log:
        for fd in (1, 2):
            os.dup2(log.fileno(), fd)
        # Processes that this rank starts belong to its group, so that none of them outlives it.
        os.setpgid(0, 0)
        signal.alarm(math.ceil(job.timeout_s) + ORPHAN_MARGIN_S)
        faulthandler.enable(log)
        faulthandler.register(signal.SIGUSR1, log, all_threads=True)
        value, error, text = _call(job, call, conn)
        conn.send_bytes(encode_outcome(value, error, text))
        if error is None and conn.poll(job.timeout_s):
            with contextlib.suppress(EOFError):
                conn.recv_bytes()
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()


def encode_outcome(value: Any, error: BaseException | None, text: str) -> bytes:
    """Pickle what came of a call; an error that does not survive pickling becomes its text."""
    try:
        outcome = pickle.dumps((value, error))
        pickle.loads(outcome)
    except Exception as problem:  # noqa: BLE001 anything may be raised by a foreign pickle
        text += f"\n{type(error or value).__name__} does not pickle: {problem!r}"
        outcome = pickle.dumps((None, RankFailedError(text)))
    # A pickle within a pickle: the text arrives even if the outcome cannot be read over there.
    return pickle.dumps((outcome, text))


def decode_outcome(message: bytes) -> tuple[Any, BaseException | None, str]:
    """Return value, error and traceback; the text as the error if the outcome cannot be read."""
    outcome, text = pickle.loads(message)
    try:
        value, error = pickle.loads(outcome)
    except Exception as problem:  # noqa: BLE001 as above
        unread = f"{text}\nwhat the rank sent does not unpickle here: {problem!r}"
        return None, RankFailedError(unread), unread
    return value, error, text


def _call(
    job: Job, call: bytes, conn: connection.Connection
) -> tuple[Any, BaseException | None, str]:
    try:
        _require_single_threaded_server()
        torch.set_num_threads(1)
        fn, args = pickle.loads(call)
        store = _join_store(job)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=job.rank,
            world_size=job.world_size,
            timeout=limit_of(job.timeout_s),
        )
        conn.send_bytes(JOINED)
        return fn(job.rank, job.world_size, *args), None, ""
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        return None, error, "".join(traceback.format_exception(error))


def is_spawning() -> bool:
    """Whether ranks are new interpreters instead of forks."""
    return os.environ.get("TEST_RANKS_START") == "spawn"


def _require_single_threaded_server() -> None:
    if is_spawning():
        return
    threads = os.listdir(f"/proc/{os.getppid()}/task")
    if len(threads) != 1:
        msg = f"the fork server must have one thread for its forks to be safe, has {len(threads)}"
        raise RuntimeError(msg)


def _join_store(job: Job) -> dist.TCPStore:
    """Connect to the store, or hold it; sets what `torchrun` would put in the environment."""
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo",
        MASTER_ADDR="127.0.0.1",
        RANK=str(job.rank),
        LOCAL_RANK=str(job.rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_WORLD_SIZE=str(job.world_size),
    )
    limit = limit_of(job.timeout_s)
    port = job.store_port
    if port is None and job.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
        draft = job.port_file.with_suffix(".draft")
        draft.write_text(str(store.port))
        draft.rename(job.port_file)
        port = store.port
    else:
        if port is None:
            port = _read_port(job)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    os.environ["MASTER_PORT"] = str(port)
    return store


def _read_port(job: Job) -> int:
    deadline = time.monotonic() + job.timeout_s
    while not job.port_file.exists():
        if time.monotonic() > deadline:
            msg = "rank 0 never said on which port its store listens"
            raise TimeoutError(msg)
        time.sleep(0.005)
    return int(job.port_file.read_text())


def limit_of(timeout_s: float) -> timedelta:
    return timedelta(seconds=timeout_s)
