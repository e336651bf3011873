"""What staging leaves for the save: what could not be staged is never saved as if it were empty."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.errors import StagingError, UnsupportedTorchError
from dcp_hf_writer.save import begin_save
from dcp_hf_writer.staging.slab import SLABS
from support.lost_lookups import assert_nothing_is_there, save, without
from support.ranks import run_ranks
from support.small_states import difference, model_of, spoil, state_of

if TYPE_CHECKING:
    from pathlib import Path


def with_lock(step: int) -> dict[str, Any]:
    """Return a state dict that cannot be copied."""
    return {**state_of(step), "lock": threading.Lock()}


def save_what_cannot_be_staged(rank: int, world_size: int, root: Path, kind: str) -> None:
    del world_size
    for lost in (None, "planner"):
        for on_all in (False, True):
            for export in (HFExport(), None):
                state = with_lock(1) if on_all or rank == 1 else state_of(1)
                with without(lost), pytest.raises((StagingError, UnsupportedTorchError)) as error:
                    save(kind, state, HFDualWriter(root / "x", export=export))
                if lost is None:
                    assert isinstance(error.value, StagingError)
                    assert "lock" in str(error.value)
                assert_nothing_is_there(root, "x")
    save(kind, state_of(2), HFDualWriter(root / "step-2"))


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_what_cannot_be_staged_is_never_saved(tmp_path: Path, kind: str) -> None:
    run_ranks(save_what_cannot_be_staged, 2, tmp_path, kind)
    assert difference(tmp_path / "step-2", 2) is None


def test_failed_staging_is_refused_by_the_plan_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is lost: the item in the plan says that staging failed."""

    monkeypatch.setattr(begin_save, "failure_in", lambda _: None)
    with pytest.raises(StagingError, match="could not be staged"):
        save("thread", with_lock(1), HFDualWriter(tmp_path / "x", export=None), no_dist=True)
    assert_nothing_is_there(tmp_path, "x")


def test_failed_staging_is_refused_by_writers_of_others(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="lock"):
        dcp.async_save(
            with_lock(1),
            storage_writer=FileSystemWriter(tmp_path / "x"),
            async_stager=HFDualWriter(tmp_path / "never"),
            no_dist=True,
        ).result()
    assert not (tmp_path / "x" / ".metadata").exists()


class CopyingStager(AsyncStager):
    """Gives the save other containers than the writer made, around the same tensors."""

    should_synchronize_after_execute = False

    def __init__(self, writer: HFDualWriter) -> None:
        self._writer = writer

    def stage(self, state_dict: dict[str, Any]) -> Any:
        staged = self._writer.stage(state_dict)
        return {name: dict(v) if isinstance(v, dict) else v for name, v in staged.items()}

    def close(self) -> None:
        """Nothing to close."""


def test_staged_copy_is_known_by_its_memory_in_whatever_containers(tmp_path: Path) -> None:
    """The containers that held the lease are gone before the save begins."""
    writer = HFDualWriter(tmp_path / "never")
    with pytest.raises(StagingError, match="released or already saved"):
        save(
            "thread",
            state_of(1),
            HFDualWriter(tmp_path / "x"),
            async_stager=CopyingStager(writer),
            no_dist=True,
        )
    assert_nothing_is_there(tmp_path, "x")


def test_writer_takes_what_another_writer_staged(tmp_path: Path) -> None:
    state = state_of(1)
    state["model"]["tied"] = state["model"]["embed"]
    future = dcp.async_save(
        state,
        storage_writer=HFDualWriter(tmp_path / "step-1"),
        async_stager=HFDualWriter(tmp_path / "never"),
        no_dist=True,
    )
    spoil(state)
    future.result()
    assert difference(tmp_path / "step-1", 1, exported=model_of(1)) is None


def test_synchronous_save_beside_a_staged_one_leaves_it_alone(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "step-2")
    staged = writer.stage(state_of(1))
    save("sync", state_of(2), writer, no_dist=True)
    with without("planner"), pytest.raises(UnsupportedTorchError):
        save("sync", state_of(2), HFDualWriter(tmp_path / "x"), no_dist=True)
    assert staged.lease.is_pending
    save("sync", staged, HFDualWriter(tmp_path / "step-1"), no_dist=True)
    assert not staged.lease.is_active
    for step in (1, 2):
        assert difference(tmp_path / f"step-{step}", step) is None


def test_what_was_staged_is_saved_once(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "step-1")
    staged = writer.stage(state_of(1))
    save("sync", staged, writer, no_dist=True)
    with pytest.raises(StagingError, match="released or already saved"):
        save("sync", staged, HFDualWriter(tmp_path / "x"), no_dist=True)
    assert_nothing_is_there(tmp_path, "x")


def test_staging_memory_is_free_after_a_refused_save(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(5, 3)}}
    with without("planner"), pytest.raises(UnsupportedTorchError) as kept:
        save("thread", state, HFDualWriter(tmp_path / "x"), no_dist=True)
    assert kept.value is not None
    lease = SLABS._lease
    assert lease is not None
    assert not lease.is_active
