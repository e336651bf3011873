"""Real gloo ranks for tests: a function runs in one process per rank and its results come back.

Ranks are forked from a fork server that has torch and transformers imported, so they start in
milliseconds. Forking after such imports is safe only while the server has a single thread: a
second one could hold a lock that no fork would ever release. Importing torch starts threads only
in OpenBLAS and OpenMP, which the environment of the server forbids, and each rank checks that its
server has one thread before it does anything else. Builds of torch for a GPU start threads as they
are imported: there, `TEST_RANKS_START=spawn` starts each rank as a new interpreter, in seconds.

`run_ranks` is what most tests want. `spawn_ranks` returns a handle for tests that kill or stop
ranks. A hang is a failure: at the deadline every rank writes the stacks of its threads to its log,
the log goes into the error, and the ranks are killed by process id.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from support.rank_process import (
    JOINED,
    Job,
    RankFailedError,
    RankTracebackError,
    decode_outcome,
    is_spawning,
    limit_of,
    rank_main,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.context import ForkServerProcess
    from types import TracebackType

    from typing_extensions import Self

StoreHost = Literal["parent", "rank0"]

PRELOADED_MODULES = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "safetensors.torch",
    "pytest",
    "transformers.models.gemma3.modeling_gemma3",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.llama.modeling_llama",
    "transformers.models.olmo2.modeling_olmo2",
    "transformers.models.qwen2.modeling_qwen2",
)
# One thread per library at import: see the module docstring.
SERVER_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# How long the other ranks may still need once one of them has failed.
FAILURE_GRACE_S = 15.0
# How long a rank may need to leave after its result has arrived; it joins its threads there.
EXIT_GRACE_S = 15.0
# How long a rank may need to write its stacks; far more than it takes.
DUMP_S = 1.0
MAX_LOG_CHARS = 6000


class RankHangError(Exception):
    """A rank gave no result, or did not leave, within the deadline; holds the stacks."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one rank ended."""

    rank: int
    """Rank within the world of the call."""
    value: Any = None
    """What the function returned, if it did."""
    error: BaseException | None = None
    """What the rank raised, `RankFailedError` or `RankHangError`; None if it returned."""
    exitcode: int | None = None
    """Exit status; negative the signal that ended it; None if it had to be killed here."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: object,
    timeout_s: float = 90,
    store: StoreHost = "parent",
) -> list[Any]:
    """Run `fn(rank, world_size, *args)` in `world_size` fresh processes joined by gloo.

    Args:
        fn: Function at the top level of an importable module.
        world_size: Number of ranks.
        *args: Further arguments; pickled.
        timeout_s: Limit for all of it, in seconds.
        store: Who holds the `TCPStore`: the calling process, or rank 0 as under `torchrun`.

    Returns:
        What each rank returned, by rank. Tensors come as copies.

    Raises:
        BaseException: What the first rank to fail raised, with its traceback as the cause.
        RankFailedError: If a rank died.
        RankHangError: If a rank was not done in time.
    """
    with spawn_ranks(fn, world_size, *args, timeout_s=timeout_s, store=store) as handle:
        return handle.results()


def spawn_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: object,
    timeout_s: float = 90,
    store: StoreHost = "parent",
) -> RankHandle:
    """Start ranks as `run_ranks` does; return a handle on them once all have joined the group."""
    return RankHandle(fn, world_size, args, timeout_s=timeout_s, store=store)


class RankHandle:
    """Running ranks of one call; a context manager that kills what is left of them."""

    def __init__(
        self,
        fn: Callable[..., Any],
        world_size: int,
        args: tuple[object, ...],
        *,
        timeout_s: float,
        store: StoreHost,
    ) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._logs = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._store: dist.TCPStore | None = None
        port = None
        if store == "parent":
            self._store = dist.TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit_of(timeout_s)
            )
            port = self._store.port
        call = pickle.dumps((fn, args))
        self._processes: list[ForkServerProcess] = []
        self._connections: list[connection.Connection] = []
        self._outcomes: dict[int, Outcome] = {}
        self._arrived: list[int] = []
        context = _context()
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                job = Job(rank, world_size, timeout_s, port, self._log(rank), self._logs / "port")
                # Not a daemon: daemons may not start the process of DCP's PROCESS checkpointer.
                process = context.Process(target=rank_main, args=(job, call, theirs))
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)
            for rank in range(world_size):
                self._await_joined(rank)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process id of each rank."""
        return [process.pid or 0 for process in self._processes]

    def kill(self, rank: int, sig: signal.Signals = signal.SIGKILL) -> None:
        """Send `sig` to one rank, and only to it."""
        os.kill(self.pids[rank], sig)

    def results(self) -> list[Any]:
        """Wait for all ranks and return what they returned.

        Raises:
            BaseException: As `run_ranks`.
        """
        outcomes = self.outcomes(grace_s=FAILURE_GRACE_S)
        failed = [outcomes[rank] for rank in self._arrived if outcomes[rank].error is not None]
        # A hang often is the consequence of what another rank raised, so that comes first.
        failed.sort(key=lambda outcome: isinstance(outcome.error, RankHangError))
        if failed and failed[0].error is not None:
            raise failed[0].error
        return [outcome.value for outcome in outcomes]

    def outcomes(self, timeout_s: float = math.inf, *, grace_s: float = math.inf) -> list[Outcome]:
        """Wait until each rank has ended, one way or another; kill those that are late.

        Args:
            timeout_s: Limit in seconds; what is left of the call's own limit if that is less.
            grace_s: How long the others may take once a rank has failed.

        Returns:
            One outcome per rank; errors are returned, not raised.
        """
        deadline = min(self._deadline, time.monotonic() + timeout_s)
        waiting = {
            rank: conn for rank, conn in enumerate(self._connections) if rank not in self._outcomes
        }
        while waiting:
            left_s = max(deadline - time.monotonic(), 0)
            ready = connection.wait(list(waiting.values()), left_s)
            if not ready:
                break
            for rank in [rank for rank, conn in waiting.items() if conn in ready]:
                self._receive(rank)
                del waiting[rank]
                if self._outcomes[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + grace_s)
        if waiting:
            self._give_up(list(waiting), "gave no result in time")
        self._release()
        return [self._outcomes[rank] for rank in range(len(self._processes))]

    def close(self) -> None:
        """Kill what still runs, by process id, and forget the logs. Idempotent."""
        for rank in range(len(self._processes)):
            self._end(rank)
        for conn in self._connections:
            conn.close()
        self._store = None
        shutil.rmtree(self._logs, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _await_joined(self, rank: int) -> None:
        """Wait for the word that a rank is in the group; keep its outcome if that comes first."""
        ready = self._connections[rank].poll(max(self._deadline - time.monotonic(), 0))
        if ready:
            self._receive(rank)

    def _receive(self, rank: int) -> None:
        """Take what one rank sent, or note that it died."""
        try:
            message = self._connections[rank].recv_bytes()
        except (EOFError, ConnectionError):
            self._arrived.append(rank)
            self._processes[rank].join(EXIT_GRACE_S)
            code = self._processes[rank].exitcode
            text = f"rank {rank} ended without a result, exit code {code}"
            error = RankFailedError(f"{text}\n{self._log_tail(rank)}")
            self._outcomes[rank] = Outcome(rank, error=error, exitcode=code)
            return
        if message == JOINED:
            return
        self._arrived.append(rank)
        value, error, text = decode_outcome(message)
        if error is not None:
            cause = RankTracebackError(f"on rank {rank}:\n{text}\n{self._log_tail(rank)}")
            error.__cause__ = cause
        self._outcomes[rank] = Outcome(rank, value, error)

    def _release(self) -> None:
        """Let ranks leave, see that they do, and note their exit status.

        No rank that returned leaves before all are done: gloo and a store of rank 0 would break
        off what the others still do.
        """
        for conn in self._connections:
            with contextlib.suppress(OSError):
                conn.send_bytes(b"leave")
        late = []
        for rank, process in enumerate(self._processes):
            process.join(EXIT_GRACE_S)
            if process.exitcode is None:
                late.append(rank)
        if late:
            self._give_up(late, "had its result but did not leave")
        for rank, process in enumerate(self._processes):
            old = self._outcomes[rank]
            error = old.error
            if error is None and process.exitcode != 0:
                problem = f"rank {rank} returned but exited with {process.exitcode}"
                error = RankFailedError(f"{problem}\n{self._log_tail(rank)}")
            self._outcomes[rank] = Outcome(rank, old.value, error, process.exitcode)

    def _give_up(self, ranks: list[int], problem: str) -> None:
        """Collect the stacks of every rank that still runs, then kill the late ones."""
        alive = [rank for rank, process in enumerate(self._processes) if process.is_alive()]
        for rank in alive:
            with contextlib.suppress(ProcessLookupError):
                self.kill(rank, signal.SIGUSR1)
        time.sleep(DUMP_S)
        logs = "\n".join(f"--- rank {rank} ---\n{self._log_tail(rank)}" for rank in alive)
        for rank in ranks:
            self._arrived.append(rank)
            error = RankHangError(f"rank {rank} {problem}; ranks {alive} still ran:\n{logs}")
            self._outcomes[rank] = Outcome(rank, error=error)
        for rank in ranks:
            self._end(rank)

    def _end(self, rank: int) -> None:
        """Kill one rank and the processes that it started, which share its process group."""
        process = self._processes[rank]
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank-{rank}.log"

    def _log_tail(self, rank: int) -> str:
        log = self._log(rank)
        text = log.read_text(errors="replace") if log.exists() else ""
        return text[-MAX_LOG_CHARS:]


def _context() -> Any:
    """Fork-server context whose server is running, with the modules imported in one thread."""
    if is_spawning():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED_MODULES))
    with _environment(SERVER_ENVIRONMENT):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
