"""Faults in a save, and the one check of what must hold after each of them.

A fault strikes one rank: at a named point of the save (`Strike`) or in a system call (`BadCall`).
Each time it does, it leaves a line in a file beside the tree under test, so that a test can assert
that it happened. `check_storage` and `check_outcomes` hold what the design promises after every
fault, I1 to I8; `episode` is a whole life: a save, the struck one, the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, WriteSlots, failpoints
from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.storage import linux_calls
from support.named_bytes import EXPORT, save_held_by, sharded_state
from support.rank_process import Raised
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

TIMEOUT_S = 20.0
"""Deadline of the saves of these tests, where a test does not set its own."""
AFTER_DEADLINE_S = 5.0
"""How long after its deadline a save may take to tell its outcome (I4, I5)."""
AT_ONCE_S = TIMEOUT_S / 2
"""How long an error of one rank may take to reach all.

It takes a tenth of a second, and much longer on a busy machine. What waits for the deadline of the
save takes more than this, and that is what must not happen.
"""
_CASES_AT_A_TIME = 6
SLOT_COUNT = 2
ROOT = "<root>"
"""As the `file` of a `BadCall`: the directory that the checkpoints are in."""
_SETTLE_S = 5.0
_STOPPING_S = 0.5
_PWRITE = os.pwrite

# What a trainer takes for a checkpoint: any directory named like one that holds one of these.
_STEP_NAME = re.compile(r"step-(\d+)")
_MARKS = (".metadata", "model.safetensors.index.json", "hf/model.safetensors.index.json")
_LEFTOVERS = (".incomplete-", ".replaced-")


class InjectedFaultError(RuntimeError):
    """Raised by a `Strike`; stands for any error of a library or of this package."""


def hits(root: Path) -> list[str]:
    """Return what faults did in the saves below `root`, in order."""
    log = Path(f"{root}.hits")
    return log.read_text().splitlines() if log.exists() else []


def note_hit(root: Path, what: str) -> None:
    """Note that a fault strikes; on disk before it does."""
    fd = os.open(f"{root}.hits", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, f"{what}\n".encode())
    os.close(fd)


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What happens to one rank at a named point of a save."""

    rank: int
    point: str
    action: Literal["kill", "stop", "raise", "delay", "call"]
    hit: int = 1
    """Which time that the point is reached, from 1."""
    seconds: float = 0.0
    """Length of a delay."""
    call: Callable[[Path], None] | None = None
    """Called with the directory of the tree under test."""

    @contextlib.contextmanager
    def installed(self, rank: int, root: Path) -> Iterator[None]:
        """Strike in the body of the `with` statement, if this is the rank."""
        if rank == self.rank:
            self.install(root)
        try:
            yield
        finally:
            failpoints.set_hook(None)

    def install(self, root: Path) -> None:
        """Strike from now on."""
        assert self.point in failpoints.POINTS, self.point
        seen = 0

        def hook(point: str) -> None:
            nonlocal seen
            seen += point == self.point
            if point == self.point and seen == self.hit:
                note_hit(root, f"{self.rank} {self.action} {point}")
                self._act(root)

        failpoints.set_hook(hook)

    def _act(self, root: Path) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            # Another thread may take the signal, and this one run on for a moment.
            time.sleep(_STOPPING_S)
        elif self.action == "delay":
            time.sleep(self.seconds)
        elif self.call is not None:
            self.call(root)
        else:
            msg = f"injected at {self.point}"
            raise InjectedFaultError(msg)


@dataclass(frozen=True, kw_only=True)
class BadCall:
    """System calls of one rank, below the tree under test, that go wrong."""

    rank: int
    name: str
    """A function of `os`, or one of libc that this package calls by itself."""
    errno: int = 0
    nth: int = 1
    """First call that goes wrong, from 1."""
    times: int = 1
    """How many do."""
    file: str = "*"
    """Pattern of the name of the file or directory; `ROOT` for the tree itself."""
    outcome: Literal["error", "done", "short"] = "error"
    """Not done, done but an error reported, or done in part."""

    @contextlib.contextmanager
    def installed(self, rank: int, root: Path) -> Iterator[None]:
        """Make calls go wrong in the body of the `with` statement, if this is the rank."""
        if rank != self.rank:
            yield
            return
        is_libc = not hasattr(os, self.name)
        holder: Any = _Libc(linux_calls._libc) if is_libc else os
        real = getattr(holder, self.name)
        counted, lock = 0, threading.Lock()

        def bad(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            path = path_of_call(args[:2] if is_libc else args[:1])
            if not self._is_meant(path, root):
                return real(*args, **kwargs)
            with lock:
                counted += 1
                is_bad = self.nth <= counted < self.nth + self.times
            if not is_bad:
                return real(*args, **kwargs)
            note_hit(root, f"{rank} {self.outcome} {self.name} {os.path.basename(path)}")
            return self._answer(real, args, is_libc=is_libc)

        setattr(holder, self.name, bad)
        original = linux_calls._libc
        if is_libc:
            linux_calls._libc = holder
        try:
            yield
        finally:
            setattr(holder, self.name, real)
            linux_calls._libc = original

    def _is_meant(self, path: str, root: Path) -> bool:
        if self.file == ROOT:
            return path == str(root)
        return path.startswith(f"{root}/") and fnmatch(os.path.basename(path), self.file)

    def _answer(self, real: Any, args: tuple[Any, ...], *, is_libc: bool) -> Any:
        if self.outcome == "short":
            fd, data, offset = args
            whole = data if isinstance(data, memoryview) else memoryview(b"".join(data))
            return _PWRITE(fd, bytes(whole[: max(1, whole.nbytes // 3)]), offset)
        # A descriptor is gone whatever close says.
        if self.outcome == "done" or self.name == "close":
            real(*args)
        if is_libc:
            ctypes.set_errno(self.errno)
            return -1
        raise OSError(self.errno, os.strerror(self.errno))


class _Libc:
    """Stands for the C library; functions that are set on it hide those of the library."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def path_of_call(args: Sequence[Any]) -> str:
    """Return the first path among arguments; that of the file for a descriptor."""
    for arg in args:
        if isinstance(arg, (str, bytes)):
            return os.fsdecode(arg)
        if isinstance(arg, int) and arg > 2:
            try:
                return os.readlink(f"/proc/self/fd/{arg}")
            except OSError:
                return ""
    return ""


Fault = Strike | BadCall


@dataclass(frozen=True)
class Outcome:
    """What one rank saw of one save."""

    rank: int
    raised: Raised | None
    """Its error, if it failed."""
    seconds: float
    """From the call of the save until its outcome was known."""

    @property
    def error(self) -> BaseException | None:
        """What the save raised."""
        return None if self.raised is None else self.raised.error


def writer_options(root: Path) -> dict[str, Any]:
    """Return the options of the writers of these tests, with slots that nobody else uses."""
    slots = WriteSlots(SLOT_COUNT, directory=f"{root}.slots")
    return {"export": EXPORT, "timeout_s": TIMEOUT_S, "slots": slots}


def save(
    root: Path,
    name: str,
    number: int,
    *,
    mib: int = 0,
    is_sync: bool = False,
    planner: Any = None,
    **options: Any,
) -> Outcome:
    """Save the state of a number as `root / name`; never raises, never waits for ever."""
    is_alone = not dist.is_initialized()
    rank = 0 if is_alone else dist.get_rank()
    options = writer_options(root) | options
    state = sharded_state(number, mib=mib)
    began = time.monotonic()
    raised = None
    try:
        writer = HFDualWriter(root / name, **options)
        if is_sync:
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=is_alone)
        else:
            future = dcp.async_save(state, storage_writer=writer, planner=planner, no_dist=is_alone)
            future.result(timeout=options["timeout_s"] + 4 * AFTER_DEADLINE_S)
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        raised = Raised.of(error)
        # As for a caller who does not keep the error: its frames hold what the save held, and
        # torch makes a cycle of them.
        error.__traceback__ = None
        if is_sync:
            gc.collect()
    return Outcome(rank, raised, time.monotonic() - began)


def looks_committed(root: Path) -> set[str]:
    """Return the names below `root` that a trainer or a server would take for checkpoints."""
    return {
        path.relative_to(root).as_posix()
        for path in root.iterdir()
        if _STEP_NAME.search(path.name) and any((path / mark).exists() for mark in _MARKS)
    }


def check_storage(
    root: Path,
    committed: Mapping[str, int],
    *,
    without_export: Sequence[str] = (),
    may_leave: bool = False,
    mib: int = 0,
    others: Sequence[str] = (),
) -> None:
    """Check I1, I2, I3 and I7: whole checkpoints of known saves, nothing else, no leftovers.

    Args:
        root: The tree under test.
        committed: Number of the save that each checkpoint must hold, by name.
        without_export: Those of them that have no HuggingFace half.
        may_leave: Whether a dead process may have left a directory that nobody takes for a
            checkpoint.
        mib: As in `save`.
        others: Files that may be in a checkpoint although no save made them.

    Raises:
        AssertionError: If something else is there.
    """
    assert looks_committed(root) == set(committed), f"expected {sorted(committed)}"
    for name, number in committed.items():
        held = save_held_by(
            root / name, has_export=name not in without_export, mib=mib, others=others
        )
        assert held == number, f"{name} holds save {held}, expected {number}"
    names = {path.name for path in root.iterdir()} - set(committed)
    if may_leave:
        names = {name for name in names if not name.startswith(_LEFTOVERS)}
    assert not names, f"left behind: {sorted(names)}"


def check_outcomes(
    outcomes: Sequence[Outcome],
    kind: type[BaseException] | None,
    words: Sequence[str] = (),
    *,
    within_s: float = AT_ONCE_S,
) -> None:
    """Check I3, I4 and I5: every rank learns the outcome in time, from an error that says enough.

    Args:
        outcomes: Of the ranks that live.
        kind: What each of them must raise; `None` if the save succeeds.
        words: What each message must name.
        within_s: Longest time that may have passed until the error.

    Raises:
        AssertionError: If a rank saw something else.
    """
    assert outcomes, "no rank was left to tell"
    for one in outcomes:
        if one.raised is not None and (kind is None or not isinstance(one.error, kind)):
            one.raised.reraise()
        assert kind is None or one.raised is not None, f"rank {one.rank} saw no error"
        # How long a save takes that succeeds is no fault: its own deadline limits it.
        is_late = kind is not None and one.seconds > within_s
        assert not is_late, f"rank {one.rank} learned it after {one.seconds:.1f} s"
        missing = [word for word in words if word not in str(one.error)]
        assert not missing, f"rank {one.rank} is not told of {missing}: {one.error}"
        if isinstance(one.error, CheckpointError):
            assert one.error.phase, f"rank {one.rank} is not told the phase: {one.error}"


class Resources:
    """What this process holds that a save might leave behind (I6)."""

    def __init__(self, root: Path, *, with_slots: bool = True) -> None:
        """Remember what is held now; one rank alone may look at the slots that they share."""
        self._root = root
        self._with_slots = with_slots
        self._before = self._held()

    def leaked(self, *, settle_s: float = _SETTLE_S) -> list[str]:
        """Return what is held now and was not before; threads get a moment to end."""
        until = time.monotonic() + settle_s
        while more := self._held() - self._before:
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        return [*more, *(self._taken_slots() if self._with_slots else ())]

    @staticmethod
    def _held() -> Counter[str]:
        held: Counter[str] = Counter()
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{fd}")
                if target.startswith("/") and not target.startswith(("/proc", "/dev")):
                    held[f"file {target}"] += 1
        for thread in threading.enumerate():
            held[f"thread {re.sub(r'[-_0-9]+$', '', thread.name)}"] += 1
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                children = Path(f"/proc/self/task/{task}/children").read_text()
                held["children"] += len(children.split())
        return held

    def _taken_slots(self) -> list[str]:
        slots = writer_options(self._root)["slots"]
        try:
            with contextlib.ExitStack() as stack:
                for _ in range(SLOT_COUNT):
                    stack.enter_context(slots.hold(str(self._root), "dcp", deadline=0.0))
        except TimeoutError as error:
            return [str(error)]
        return []


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault that no process dies of, and what the save comes to."""

    fault: Fault
    kind: type[BaseException] | None
    """Error of every rank; `None` if the save succeeds."""
    words: tuple[str, ...] = ()
    """What the error names."""
    committed: Literal["nothing", "dcp", "both"] = "nothing"
    """What is there after the struck save."""
    is_first_kept: bool = False
    """Whether the struck save is to overwrite the first one, and not to save beside it."""
    hits: int = 1
    """How often the fault strikes, at least."""
    within_s: float = AT_ONCE_S
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Episode:
    """What one rank saw of a case."""

    struck: Outcome
    again: Outcome
    problems: list[str]
    """What does not hold, in words; empty if all does."""


def episodes(
    rank: int, world_size: int, root: Path, cases: Mapping[str, Case]
) -> dict[str, Episode]:
    """Live through cases one after another in the same processes."""
    found = {}
    for name, case in cases.items():
        own = root / name.replace(" ", "-").replace("/", "-")
        if rank == 0:
            own.mkdir()
        dist.barrier()
        found[name] = episode(rank, own, case)
    return found


class Episodes:
    """Lives through cases when tests ask for them, a few of them in one set of ranks.

    The ranks clean up after one case for the next one. All cases in one set of ranks would take
    longer than one test may, on a busy machine.
    """

    def __init__(self, root: Path, cases: Mapping[str, Case], world_size: int) -> None:
        """Live below `root`."""
        self.root = root
        self._cases, self._world_size = cases, world_size
        self._seen: dict[str, list[Episode] | BaseException] = {}

    def of(self, name: str) -> list[Episode]:
        """Return what each rank saw of a case.

        Raises:
            BaseException: What the ranks raised that live through this case.
        """
        if name not in self._seen:
            names = list(self._cases)
            first = names.index(name) // _CASES_AT_A_TIME * _CASES_AT_A_TIME
            self._live(names[first : first + _CASES_AT_A_TIME])
        seen = self._seen[name]
        if isinstance(seen, BaseException):
            raise seen
        return seen

    def _live(self, names: Sequence[str]) -> None:
        cases = {name: self._cases[name] for name in names}
        try:
            ranks = run_ranks(episodes, self._world_size, self.root, cases, timeout_s=200)
        except BaseException as error:  # noqa: BLE001 raised for each of the cases
            self._seen |= dict.fromkeys(names, error)
        else:
            self._seen |= {name: [rank[name] for rank in ranks] for name in names}


def episode(rank: int, root: Path, case: Case) -> Episode:
    """Save, save with a fault, save again without; check the storage after each.

    Called by all ranks of the default group, none of which the fault may take away.
    """
    name = "step-1" if case.is_first_kept else "step-2"
    options = dict(case.options) | ({"overwrite": True} if case.is_first_kept else {})
    first = save(root, "step-1", 1)
    problems = [] if first.raised is None else [f"the first save failed: {first.raised.text}"]
    resources = Resources(root, with_slots=rank == 0)
    with case.fault.installed(rank, root):
        struck = save(root, name, 2, **options)
    if options.get("is_sync"):
        # A synchronous save that failed is released with torch's frames, which are part of a cycle.
        gc.collect()
    dist.barrier()
    expected = {"step-1": 1} | ({} if case.committed == "nothing" else {name: 2})
    without = [name] if case.committed == "dcp" else []
    problems += _storage_problems(rank, root, expected, without)
    problems += [f"leaked {leak}" for leak in resources.leaked()]
    if case.committed == "nothing":
        again = save(root, name, 3, **options)
        expected[name] = 3
    else:
        again = save(root, "step-3", 3)
        expected["step-3"] = 3
    dist.barrier()
    problems += _storage_problems(rank, root, expected, without)
    total = torch.ones(())
    dist.all_reduce(total)
    if total != dist.get_world_size():
        problems.append("the training process group does not work any more")
    return Episode(struck, again, problems)


def _storage_problems(
    rank: int, root: Path, expected: Mapping[str, int], without: Sequence[str]
) -> list[str]:
    if rank != 0:
        return []
    try:
        check_storage(root, expected, without_export=without)
    except BaseException as error:  # noqa: BLE001 the other ranks wait; it is told at the end
        return [f"{type(error).__name__}: {error}"]
    return []


def check_episodes(root: Path, name: str, case: Case, found: Sequence[Episode]) -> None:
    """Check I1 to I8 for what all ranks saw of a case.

    Raises:
        AssertionError: If the fault did not strike, or something does not hold.
    """
    own = root / name.replace(" ", "-").replace("/", "-")
    assert len(hits(own)) >= case.hits, f"the fault struck {len(hits(own))} times"
    problems = [problem for one in found for problem in one.problems]
    assert not problems, "; ".join(problems)
    check_outcomes([e.struck for e in found], case.kind, case.words, within_s=case.within_s)
    assert len({str(one.struck.error) for one in found}) == 1, "ranks saw different errors"
    check_outcomes([one.again for one in found], None)


def number_of(code: int) -> str:
    """Return the name of an error number."""
    return errno.errorcode[code]
