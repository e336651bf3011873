"""Ranks that fail, die, fall silent or come back late: who is told what, and when."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.errors import (
    CheckpointError,
    ExportError,
    RankLostError,
    SaveAbortedError,
    SaveTimeoutError,
    StagingError,
    TargetExistsError,
)
from support.faults import (
    AFTER_DEADLINE_S,
    AT_ONCE_S,
    Case,
    Episodes,
    Outcome,
    Strike,
    check_episodes,
    check_outcomes,
    check_storage,
    hits,
    save,
    writer_options,
)
from support.named_bytes import save_held_by, sharded_state
from support.processes import FreshProcess
from support.rank_process import Raised
from support.ranks import run_ranks, spawn_ranks
from support.struck_process import StruckPlanner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from support.ranks import StoreHost

WORLD_SIZE = 2

pytestmark = pytest.mark.timeout(240)


# A rank fails and lives on


def raises(rank: int, point: str, **more: Any) -> Case:
    fault = Strike(rank=rank, point=point, action="raise")
    words = (f"injected at {point}",)
    return Case(fault=fault, **({"kind": CheckpointException, "words": words} | more))


CASES: dict[str, Case] = {
    **{
        f"{point} of rank {rank}": raises(rank, point)
        for rank, point in (
            (0, "local plan"),
            (1, "local plan"),
            (0, "directory made"),
            (0, "headers written"),
            (0, "before slot"),
            (1, "before slot"),
            (0, "mid dcp"),
            (1, "mid dcp"),
            (1, "before fsync"),
            (1, "after fsync"),
            (0, "before report"),
            (1, "before report"),
            (0, "before manifest"),
            (0, "before rename"),
        )
    },
    **{
        f"{point} of rank 0": raises(0, point, committed="both")
        for point in ("after rename", "before reply")
    },
    **{
        f"mid hf of rank {rank}": raises(rank, "mid hf", kind=ExportError, committed="dcp")
        for rank in (0, 1)
    },
    **{
        f"{point} of rank {rank}, synchronous": raises(rank, point, options={"is_sync": True})
        for rank, point in (
            (1, "local plan"),
            (0, "mid dcp"),
            (1, "mid dcp"),
            (0, "before manifest"),
        )
    },
}


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Episodes:
    return Episodes(tmp_path_factory.mktemp("failing"), CASES, WORLD_SIZE)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_gets_the_error_at_once_when_one_fails(name: str, lives: Episodes) -> None:
    check_episodes(lives.root, name, CASES[name], lives.of(name))


# A rank falls silent

STOP_TIMEOUT_S = 4.0
AT_A_TIME = 5


@dataclass(frozen=True)
class Stop:
    """Which rank falls silent where, and comes back when all is over."""

    strike: Strike
    world_size: int = 2
    store: StoreHost = "parent"
    committed: bool = False
    """Whether it fell silent after the commit."""
    names: str | None = None
    """What the others are told; the number of the rank by default."""


def stop(rank: int, point: str, **more: Any) -> Stop:
    return Stop(Strike(rank=rank, point=point, action="stop"), **more)


STOPS = {
    "in its plan": stop(1, "local plan"),
    "writing": stop(1, "mid dcp", world_size=3),
    "before its report": stop(1, "before report", world_size=3),
    "coordinator in its plan": stop(0, "directory made"),
    "coordinator writing": stop(0, "mid hf", world_size=3),
    "coordinator before the rename": stop(0, "before rename"),
    "coordinator after the rename": stop(0, "after rename", committed=True),
    "coordinator before its reply": stop(0, "before reply", committed=True),
    "host of the store": stop(0, "mid dcp", store="rank0"),
}


def save_until_stopped(rank: int, world_size: int, root: Path, strike: Strike) -> Outcome:
    check_outcomes([save(root, "step-1", 1)], None)
    with strike.installed(rank, root):
        struck = save(root, "step-2", 2, timeout_s=STOP_TIMEOUT_S)
    draft = root.parent / f"{root.name}.draft-{rank}"
    draft.write_bytes(pickle.dumps(struck))
    draft.rename(root.parent / f"{root.name}.outcome-{rank}")
    # The caller knows by now; the thread of the save learns of the end when all ranks are back.
    for thread in threading.enumerate():
        if thread.name.startswith("AsyncCheckpointExecutor"):
            thread.join(20)
            assert not thread.is_alive()
    return struck


def save_once(rank: int, world_size: int, root: Path) -> Outcome:
    return save(root, "step-2", 4)


@dataclass
class Silence:
    """What was seen of a rank that fell silent and came back."""

    root: Path
    survivors: list[Outcome] = field(default_factory=list)
    stopped: Outcome | None = None
    problems: list[str] = field(default_factory=list)


_one_at_a_time = threading.Lock()


def fall_silent(case: Stop, root: Path) -> Silence:
    root.mkdir()
    seen = Silence(root)
    rank = case.strike.rank
    others = [other for other in range(case.world_size) if other != rank]
    with _one_at_a_time:
        handle = spawn_ranks(
            save_until_stopped, case.world_size, root, case.strike, timeout_s=60, store=case.store
        )
    with handle:
        awaited = [root.parent / f"{root.name}.outcome-{other}" for other in others]
        wait_for(awaited, STOP_TIMEOUT_S + 2 * AFTER_DEADLINE_S + 5)
        seen.survivors = [pickle.loads(path.read_bytes()) for path in awaited]
        committed = {"step-1": 1, **({"step-2": 2} if case.committed else {})}
        note(seen, lambda: check_storage(root, committed, may_leave=True))
        if not case.committed:
            # The next attempt wins while the old rank is still there, and could wake up any time.
            with _one_at_a_time:
                again = spawn_ranks(save_once, 1, root)
            with again:
                note(seen, lambda: check_outcomes(again.results(), None))
            committed["step-2"] = 4
        handle.kill(rank, signal.SIGCONT)
        outcomes = handle.outcomes(30)
        seen.stopped = outcomes[rank].value
        seen.problems += [f"rank {o.rank}: {o.error}" for o in outcomes if o.error is not None]
        note(seen, lambda: check_storage(root, committed))
    return seen


def note(seen: Silence, check: Callable[[], None]) -> None:
    try:
        check()
    except BaseException as error:  # noqa: BLE001 told by the test of this case
        seen.problems.append(f"{type(error).__name__}: {error}")


def wait_for(paths: Sequence[Path], limit_s: float) -> None:
    until = time.monotonic() + limit_s
    while not all(path.exists() for path in paths):
        missing = [path.name for path in paths if not path.exists()]
        assert time.monotonic() < until, f"{missing} did not come within {limit_s} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def silences(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Any]:
    """Let ranks fall silent side by side, since most of the time all of them wait."""
    asked = [
        item.callspec.params["how"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and hasattr(item, "callspec")
        and "how" in item.callspec.params
    ]
    base = tmp_path_factory.mktemp("silent")
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        names = dict.fromkeys(asked)
        return {
            how: pool.submit(fall_silent, STOPS[how], base / how.replace(" ", "-")) for how in names
        }


@pytest.mark.parametrize("how", STOPS)
def test_survivors_are_told_by_the_deadline_when_a_rank_falls_silent(
    how: str, silences: Mapping[str, Any]
) -> None:
    case, seen = STOPS[how], silences[how].result()
    rank = case.strike.rank
    assert hits(seen.root) == [f"{rank} stop {case.strike.point}"]
    for one in seen.survivors:
        assert one.seconds >= STOP_TIMEOUT_S - 0.5, "the error came before the deadline"
    words = (case.names or f"rank {rank}", "step-2")
    limit_s = STOP_TIMEOUT_S + AFTER_DEADLINE_S
    check_outcomes(seen.survivors, RankLostError, words, within_s=limit_s)
    for one in seen.survivors:
        assert ("not committed" in str(one.error)) <= (not case.committed), one.error
    assert seen.problems == []
    assert seen.stopped is not None
    if not case.committed:
        assert isinstance(seen.stopped.error, CheckpointError), seen.stopped.error


# A rank is lost


def save_and_lose(rank: int, world_size: int, root: Path, strike: Strike) -> Outcome:
    check_outcomes([save(root, "step-1", 1)], None)
    with strike.installed(rank, root):
        return save(root, "step-2", 2)


@pytest.mark.parametrize("lost", [0, 1])
def test_survivor_is_told_at_once_when_a_rank_dies_and_rank_0_hosts_the_store(
    lost: int, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    strike = Strike(rank=lost, point="mid dcp", action="kill")
    with spawn_ranks(save_and_lose, WORLD_SIZE, root, strike, store="rank0") as handle:
        outcomes = handle.outcomes(60)
    assert outcomes[lost].exitcode == -signal.SIGKILL
    survivor = outcomes[1 - lost].value
    check_outcomes([survivor], RankLostError, (f"rank {lost}", "step-2"), within_s=10)
    check_storage(root, {"step-1": 1}, may_leave=lost == 0)
    check_outcomes(run_ranks(save_alone, 1, root), None)
    check_storage(root, {"step-1": 1, "step-2": 4})


def save_alone(rank: int, world_size: int, root: Path) -> Outcome:
    return save(root, "step-2", 4)


def save_unless_absent(rank: int, world_size: int, root: Path) -> Outcome | None:
    check_outcomes([save(root, "step-1", 1)], None)
    if rank == 1:
        wait_for([root.parent / "told"], 30)
        return None
    struck = save(root, "step-2", 2, timeout_s=2.0)
    (root.parent / "told").touch()
    return struck


def test_rank_is_named_that_never_began_the_save(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    with spawn_ranks(save_unless_absent, WORLD_SIZE, root) as handle:
        first = handle.outcomes(30)[0].value
    check_outcomes(
        [first], RankLostError, ("no answer from rank 1 (",), within_s=2.0 + AFTER_DEADLINE_S
    )
    check_storage(root, {"step-1": 1})


def save_what_one_rank_cannot_stage(
    rank: int, world_size: int, root: Path, export: HFExport
) -> list[Outcome]:
    mesh_state = sharded_state(2)
    if rank == 1:
        mesh_state["model"]["extra"] = torch.eye(3).to_sparse()
    began = time.monotonic()
    raised = None
    try:
        writer = HFDualWriter(root / "step-1", **writer_options(root))
        dcp.async_save(mesh_state, storage_writer=writer).result(60)
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        raised = Raised.of(error)
    struck = Outcome(rank, raised, time.monotonic() - began)
    unread = save(root, "step-1", 2, export=export)
    return [struck, unread, save(root, "step-2", 3)]


def test_every_rank_gets_the_error_when_one_cannot_even_begin(tmp_path: Path) -> None:
    """What fails in the training thread of one rank must not leave the others in a collective."""
    root = tmp_path / "run"
    root.mkdir()
    # Only the coordinator reads the assets, and with a dtype it has to understand this one.
    export = HFExport(assets={"config.json": b"no json"}, dtype="bfloat16")
    found = run_ranks(save_what_one_rank_cannot_stage, WORLD_SIZE, root, export)
    struck, unread, after = zip(*found, strict=True)
    check_outcomes(struck, StagingError, ("rank 1", "model.extra", "sparse"))
    check_outcomes(unread, ExportError, ("assets", "JSONDecodeError"))
    check_outcomes(after, None)
    check_storage(root, {"step-1": 2, "step-2": 3}, without_export=["step-1"])


# The training beside the save


# Longer than the other ranks may keep a step of the training waiting on a busy machine.
TRAINING_TIMEOUT_S = 3.0


def save_beside_training(rank: int, world_size: int, root: Path) -> tuple[Outcome, int]:
    training = dist.new_group(timeout=timedelta(seconds=TRAINING_TIMEOUT_S))
    strike = Strike(rank=1, point="mid dcp", action="delay", seconds=2 * TRAINING_TIMEOUT_S)
    with strike.installed(rank, root):
        writer = HFDualWriter(root / "step-1", **writer_options(root))
        began = time.monotonic()
        future = dcp.async_save(sharded_state(1), storage_writer=writer)
        steps = 0
        # Equally often on all ranks, as a training loop.
        while steps < 100:
            dist.all_reduce(torch.ones(8), group=training)
            time.sleep(0.02)
            steps += 1
        future.result(30)
    return Outcome(rank, None, time.monotonic() - began), steps


def test_training_with_a_short_timeout_goes_on_beside_a_slow_save(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    found = run_ranks(save_beside_training, WORLD_SIZE, root)
    assert len(hits(root)) == 1
    assert all(outcome.seconds > 2 * TRAINING_TIMEOUT_S for outcome, _ in found)
    assert [steps for _, steps in found] == [100, 100]
    check_storage(root, {"step-1": 1})


# Saves beside saves


def wait_for_go(root: Path) -> None:
    wait_for([root.parent / "go"], 60)


def save_twice_at_once(rank: int, world_size: int, root: Path) -> bool:
    """Begin a second save while the first one is held up; say whether it waited."""
    strike = Strike(rank=1, point="mid dcp", action="call", call=wait_for_go)
    options = writer_options(root) | {"timeout_s": 100.0}
    with strike.installed(rank, root), ThreadPoolExecutor(1) as training:
        states = [sharded_state(number) for number in (1, 2)]
        writers = [HFDualWriter(root / f"step-{n}", **options) for n in (1, 2)]
        first = dcp.async_save(states[0], storage_writer=writers[0])
        second = training.submit(dcp.async_save, states[1], storage_writer=writers[1])
        waited = not wait([second], timeout=0.5).done and not first.done()
        dist.barrier(dist.new_group())
        if rank == 0:
            (root.parent / "go").touch()
        for future in (first, second.result(60)):
            future.result(60)
    return waited


def test_second_save_waits_when_one_is_in_flight(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    assert run_ranks(save_twice_at_once, WORLD_SIZE, root) == [True, True]
    assert len(hits(root)) == 1
    check_storage(root, {"step-1": 1, "step-2": 2})


def meet(root: Path) -> None:
    """Wait until two processes are here."""
    (root.parent / f"here-{os.getpid()}").touch()
    until = time.monotonic() + 20
    while len(list(root.parent.glob("here-*"))) < 2:
        assert time.monotonic() < until, "the other job did not come"
        time.sleep(0.005)


def save_as_job(root: Path, name: str, number: int, options: dict[str, Any]) -> Outcome:
    meeting = Strike(rank=0, point="before rename", action="call", call=meet)
    with meeting.installed(0, root):
        return save(root, name, number, **options)


def run_jobs(root: Path, names: Sequence[str], **options: Any) -> list[Outcome]:
    with contextlib.ExitStack() as stack:
        jobs = [
            stack.enter_context(FreshProcess(save_as_job, root, name, number, options))
            for number, name in enumerate(names, 2)
        ]
        return [job.result() for job in jobs]


def test_one_of_two_jobs_wins_whole_when_both_save_to_one_target(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    outcomes = run_jobs(root, ["step-1", "step-1"])
    assert len(hits(root)) == 2, "they did not meet before the rename"
    winners = [i for i, outcome in enumerate(outcomes) if outcome.raised is None]
    assert len(winners) == 1
    check_outcomes([outcomes[1 - winners[0]]], TargetExistsError, ("step-1",))
    check_storage(root, {"step-1": 2 + winners[0]})


def test_last_of_two_jobs_stays_whole_when_both_overwrite_one_target(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    check_outcomes([save(root, "step-1", 1)], None)
    check_outcomes(run_jobs(root, ["step-1", "step-1"], overwrite=True), None)
    assert len(hits(root)) == 2, "they did not meet before the rename"
    number = save_held_by(root / "step-1")
    assert number in {2, 3}
    check_storage(root, {"step-1": number})


def test_two_jobs_save_side_by_side_into_one_directory(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    check_outcomes(run_jobs(root, ["step-1", "step-2"]), None)
    check_storage(root, {"step-1": 2, "step-2": 3})


# The checkpointer process

# Deadlines to try: on a busy machine the process may not reach the writing by the first ones.
PROCESS_TIMEOUTS_S = (6.0, 12.0, 24.0, 48.0)


def save_in_process(
    rank: int, world_size: int, root: Path, sig: signal.Signals, timeout_s: float
) -> tuple[Outcome, Outcome, float] | None:
    """Save, save with a struck process, save again.

    Returns:
        The outcomes of the last two, and when the struck one was told, in seconds after the strike;
        `None` if the deadline came before the process was where it is struck.
    """
    process = AsyncCheckpointerType.PROCESS

    def saved(name: str, number: int, planner: Any, timeout_s: float) -> Outcome:
        writer = HFDualWriter(root / name, **(writer_options(root) | {"timeout_s": timeout_s}))
        began, raised = time.monotonic(), None
        try:
            dcp.async_save(
                sharded_state(number),
                storage_writer=writer,
                planner=planner,
                async_checkpointer_type=process,
            ).result(60)
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            raised = Raised.of(error)
        return Outcome(rank, raised, time.monotonic() - began)

    check_outcomes([saved("step-1", 1, StruckPlanner(root, None), 60.0)], None, within_s=60)
    # A second before the deadline: what is struck later proves nothing.
    planner = StruckPlanner(root, sig, time.monotonic() + timeout_s - 1)
    struck = saved("step-2", 2, planner, timeout_s)
    told = time.time()
    if not hits(root):
        return None
    told -= Path(f"{root}.hits").stat().st_mtime
    check_storage(root, {"step-1": 1}, may_leave=True)
    pid = int(hits(root)[0])
    if sig == signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
        wait_until_over(root)
        check_storage(root, {"step-1": 1}, may_leave=True)
    # The slab is free again; torch does not start another checkpointer process, a thread will do.
    again = save(root, "step-2", 3)
    return struck, again, told


def wait_until_over(root: Path) -> None:
    """Wait until the save of the checkpointer process has ended, well or not."""
    until = time.monotonic() + 60
    while any(t.name.startswith("ThreadPoolExecutor") for t in threading.enumerate()):
        assert time.monotonic() < until, "the checkpointer process did not come to an end"
        time.sleep(0.02)


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_future_resolves_when_the_checkpointer_process_is(
    sig: signal.Signals, tmp_path: Path
) -> None:
    for timeout_s in (60.0,) if sig == signal.SIGKILL else PROCESS_TIMEOUTS_S:
        root = tmp_path / f"run-{timeout_s:.0f}"
        root.mkdir()
        (found,) = run_ranks(save_in_process, 1, root, sig, timeout_s, timeout_s=200)
        if found is not None:
            break
    assert found is not None, "the process was never struck"
    struck, again, told_s = found
    assert len(hits(root)) == 1
    if sig == signal.SIGKILL:
        words = ("dead", "step-2", "torch does not restart")
        check_outcomes([struck], SaveAbortedError, words, within_s=60)
        assert told_s < AT_ONCE_S
    else:
        words = ("step-2", "checkpointer process")
        limit_s = timeout_s + AFTER_DEADLINE_S
        check_outcomes([struck], SaveTimeoutError, words, within_s=limit_s)
    check_outcomes([again], None)
    check_storage(root, {"step-1": 1, "step-2": 3})
