"""An error that the trainer keeps: it holds no file and no directory, and has no cycle."""

from __future__ import annotations

import gc
import os
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import init_device_mesh

from dcp_hf_writer import HFDualReader, HFDualWriter, failpoints
from dcp_hf_writer.errors import CheckpointError
from support.own_errors import own_errors
from support.ranks import run_ranks
from support.small_states import state_of

if TYPE_CHECKING:
    from pathlib import Path

POINTS = (
    "local plan",
    "directory made",
    "headers written",
    "before slot",
    "mid dcp",
    "mid hf",
    "before fsync",
    "after fsync",
    "before report",
    "before manifest",
    "before rename",
)
"""The points of a synchronous save, up to its commit."""

COORDINATOR_ONLY = {"directory made", "headers written", "before manifest", "before rename"}


class InjectedError(RuntimeError):
    """What a test makes a step raise."""


def fail_at(point: str) -> None:
    def hook(reached: str) -> None:
        if reached == point:
            raise InjectedError(point)

    failpoints.set_hook(hook)


def descriptors() -> list[str]:
    """Return what this process has open, apart from the listing itself."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return sorted(found)


def error_of(save: Any, state: Any, **options: Any) -> BaseException | None:
    try:
        saving = save(state, **options)
        if save is dcp.async_save:
            saving.result()
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        return error
    return None


def opened_since(before: list[str]) -> list[str]:
    """Return what is open now and was not before; a heartbeat in the making may take a moment."""
    deadline = time.monotonic() + 10
    while after := [one for one in descriptors() if one not in before]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return after


def failed_saves(
    rank: int, world_size: int, root: Path, failing: int
) -> dict[str, tuple[bool, list[str], list[str]]]:
    """Fail a save at each point on one rank, and keep its error; what is open, and on the disk."""
    mesh = init_device_mesh("cpu", (world_size,))
    assert (
        error_of(dcp.save, state_of(1, mesh), storage_writer=HFDualWriter(root / "first")) is None
    )
    gc.collect()
    gc.disable()
    found = {}
    held = []
    for point in POINTS:
        if rank == failing:
            fail_at(point)
        before = descriptors()
        writer = HFDualWriter(root / "second")
        held.append(error_of(dcp.save, state_of(2, mesh), storage_writer=writer))
        failpoints.set_hook(None)
        after = opened_since(before)
        left = sorted(os.listdir(root)) if rank == 0 else []
        mesh.get_group().barrier().wait()
        found[point] = (held[-1] is not None, after, left)
    return found


@pytest.mark.parametrize(("world_size", "failing"), [(1, 0), (2, 0), (2, 1)])
def test_failed_synchronous_save_holds_nothing_while_its_error_is_held(
    world_size: int, failing: int, tmp_path: Path
) -> None:
    for rank, found in enumerate(run_ranks(failed_saves, world_size, tmp_path, failing)):
        for point, (is_raised, opened, left) in found.items():
            if point in COORDINATOR_ONLY and failing != 0:
                # The control: nothing fails, and the save goes through.
                continue
            assert is_raised or point == "mid hf", (rank, point)
            assert opened == [], (rank, point)
            assert [name for name in left if name.startswith(".")] == [], (rank, point)


# What an error leads to


def reached_from(error: BaseException, above: tuple[int, ...] = ()) -> tuple[int, bool]:
    """Return how many errors are reached from one, and whether one of them leads back to itself."""
    if id(error) in above:
        return 0, True
    inner = [error.__cause__, error.__context__]
    if isinstance(error, CheckpointException):
        inner += [failure for failure, _ in error.failures.values()]
    count, is_cyclic = 1, False
    for one in inner:
        if one is not None:
            deeper, found = reached_from(one, (*above, id(error)))
            count, is_cyclic = count + deeper, is_cyclic or found
    return count, is_cyclic


def failing_errors(rank: int, world_size: int, root: Path, how: str) -> list[tuple[Any, ...]]:
    mesh = init_device_mesh("cpu", (world_size,))
    save = dcp.save if how == "save" else dcp.async_save
    found = []
    for number, (point, ranks) in enumerate(FAILURES):
        if rank in ranks:
            fail_at(point)
        writer = HFDualWriter(root / f"step-{number}")
        error = error_of(save, state_of(1, mesh), storage_writer=writer)
        failpoints.set_hook(None)
        found.append((point, *told(error)))
        mesh.get_group().barrier().wait()
    state = state_of(1, mesh)
    unstaged = state | {"lock": threading.Lock()}
    error = error_of(save, unstaged, storage_writer=HFDualWriter(root / "unstaged"))
    found.append(("unstaged", *told(error)))
    error = error_of(dcp.load, state, storage_reader=HFDualReader(root / "absent"))
    found.append(("load", *told(error)))
    return found


def told(error: BaseException | None) -> tuple[int, bool, int, list[str]]:
    """Return how many errors are reached, if in a cycle, how long the text is, and whose it is."""
    assert error is not None
    text = "".join(traceback.format_exception(error))
    return (*reached_from(error), len(text), [type(one).__name__ for one in own_errors(error)])


ALL = (0, 1, 2, 3)
FAILURES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("local plan", (1,)),
    ("local plan", ALL),
    ("headers written", (0,)),
    ("mid dcp", (1,)),
    ("mid dcp", ALL),
    ("mid hf", ALL),
    ("before report", ALL),
    ("before manifest", (0,)),
    ("before rename", (0,)),
)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("how", ["save", "async_save"])
def test_error_never_leads_back_to_itself_and_is_printed_at_once(
    how: str, world_size: int, tmp_path: Path
) -> None:
    for found in run_ranks(failing_errors, world_size, tmp_path, how):
        for point, count, is_cyclic, length, _ in found:
            assert not is_cyclic, point
            assert count <= 2 + 2 * world_size, point
            assert length < 20_000 * (1 + world_size), point


def test_walk_finds_a_cycle() -> None:
    """The control: an error within the exception that is its cause."""
    inner = CheckpointError("it broke")
    outer = CheckpointException("write", {0: (inner, traceback.StackSummary())})
    assert reached_from(outer) == (2, False)
    inner.__cause__ = outer
    assert reached_from(inner)[1]
