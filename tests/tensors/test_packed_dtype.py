"""F4: torch packs two numbers into one element, safetensors counts them one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from dcp_hf_writer import HFDualWriter
from support.compare import file_difference
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

F4 = torch.float4_e2m1fn_x2


def packed(rows: int) -> torch.Tensor:
    values = torch.arange(rows * 4, dtype=torch.uint8) * 7 + 3
    return values.view(rows, 4).view(F4)


def save_sharded(rank: int, world_size: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    local = packed(5)[:3] if rank == 0 else packed(5)[3:]
    sharded = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size((5, 4)), stride=(4, 1)
    )
    state_dict = {"model": {"blocks": sharded, "scale": torch.ones(2), "tail": packed(2)}}
    dcp.async_save(state_dict, storage_writer=HFDualWriter(path)).result()


def test_file_equals_that_of_safetensors_when_packed_numbers_are_sharded(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    run_ranks(save_sharded, 2, str(path))
    expected = {"blocks": packed(5), "scale": torch.ones(2), "tail": packed(2)}
    reference = safetensors.torch.save(expected, metadata={"format": "pt"})
    produced = (path / "hf" / "model.safetensors").read_bytes()
    assert file_difference(produced, reference) is None


def test_stock_load_gives_the_packed_bytes_back(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    run_ranks(save_sharded, 2, str(path))
    found = {"model": {"blocks": torch.zeros(5, 4, dtype=torch.uint8).view(F4)}}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    loaded = found["model"]["blocks"].view(torch.uint8)
    assert torch.equal(loaded, packed(5).view(torch.uint8))
