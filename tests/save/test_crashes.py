"""A process is killed at every point of a save.

The previous checkpoint must stay, the new one be there whole or not at all, every rank that is left
be told who is missing, and the next save of the same step need no help.
"""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.errors import RankLostError
from dcp_hf_writer.failpoints import (
    APART_POINTS,
    EXCHANGE_POINTS,
    POINTS,
    REUSE_POINTS,
    SHARING_POINTS,
    TARGET_POINTS,
)
from support.faults import (
    TIMEOUT_S,
    Outcome,
    Resources,
    Strike,
    check_outcomes,
    check_storage,
    hits,
    save,
)
from support.ranks import run_ranks, spawn_ranks
from support.taken_targets import FILES, files_of_others, put_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

WORLD_SIZE = 2
# The next save comes from another number of ranks, as after a restart on what is left.
WORLD_SIZE_AFTER = 3
# Cases that run at a time; most of the time they wait for a rank that will not answer.
AT_A_TIME = 6

OF_THE_COORDINATOR = (
    "directory made",
    "headers written",
    "before manifest",
    "before rename",
    *TARGET_POINTS,
    "after rename",
    "before reply",
)
COMMITTED = (*TARGET_POINTS[1:], "after rename", "before reply")
# `test_shared_blocks` kills a save at each clone, on file systems that can clone.
# `test_reuse_clones` does so at each link and clone of an earlier file.
RARE = TARGET_POINTS + SHARING_POINTS + EXCHANGE_POINTS + APART_POINTS + REUSE_POINTS
EVERY_SAVE = tuple(point for point in POINTS if point not in RARE)
REPEATED = ("mid dcp", "mid hf")

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Crash:
    """Which rank dies where."""

    strike: Strike
    overwrite: bool = False
    has_files: bool = False
    """Whether a trainer keeps files of its own in the directory that is overwritten."""

    @property
    def name(self) -> str:
        words = [self.strike.point, "of rank", str(self.strike.rank)]
        words += ["overwrite"] * self.overwrite + ["with files"] * self.has_files
        return "-".join(" ".join(words).split())

    @property
    def survivor(self) -> int:
        return 1 - self.strike.rank

    def committed(self) -> dict[str, int]:
        """Return what must be there after the crash: save 1, and save 2 or 3 as `step-2`."""
        if self.strike.point in COMMITTED:
            return {"step-1": 1, "step-2": 3}
        return {"step-1": 1, "step-2": 2} if self.overwrite else {"step-1": 1}


def strike(point: str, rank: int) -> Strike:
    return Strike(rank=rank, point=point, action="kill", hit=2 if point in REPEATED else 1)


CRASHES = {
    crash.name: crash
    for crash in (
        *(Crash(strike(p, 0)) for p in EVERY_SAVE),
        *(Crash(strike(p, 1)) for p in EVERY_SAVE if p not in OF_THE_COORDINATOR),
        *(Crash(strike(p, 0), overwrite=True) for p in EVERY_SAVE if p in OF_THE_COORDINATOR),
        *(Crash(strike(p, 0), overwrite=True, has_files=True) for p in TARGET_POINTS),
    )
}


@dataclass
class Life:
    """What became of a save that a rank did not survive."""

    root: Path
    exitcode: int | None = None
    survivor: tuple[Outcome, list[str]] | None = None
    problems: list[str] = field(default_factory=list)
    again: list[Outcome] = field(default_factory=list)


def save_and_crash(
    rank: int, world_size: int, root: Path, crash: Crash
) -> tuple[Outcome, list[str]]:
    check_outcomes([save(root, "step-1", 1)], None)
    if crash.overwrite:
        check_outcomes([save(root, "step-2", 2)], None)
    if crash.has_files and rank == 0:
        put_files(root / "step-2")
    resources = Resources(root)
    with crash.strike.installed(rank, root):
        struck = save(root, "step-2", 3, overwrite=crash.overwrite)
    return struck, resources.leaked()


def save_again(rank: int, world_size: int, jobs: Sequence[tuple[Path, bool]]) -> list[Outcome]:
    return [save(root, "step-2", 4, overwrite=overwrite) for root, overwrite in jobs]


_one_at_a_time = threading.Lock()


def live(crash: Crash, root: Path) -> Life:
    """Let ranks save and one of them die; look at the storage when all are gone."""
    root.mkdir()
    with _one_at_a_time:
        handle = spawn_ranks(save_and_crash, WORLD_SIZE, root, crash, timeout_s=60)
    with handle:
        outcomes = handle.outcomes()
    life = Life(root, exitcode=outcomes[crash.strike.rank].exitcode)
    left = outcomes[crash.survivor]
    life.survivor = left.value
    if left.error is not None:
        life.problems.append(f"the survivor failed: {left.error}")
    # Only what a dead coordinator cannot remove any more may be left.
    may_leave = crash.strike.rank == 0
    note_problem(life, lambda: check_state(crash, root, crash.committed(), may_leave=may_leave))
    return life


def check_state(
    crash: Crash, root: Path, committed: dict[str, int], *, may_leave: bool = False
) -> None:
    files = FILES if crash.has_files else {}
    check_storage(root, committed, may_leave=may_leave, others=[*files])
    assert files_of_others(root / "step-2", files) == files


def note_problem(life: Life, check: Callable[[], None]) -> None:
    try:
        check()
    except BaseException as error:  # noqa: BLE001 told by the test of this case
        life.problems.append(f"{type(error).__name__}: {error}")


@pytest.fixture(scope="module")
def lives(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Life]:
    """Live through the crashes that were asked for, then save again in fresh processes."""
    asked = [
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.module is request.module
        and hasattr(item, "callspec")
        and "name" in item.callspec.params
    ]
    base = tmp_path_factory.mktemp("crashes")
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        waiting = {n: pool.submit(live, CRASHES[n], base / n) for n in dict.fromkeys(asked)}
        found = {name: future.result() for name, future in waiting.items()}
    jobs = [(life.root, "step-2" in CRASHES[name].committed()) for name, life in found.items()]
    again = run_ranks(save_again, WORLD_SIZE_AFTER, jobs)
    for i, (name, life) in enumerate(found.items()):
        life.again = [of_rank[i] for of_rank in again]
        root = life.root
        crash, after = CRASHES[name], {"step-1": 1, "step-2": 4}
        note_problem(life, lambda c=crash, r=root, a=after: check_state(c, r, a))
    return found


@pytest.mark.parametrize("name", CRASHES)
def test_one_whole_checkpoint_is_there_when_a_rank_dies(name: str, lives: dict[str, Life]) -> None:
    crash, life = CRASHES[name], lives[name]
    rank = crash.strike.rank
    assert hits(life.root) == [f"{rank} kill {crash.strike.point}"], "the point was not reached"
    assert life.exitcode == -signal.SIGKILL
    assert life.problems == []
    assert life.survivor is not None
    outcome, leaked = life.survivor
    words = (f"rank {rank} (", str(life.root / "step-2"))
    check_outcomes([outcome], RankLostError, words, within_s=TIMEOUT_S / 2)
    assert leaked == []
    check_outcomes(life.again, None)


def test_every_point_of_a_save_has_a_crash() -> None:
    assert {crash.strike.point for crash in CRASHES.values()} == set(POINTS) - {
        *REUSE_POINTS,
        *SHARING_POINTS,
        *EXCHANGE_POINTS,
        *APART_POINTS,
    }
    assert set(OF_THE_COORDINATOR) <= set(POINTS)


def save_and_note_points(rank: int, world_size: int, root: Path) -> list[str]:
    from dcp_hf_writer import failpoints

    reached: list[str] = []
    failpoints.set_hook(reached.append)
    check_outcomes([save(root, "step-1", 1)], None)
    return reached


def test_every_rank_reaches_the_points_that_crashes_are_tried_at(tmp_path: Path) -> None:
    first, second = run_ranks(save_and_note_points, WORLD_SIZE, tmp_path / "run")
    assert set(first) == set(EVERY_SAVE)
    assert set(second) == set(EVERY_SAVE) - set(OF_THE_COORDINATOR)
