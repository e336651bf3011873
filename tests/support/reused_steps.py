"""Steps of a run that changes a part of its weights, and what must hold of a step that reuses."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_hf_writer import HFDualWriter, HFExport, verify

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 450
"""Rows of a weight of `run_state`; it has a little more than 1 MiB, and no multiple of a block."""

WEIGHT_NBYTES = ROWS * 601 * 4
"""Bytes of a weight; two fill a file."""

EXPORT = HFExport(max_shard_size="2.5MB", assets={"config.json": b'{"model_type": "none"}'})
"""Two weights of `run_state` fill a file: the first two files are frozen, and so is the first
weight of the third."""


def run_state(step: int) -> dict[str, Any]:
    """Return the state of a step: one of six weights is trained, and so is the optimizer's."""
    make = torch.Generator().manual_seed(0)
    model = {f"layers.{i}.w": torch.randn(ROWS, 601, generator=make) for i in range(6)}
    model["layers.5.w"] += step
    frozen = torch.randn(ROWS + 1, 601, generator=make)
    return {"model": model, "optim": {"master": frozen, "exp_avg": frozen + step}, "step": step}


def sharded_run_state(step: int) -> dict[str, Any]:
    """Return the same state, by rows over the ranks; `layers.1.w` by columns."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = run_state(step)
    for entry in ("model", "optim"):
        for name, tensor in state[entry].items():
            placement = Shard(1) if name == "layers.1.w" else Shard(0)
            state[entry][name] = distribute_tensor(tensor, mesh, [placement])
    return state


def save_step(path: Path, step: int, *, export: HFExport | None = EXPORT, **options: Any) -> None:
    """Save the state of a step, on this process alone or with all ranks."""
    writer = HFDualWriter(path, export=export, **options)
    if dist.is_initialized():
        dcp.async_save(sharded_run_state(step), storage_writer=writer).result()
        dist.barrier()
    else:
        dcp.save(run_state(step), storage_writer=writer, no_dist=True)


def reused_nbytes(path: Path) -> int | None:
    """Return the bytes that a checkpoint took from an earlier one; `None` if it says nothing."""
    nbytes = json.loads((path / "dcp-hf.json").read_text())["nbytes"]
    return None if "reused" not in nbytes else int(nbytes["reused"])


def check_as_written(path: Path, step: int, **options: Any) -> None:
    """Check that a checkpoint of `save_step` has the files of one that reuses nothing."""
    plain = path.with_name("plain")
    shutil.rmtree(plain, ignore_errors=True)
    save_step(plain, step, **{**options, "reuse": None, "overwrite": False})
    names = files_in(plain)
    assert files_in(path) == names
    # The manifest has times and ids, and so has the metadata. Digests come in the order of writing;
    # `verify` checks them.
    files = [name for name in names if (plain / name).is_file()]
    data = [name for name in files if name != ".metadata" and not name.startswith("dcp-hf")]
    assert sorted(filecmp.cmpfiles(plain, path, data, shallow=False)[0]) == sorted(data)
    assert verify(path).ok


def files_in(path: Path) -> list[str]:
    """Return all files and directories below a directory, by relative path."""
    return sorted(
        os.path.relpath(os.path.join(where, name), path)
        for where, directories, names in os.walk(path)
        for name in directories + names
    )


def is_linked(path: Path, earlier: Path) -> list[bool]:
    """Return, for each weight file of a checkpoint, whether it is a file of an earlier one."""
    return [
        file.samefile(earlier / "hf" / file.name) for file in sorted(path.glob("hf/*.safetensors"))
    ]
