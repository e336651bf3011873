"""Two hosts that write one file through page caches of their own (F19), on real FUSE mounts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_hf_writer import HFDualWriter, HFExport, failpoints, verify
from support.fuse_mounts import mounted, why_no_fuse
from support.mounts import leave_mounts, needs_mounts
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path


def save_through_own_mount(
    rank: int, world_size: int, back: Path, point: Path, strategy: str
) -> None:
    """Save rows and columns through a mount that only this rank sees; so each has a page cache."""
    leave_mounts()
    # No rank writes its pages back before the other one has pages with gaps, too.
    failpoints.set_hook(lambda reached: dist.barrier() if reached == "mid hf" else None)
    with mounted(back, point):
        mesh = init_device_mesh("cpu", (world_size,))
        torch.manual_seed(0)
        model = {
            f"w{i}": distribute_tensor(torch.randn(301, 333), mesh, [Shard(i % 2)])
            for i in range(4)
        }
        export = HFExport(assets={"config.json": b"{}"})
        writer = HFDualWriter(point / strategy, export=export, strategy=strategy)
        dcp.async_save({"model": model}, storage_writer=writer).result()


@needs_mounts
def test_two_page_caches_damage_a_file_only_without_exchange(tmp_path: Path) -> None:
    reason = why_no_fuse()
    if reason is not None:
        pytest.skip(reason)
    back, point = tmp_path / "back", tmp_path / "point"
    back.mkdir()
    point.mkdir()
    for strategy in ("direct", "auto"):
        run_ranks(save_through_own_mount, 2, back, point, strategy)
    assert {one.file for one in verify(back / "direct").problems} == {"hf/model.safetensors"}
    assert verify(back / "auto").ok
