"""Saves in a row that nobody waits for: their collectives never overtake one another."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, failpoints, verify
from dcp_hf_writer.errors import StagingError
from support.ranks import run_ranks
from support.small_states import difference, state_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)

LIMIT_S = 60.0
# How long the coordinator waits before it answers the other ranks. The next save would need a tenth
# of that to reach its first collective.
DELAY_S = 0.5


def delay_at(*points: str) -> None:
    failpoints.set_hook(lambda point: time.sleep(DELAY_S) if point in points else None)


def outcome_of(future: Any) -> str | None:
    try:
        future.result(LIMIT_S)
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    return None


def with_tensors(root: Path, rank: int, step: int) -> Any:
    return dcp.async_save(state_of(step), storage_writer=HFDualWriter(root / f"row-{step}"))


def without_tensors(root: Path, rank: int, step: int) -> Any:
    """A rank that holds no tensor has nothing in the slab, and still takes its turn."""
    state: dict[str, Any] = {"model": {"w": torch.ones(3)}} if rank == 0 else {"step": step}
    return dcp.async_save(state, storage_writer=HFDualWriter(root / f"bare-{step}"))


def that_cannot_be_staged(root: Path, rank: int, step: int) -> Any:
    state = state_of(step)
    if rank == step % 2:
        state["lock"] = threading.Lock()
    return dcp.async_save(state, storage_writer=HFDualWriter(root / f"failed-{step}"))


def in_turns(root: Path, rank: int, step: int) -> Any:
    """Every second save cannot be staged on one rank."""
    kind = that_cannot_be_staged if step % 2 else with_tensors
    return kind(root, rank, step)


def without_waiting(rank: int, world_size: int, root: Path) -> list[str | None]:
    """Save synchronously while an asynchronous save of the same group is in flight."""
    reached, go_on = threading.Event(), threading.Event()

    def hook(point: str) -> None:
        if point == "before report" and not go_on.is_set():
            reached.set()
            assert go_on.wait(LIMIT_S)

    failpoints.set_hook(hook)
    future = with_tensors(root, rank, 1)
    assert reached.wait(LIMIT_S)
    # The other save goes on only after this one has begun to wait for it.
    threading.Timer(DELAY_S, go_on.set).start()
    dcp.save(state_of(2), storage_writer=HFDualWriter(root / "row-2"))
    failpoints.set_hook(None)
    return [outcome_of(future)]


def test_synchronous_save_waits_for_one_that_is_in_flight(tmp_path: Path) -> None:
    assert run_ranks(without_waiting, 2, tmp_path, timeout_s=120) == [[None]] * 2
    for step in (1, 2):
        assert difference(tmp_path / f"row-{step}", step) is None


def save_in_a_row(rank: int, world_size: int, root: Path) -> dict[str, list[str | None]]:
    kinds: tuple[Callable[[Path, int, int], Any], ...] = (
        *(with_tensors, without_tensors, that_cannot_be_staged, in_turns),
    )
    found = {}
    for points in (("before reply",), ("before reply", "mid dcp")):
        # The coordinator alone answers late, or it writes slowly too.
        if rank == 0:
            delay_at(*points)
        for kind in kinds:
            own = root / "-".join(points).replace(" ", "-") / kind.__name__
            own.mkdir(parents=True, exist_ok=True)
            futures = [kind(own, rank, step) for step in (1, 2, 3, 4)]
            found[f"{own.relative_to(root)}"] = [outcome_of(future) for future in futures]
        failpoints.set_hook(None)
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[dict[str, list[str | None]]]]:
    root = tmp_path_factory.mktemp("rows")
    return root, run_ranks(save_in_a_row, 2, root, timeout_s=240)


@pytest.mark.parametrize("delay", ["before-reply", "before-reply-mid-dcp"])
def test_saves_in_a_row_are_all_committed_when_the_answer_is_late(
    delay: str, saved: tuple[Path, list[dict[str, list[str | None]]]]
) -> None:
    root, ranks = saved
    for found in ranks:
        assert found[f"{delay}/with_tensors"] == [None] * 4
        assert found[f"{delay}/without_tensors"] == [None] * 4
        failed = found[f"{delay}/that_cannot_be_staged"]
        assert all(error is not None and error.startswith("StagingError") for error in failed)
        odd, even = found[f"{delay}/in_turns"][::2], found[f"{delay}/in_turns"][1::2]
        assert all(error is not None and error.startswith("StagingError") for error in odd)
        assert even == [None, None]
    for step in (1, 2, 3, 4):
        assert difference(root / delay / "with_tensors" / f"row-{step}", step) is None
        assert verify(root / delay / "without_tensors" / f"bare-{step}").ok
    for step in (2, 4):
        assert difference(root / delay / "in_turns" / f"row-{step}", step) is None


def test_next_save_of_a_process_waits_for_one_without_tensors(tmp_path: Path) -> None:
    """The turn of a save is not the slab: what has no tensors holds it too."""
    go_on = threading.Event()

    def hook(point: str) -> None:
        if point == "before report":
            assert go_on.wait(LIMIT_S)

    failpoints.set_hook(hook)
    try:
        first = dcp.async_save(
            {"step": 1}, storage_writer=HFDualWriter(tmp_path / "1", export=None), no_dist=True
        )
        writer = HFDualWriter(tmp_path / "2", export=None, timeout_s=0.2)
        with pytest.raises(StagingError, match="earlier save"):
            dcp.async_save({"step": 2}, storage_writer=writer, no_dist=True)
        go_on.set()
        first.result(LIMIT_S)
        writer = HFDualWriter(tmp_path / "2", export=None)
        dcp.async_save({"step": 2}, storage_writer=writer, no_dist=True).result(LIMIT_S)
    finally:
        go_on.set()
        failpoints.set_hook(None)
    assert verify(tmp_path / "1").ok
    assert verify(tmp_path / "2").ok
