"""The future of an asynchronous save: without it a lost rank could not be reported in time."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.thread import _threads_queues
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.errors import UnsupportedTorchError, WriteError
from dcp_hf_writer.torch_seam.future_guard import current_future, find_future, own_error
from support.lost_lookups import assert_nothing_is_there, refusal, save, without
from support.ranks import run_ranks
from support.small_states import difference, state_of

if TYPE_CHECKING:
    from pathlib import Path


def lost_and_found(rank: int, world_size: int, root: Path, kind: str) -> None:
    del rank
    mesh = init_device_mesh("cpu", (world_size,))
    with without("future"):
        said = refusal(kind, state_of(1, mesh), HFDualWriter(root / "x"))
    assert said is not None
    assert "future of the save" in said
    assert_nothing_is_there(root, "x")
    save(kind, state_of(2, mesh), HFDualWriter(root / "step-2"))


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_nothing_is_saved_when_the_future_cannot_be_found(tmp_path: Path, kind: str) -> None:
    run_ranks(lost_and_found, 2, tmp_path, kind)
    assert difference(tmp_path / "step-2", 2) is None


def test_overlapped_save_is_refused_too_when_the_future_cannot_be_found(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "x", staging="overlap")
    with without("future"), pytest.raises(BaseException, match="future of the save"):
        dcp.async_save(state_of(1), storage_writer=writer, no_dist=True).upload_completion.result()
    assert_nothing_is_there(tmp_path, "x")
    save("thread", state_of(2), HFDualWriter(tmp_path / "step-2"), no_dist=True)
    assert difference(tmp_path / "step-2", 2) is None


def test_save_of_what_another_stager_staged_is_refused_without_its_future(tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        # A stager of torch 2.11 stages once.
        staging = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        return {"no_dist": True, "async_stager": DefaultStager(staging)}

    with without("future"):
        assert refusal("thread", state_of(1), HFDualWriter(tmp_path / "x"), **options()) is not None
    assert_nothing_is_there(tmp_path, "x")
    save("thread", state_of(2), HFDualWriter(tmp_path / "step-2"), **options())
    assert difference(tmp_path / "step-2", 2) is None


def test_error_of_a_save_does_not_lead_back_to_itself() -> None:
    inner = WriteError("the device is full", path="x")
    wrapped = CheckpointException("write", {1: _wrap_exception(inner)})
    found = own_error(wrapped)
    assert found is inner
    assert found.rank == 1
    chain: list[BaseException | None] = [found]
    while chain[-1] is not None:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
        assert chain[-1] is not wrapped


def test_thread_of_an_executor_is_known_before_the_executor_has_entered_it() -> None:
    def look() -> str | None:
        _threads_queues.pop(threading.current_thread(), None)
        try:
            find_future(is_async=False)
        except UnsupportedTorchError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(1) as pool, without("future"):
        pool.submit(lambda: None).result(10)
        said = pool.submit(look).result(10)
    assert said is not None
    assert "future of the save" in said


def test_synchronous_save_has_no_future(tmp_path: Path) -> None:
    with without("future"):
        save("sync", state_of(1), HFDualWriter(tmp_path / "step-1"), no_dist=True)
        thread = threading.Thread(
            target=save,
            args=("sync", state_of(2), HFDualWriter(tmp_path / "step-2")),
            kwargs={"no_dist": True},
        )
        thread.start()
        thread.join()
    for step in (1, 2):
        assert difference(tmp_path / f"step-{step}", step) is None


def test_future_is_that_of_the_task_that_the_thread_runs() -> None:
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(lambda: find_future(is_async=True))
        assert future.result() is future
    assert find_future(is_async=False) is None
    with pytest.raises(UnsupportedTorchError, match="future of the save"):
        find_future(is_async=True)


# Saves within a task of the user's own executor

# Longer than a guard waits after the deadline of its save.
GOES_ON_S = 3.5


def save_and_go_on(root: Path, kept: list[BaseException]) -> str:
    save("sync", state_of(1), HFDualWriter(root / "step-1", timeout_s=1.0), no_dist=True)
    try:
        dcp.save(
            state_of(2), storage_writer=HFDualWriter(root / "step-1", timeout_s=1.0), no_dist=True
        )
    except CheckpointException as error:
        # Its frames keep what torch drops when a save ends.
        kept.append(error)
    time.sleep(GOES_ON_S)
    return "done"


def test_task_that_goes_on_after_its_saves_is_not_failed_at_their_deadline(tmp_path: Path) -> None:
    kept: list[BaseException] = []
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(save_and_go_on, tmp_path, kept)
        assert future.result(60) == "done"
    assert len(kept) == 1
    assert difference(tmp_path / "step-1", 1) is None


def test_error_of_a_task_after_its_saves_stays_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        for step in range(3):
            save("sync", state_of(step), HFDualWriter(tmp_path / f"step-{step}"), no_dist=True)
        with contextlib.suppress(CheckpointException):
            dcp.save(state_of(9), storage_writer=HFDualWriter(tmp_path / "step-1"), no_dist=True)
        caplog.clear()
        msg = "of the task"
        raise WriteError(msg)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fail)
        with pytest.raises(WriteError, match="of the task"):
            future.result(60)
    assert not caplog.records


def test_guards_of_saves_that_are_over_leave_the_future_as_it_was(tmp_path: Path) -> None:
    def hooks() -> list[str]:
        for step in range(3):
            save("sync", state_of(step), HFDualWriter(tmp_path / f"step-{step}"), no_dist=True)
        future = current_future()
        return sorted({"set_result", "set_exception"} & set(vars(future)))

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(hooks).result(60) == []
