"""A save without a process group under a launcher that started several ranks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.errors import ConfigError
from support.own_errors import own_errors
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path


def state() -> dict[str, Any]:
    return {"model": {"w": torch.ones(2, 3)}}


def save(writer: HFDualWriter, how: str, **options: Any) -> None:
    if how == "save":
        dcp.save(state(), storage_writer=writer, **options)
    else:
        dcp.async_save(state(), storage_writer=writer, **options).result()


@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize("options", [{}, {"no_dist": False}], ids=["as it is", "no_dist=False"])
def test_save_is_refused_when_the_group_is_missing(
    how: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BaseException, match="no process group is initialised") as caught:
        save(HFDualWriter(tmp_path / "step-1"), how, **options)
    (error,) = own_errors(caught.value)
    assert isinstance(error, ConfigError)
    assert "init_process_group" in str(error)
    assert "no_dist=True" in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize("world_size", ["2", "1", "", "many", None])
def test_save_goes_on_when_it_is_meant_alone_or_is_alone(
    how: str, world_size: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world_size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    options = {"no_dist": True} if world_size == "2" else {}
    save(HFDualWriter(tmp_path / "step-1"), how, **options)
    assert (tmp_path / "step-1" / ".metadata").is_file()


def save_after_the_end(rank: int, world_size: int, root: Path, how: str) -> list[str]:
    said = []
    for path, options in ((root / "all", {}), (root / f"alone-{rank}", {"no_dist": True})):
        if dist.is_initialized():
            save(HFDualWriter(root / "before"), how)
            dist.destroy_process_group()
        try:
            save(HFDualWriter(path), how, **options)
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            said.append(str(error))
    return said


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_every_rank_is_refused_when_the_group_was_destroyed_before(
    how: str, tmp_path: Path
) -> None:
    for said in run_ranks(save_after_the_end, 2, tmp_path, how):
        assert len(said) == 1
        assert "no process group is initialised" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone-0", "alone-1", "before"]


def save_after_the_group(rank: int, world_size: int, root: Path) -> list[str]:
    """Save with writers that were made while there was a process group."""
    # `torch.multiprocessing.spawn` does not set it.
    os.environ.pop("WORLD_SIZE")
    ways = [(how, alone) for how in ("save", "async_save") for alone in (False, True)]
    writers = [HFDualWriter(root / f"{how}-{alone}-{rank}") for how, alone in ways]
    dist.barrier()
    dist.destroy_process_group()
    found = []
    for (how, alone), writer in zip(ways, writers, strict=True):
        options = {"no_dist": True} if alone else {}
        try:
            save(writer, how, **options)
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            found += [str(one) for one in own_errors(error)]
    return found


def test_save_is_refused_when_the_group_of_its_writer_is_gone(tmp_path: Path) -> None:
    for found in run_ranks(save_after_the_group, 2, tmp_path):
        assert len(found) == 2
        for text in found:
            assert "one group of 2 ranks, as when the writer was made" in text
            assert "no_dist=True" in text
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(
        f"{how}-True-{rank}" for how in ("save", "async_save") for rank in (0, 1)
    )
