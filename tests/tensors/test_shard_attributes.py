"""A plain tensor whose attributes say which part of a larger one it is: refused everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualReader, HFDualWriter, HFSavePlanner, iter_hf_buckets, load_hf
from dcp_hf_writer.errors import MismatchError, PlanningError, StagingError

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.checkpoint import DefaultSavePlanner


def shard(offset: int = 0) -> torch.Tensor:
    """Return four of eight elements; torch before 2.14 takes them for the whole tensor."""
    tensor: Any = torch.arange(4.0) + offset
    tensor.global_shape = (8,)
    tensor.global_offsets = ((offset,),)
    tensor.local_offsets = ((0,),)
    tensor.local_sizes = ((4,),)
    found: torch.Tensor = tensor
    return found


def state() -> dict[str, Any]:
    return {"model": {"a": torch.ones(2), "w": shard(4)}}


def test_stand_in_is_what_torch_calls_a_checkpointable_tensor() -> None:
    protocol = pytest.importorskip("torch.distributed.checkpoint.protocol", reason="torch < 2.14")
    assert protocol._is_checkpointable_tensor(shard())


REFUSED = r"shard attributes.*model\.w.*CheckpointableTensor of shape \[4\].*make it a DTensor"


def test_async_save_refuses_a_tensor_with_shard_attributes(tmp_path: Path) -> None:
    with pytest.raises(StagingError, match=REFUSED):
        dcp.async_save(state(), storage_writer=HFDualWriter(tmp_path / "saved")).result()
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("planner", [None, HFSavePlanner()], ids=["torch's", "ours"])
def test_save_refuses_a_tensor_with_shard_attributes(
    planner: DefaultSavePlanner | None, tmp_path: Path
) -> None:
    writer = HFDualWriter(tmp_path / "saved")
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.save(state(), storage_writer=writer, planner=planner)
    with pytest.raises(PlanningError, match=REFUSED):
        raise caught.value.failures[0][0]
    assert not (tmp_path / "saved").exists()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    whole = {"model": {"a": torch.ones(2), "w": torch.arange(8.0)}}
    dcp.save(whole, storage_writer=HFDualWriter(path))
    return path


def test_load_refuses_a_tensor_with_shard_attributes(saved: Path) -> None:
    target = state()
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target, storage_reader=HFDualReader(saved))
    with pytest.raises(MismatchError, match=r"model\.w \(shape \[4\], stored as \[8\]\)"):
        raise caught.value.failures[0][0]


def test_load_hf_refuses_a_tensor_with_shard_attributes(saved: Path) -> None:
    with pytest.raises(PlanningError, match=REFUSED.replace(r"model\.", "")):
        load_hf(state(), saved / "hf")


def test_weight_sync_refuses_a_tensor_with_shard_attributes() -> None:
    with pytest.raises(PlanningError, match=REFUSED):
        list(iter_hf_buckets(state(), bucket_bytes=1 << 20))


def test_copy_without_the_attributes_is_saved_as_a_plain_tensor(tmp_path: Path) -> None:
    given = state()
    given["model"]["w"] = given["model"]["w"].detach()
    dcp.save(given, storage_writer=HFDualWriter(tmp_path / "saved"))
    assert (tmp_path / "saved" / "hf").is_dir()
