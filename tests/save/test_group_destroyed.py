"""The process group is destroyed while a save is in flight, as in the last lines of many scripts.

torch then takes each rank for a run of one. Every rank must learn that, and nothing may be
published unless all ranks had reported before.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import AsyncStager

from dcp_hf_writer import HFDualWriter, failpoints, verify
from dcp_hf_writer.errors import RankLostError, SaveAbortedError
from support.processes import FreshProcess
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

WORLD_SIZE = 2
LIMIT_S = 60.0

pytestmark = pytest.mark.timeout(300)
HINT = "wait for the result of the future that async_save returns"
HELD = "before it begins"

Group = Literal["default", "new"]


@dataclass(frozen=True)
class Case:
    """Who destroys which group, and how far the save has come by then."""

    who: tuple[int, ...]
    point: str
    group: Group = "default"

    @property
    def name(self) -> str:
        """Name of the test."""
        return f"{self.group} {'+'.join(map(str, self.who))} {self.point}"


CASES = {
    case.name: case
    for case in (
        *(Case(who, HELD) for who in ((0, 1), (0,), (1,))),
        *(Case(who, HELD, "new") for who in ((0, 1), (0,), (1,))),
        *(Case(who, "local plan") for who in ((0, 1), (0,), (1,))),
        *(Case(who, "before report") for who in ((0, 1), (0,), (1,))),
        *(Case(who, "before report", "new") for who in ((0, 1), (1,))),
        Case((0,), "before manifest"),
        Case((0,), "before reply"),
    )
}


class Hold:
    """Holds the thread of a save at a point until the training thread has acted."""

    def __init__(self, point: str) -> None:
        self._point = point
        self.arrived, self.go_on = threading.Event(), threading.Event()
        failpoints.set_hook(self.reach)

    def reach(self, point: str) -> None:
        if point == self._point:
            self.arrived.set()
            assert self.go_on.wait(LIMIT_S)

    def wait(self) -> None:
        assert self.arrived.wait(LIMIT_S), "the save did not come to the point"

    def act(self, what: Any) -> None:
        self.wait()
        what()
        self.go_on.set()
        failpoints.set_hook(None)


class HeldStager(AsyncStager):
    """Stages with a writer, or not at all; holds the save before torch looks for its group."""

    should_synchronize_after_execute = False

    def __init__(self, writer: HFDualWriter | None, hold: Hold) -> None:
        self._writer, self._hold = writer, hold

    def stage(self, state_dict: dict[str, Any]) -> Any:
        staged = state_dict if self._writer is None else self._writer.stage(state_dict)
        held: Future[Any] = Future()

        def release() -> None:
            self._hold.reach(HELD)
            held.set_result(staged)

        threading.Thread(target=release).start()
        return held

    def close(self) -> None:
        """Nothing to close."""


def save_held(
    path: Path, state: dict[str, Any], hold: Hold, *, is_ours: bool = True, **options: Any
) -> Future[Any]:
    """Save with our stager, or with one that does nothing."""
    writer = HFDualWriter(path, process_group=options.get("process_group"))
    stager = HeldStager(writer if is_ours else None, hold)
    response = dcp.async_save(state, storage_writer=writer, async_stager=stager, **options)
    return response.upload_completion


def own_part(rank: int) -> dict[str, Any]:
    """Return what a pipeline stage holds: keys that no other rank has."""
    return {"model": {f"stage{rank}.w": torch.full((8, 8), float(rank))}}


def join(name: str, rank: int, world_size: int) -> dist.Store:
    """Make the default group anew, as each script does that runs for itself; returns its store."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    own = dist.PrefixStore(name, store)
    dist.init_process_group(
        "gloo",
        store=own,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=LIMIT_S),
    )
    return own


def failure_of(future: Any) -> BaseException | None:
    try:
        future.result(LIMIT_S)
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        # As for a caller who does not keep the error: its frames hold the group, and gloo closes
        # the connections of a destroyed group when nobody holds it.
        error.__traceback__ = error.__cause__ = error.__context__ = None
        gc.collect()
        return error
    return None


def destroy_in_flight(rank: int, root: Path, case: Case, store: dist.Store) -> BaseException | None:
    group = None if case.group == "default" else dist.new_group()
    # A rank that destroyed the group now would break the others' start of it.
    dist.barrier(group)
    # Only the ranks of the case are held: the others wait for them in a collective.
    hold = Hold(case.point if rank in case.who else "nowhere")
    future = save_held(root / "x", own_part(rank), hold, process_group=group)
    if rank in case.who:
        hold.wait()
        # A rank that learns of the loss of another no longer comes to the point.
        store.set(f"at the point {rank}", "")
        store.wait([f"at the point {other}" for other in case.who])
        hold.act(lambda: dist.destroy_process_group(group))
    return failure_of(future)


def live_through_cases(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    dist.destroy_process_group()
    found = {}
    for name, case in CASES.items():
        own = root / name
        own.mkdir(exist_ok=True)
        store = join(name, rank, world_size)
        error = destroy_in_flight(rank, own, case, store)
        if dist.is_initialized():
            dist.destroy_process_group()
        join(f"{name} after", rank, world_size)
        dist.barrier()
        left = sorted(os.listdir(own))
        dist.barrier()
        dcp.async_save(own_part(rank), storage_writer=HFDualWriter(own / "y")).result(LIMIT_S)
        found[name] = error, left
        dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Live through all cases in the same processes, one after another."""
    root = tmp_path_factory.mktemp("groups")
    return root, run_ranks(live_through_cases, WORLD_SIZE, root, timeout_s=240)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_is_told_and_nothing_is_published_when_the_group_is_destroyed(
    name: str, found: tuple[Path, list[dict[str, Any]]]
) -> None:
    root, ranks = found
    case = CASES[name]
    is_committed = case.point == "before reply"
    for rank, of_rank in enumerate(ranks):
        error, left = of_rank[name]
        if rank not in case.who:
            # A busy machine may be too slow for the word of the rank that left: it counts as lost.
            assert isinstance(error, (SaveAbortedError, RankLostError)), (rank, error)
        elif case.group == "new" and case.point == HELD and isinstance(error, ValueError):
            # torch looks at a group that it was given before it calls anything of ours.
            assert "group" in str(error)
        else:
            assert isinstance(error, SaveAbortedError), (rank, error)
        assert "wait for the" in str(error) or isinstance(error, ValueError)
        assert left == (["x"] if is_committed else [])
        assert "committed: the checkpoint is visible" in str(error) or not is_committed
    check_whole(root / name / "y")


def check_whole(path: Path) -> None:
    assert verify(path).ok
    assert keys_of(path) == [f"model.stage{rank}.w" for rank in range(WORLD_SIZE)]


def keys_of(path: Path) -> list[str]:
    return sorted(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


# What each rank saves by itself, under its own path.
ALONE = ("no-dist", "one-rank", "other stager-no_dist")


def other_lives(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    """Groups that end, and saves that need none of them."""
    found: dict[str, Any] = {}

    def held(name: str, **options: Any) -> tuple[Future[Any], Hold]:
        hold = Hold(HELD)
        return save_held(root / name, own_part(rank), hold, **options), hold

    def init_alone() -> None:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    future, hold = held("other-world")
    hold.act(init_alone)
    found["other world"] = failure_of(future)

    future, hold = held(f"one-rank-{rank}")
    hold.act(dist.destroy_process_group)
    found["one rank"] = failure_of(future)

    join("no_dist", rank, world_size)
    dist.barrier()
    future, hold = held(f"no-dist-{rank}", no_dist=True)
    hold.act(dist.destroy_process_group)
    found["no_dist"] = failure_of(future)

    join("other stager", rank, world_size)
    dist.barrier()
    for name, options in (("other stager", {}), ("other stager, no_dist", {"no_dist": True})):
        future, hold = held(f"{name.replace(', ', '-')}-{rank}", is_ours=False, **options)
        hold.act(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
        found[name] = failure_of(future)

    future, hold = held(f"late-{rank}")
    hold.act(lambda: join("late", rank, world_size))
    found["initialised later"] = failure_of(future)

    group = dist.new_group()
    writer = HFDualWriter(root / "other-group")
    future = dcp.async_save(own_part(rank), storage_writer=writer, process_group=group)
    found["other group than the writer's"] = failure_of(future)
    return found


def test_saves_that_do_not_need_the_group_go_on_without_it(tmp_path: Path) -> None:
    ranks = run_ranks(other_lives, WORLD_SIZE, tmp_path, timeout_s=120)
    for rank, found in enumerate(ranks):
        for name in ("other world", "initialised later", "other stager"):
            assert isinstance(found[name], SaveAbortedError), name
        for name in (
            "other stager, no_dist",
            "one rank",
            "no_dist",
            "other group than the writer's",
        ):
            assert found[name] is None, name
        for name in ALONE:
            path = tmp_path / f"{name}-{rank}"
            assert verify(path).ok
            assert keys_of(path) == [f"model.stage{rank}.w"]
    check_whole(tmp_path / "other-group")
    names = [f"{name}-{rank}" for name in ALONE for rank in range(WORLD_SIZE)]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "other-group"])


def end_with_destroyed_group(rank: int, root: Path, meeting: str) -> None:
    logging.basicConfig(filename=root / f"log-{rank}", level=logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    dcp.async_save(own_part(rank), storage_writer=HFDualWriter(root / "x"))
    dist.destroy_process_group()


def test_script_that_destroys_its_group_and_ends_publishes_nothing_and_says_so(
    tmp_path: Path,
) -> None:
    meeting = str(tmp_path / "meeting")
    began = time.monotonic()
    with (
        FreshProcess(end_with_destroyed_group, 0, tmp_path, meeting) as first,
        FreshProcess(end_with_destroyed_group, 1, tmp_path, meeting) as second,
    ):
        assert [process.exitcode() for process in (first, second)] == [0, 0]
    assert time.monotonic() - began < LIMIT_S
    assert not (tmp_path / "x").exists()
    for rank in range(WORLD_SIZE):
        text = (tmp_path / f"log-{rank}").read_text()
        assert f"the save of {tmp_path / 'x'} failed on rank {rank}" in text
        assert HINT in text
