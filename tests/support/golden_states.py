"""What the golden checkpoints hold, and how two ranks save them.

The checkpoints below `golden/` are read, and never written again: change nothing here that changes
their values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_hf_writer import HFDualWriter, HFExport, HFSavePlanner, LoadSpec, Piece, ShardSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WORLD_SIZE = 2
STEP = 100
KINDS = ("both", "once", "cast", "hand-sharded")

# Columns of "pair" are sharded; its rows are two tensors of the export.
PAIR = LoadSpec("pair", ["first", "second"], (4, 3), 0)


def whole(kind: str) -> dict[str, Any]:
    """Return the state dict of a kind, as whole tensors."""
    pair = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    model: dict[str, Any] = {"pair": pair, "norm": torch.tensor([0.5, -1.5])}
    if kind == "hand-sharded":
        model = {"experts": torch.arange(12, dtype=torch.float32).reshape(2, 2, 3) - 6}
    moment = torch.arange(12, dtype=torch.float32) / 8
    like = next(iter(model.values()))
    return {"model": model, "optim": {"exp_avg": moment.reshape(like.shape)}, "step": STEP}


def exported(kind: str) -> Mapping[str, torch.Tensor]:
    """Return the tensors of the export of a kind."""
    model = whole(kind)["model"]
    if kind == "hand-sharded":
        return {f"experts.{i}": one for i, one in enumerate(model["experts"])}
    first, second = model["pair"].chunk(2)
    tensors = {"first": first, "second": second, "norm": model["norm"]}
    dtype = torch.bfloat16 if kind == "cast" else torch.float32
    return {key: one.to(dtype) for key, one in tensors.items()}


def experts_spec(rank: int, world_size: int) -> LoadSpec:
    """Return the spec of experts that each rank holds as a plain tensor."""
    pieces = [Piece(f"experts.{e}", (2, 3), ((6, 1, 1),), 0, e * 6) for e in range(2)]
    return LoadSpec(
        "experts", (), (2, 2, 3), shards=[ShardSpec(0, rank, world_size)], pieces=pieces
    )


def save_all(rank: int, world_size: int, root: Path) -> None:
    """Save one checkpoint of each kind below `root`."""
    mesh = init_device_mesh("cpu", (world_size,))
    for kind in KINDS:
        state, planner, options = whole(kind), None, {}
        if kind == "hand-sharded":
            spec = experts_spec(rank, world_size)
            state["model"]["experts"] = state["model"]["experts"][rank : rank + 1].clone()
            moment = state["optim"]["exp_avg"][rank : rank + 1].clone()
            state["optim"] = {"state": {"experts": {"exp_avg": moment}}}
            export, planner = HFExport(specs=[spec]), HFSavePlanner([spec])
        else:
            state["model"]["pair"] = distribute_tensor(state["model"]["pair"], mesh, [Shard(1)])
            state["optim"]["exp_avg"] = distribute_tensor(
                state["optim"]["exp_avg"], mesh, [Shard(0)]
            )
            dtype = torch.bfloat16 if kind == "cast" else None
            export = HFExport(specs=[PAIR], dtype=dtype, assets={"config.json": b"{}"})
            options = {"weights": "once"} if kind == "once" else {}
        writer = HFDualWriter(root / kind, export=export, **options)
        dcp.async_save(state, storage_writer=writer, planner=planner).result()
