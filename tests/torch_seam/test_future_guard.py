"""The future of an asynchronous save: without it a lost rank could not be reported in time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.thread import _threads_queues
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.errors import UnsupportedTorchError
from dcp_hf_writer.torch_seam.future_guard import find_future
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


def stagers_options() -> dict[str, Any]:
    """Return options with a new stager of torch's: torch 2.11 cannot use one again once closed."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    return {"no_dist": True, "async_stager": stager}


def test_save_of_what_another_stager_staged_is_refused_without_its_future(tmp_path: Path) -> None:
    with without("future"):
        said = refusal("thread", state_of(1), HFDualWriter(tmp_path / "x"), **stagers_options())
    assert said is not None
    assert_nothing_is_there(tmp_path, "x")
    save("thread", state_of(2), HFDualWriter(tmp_path / "step-2"), **stagers_options())
    assert difference(tmp_path / "step-2", 2) is None


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
