"""Checkpoints that several ranks write with stock torch, in the layouts that trainers use.

Each form is a model and the state dict that a trainer makes of it. A form is saved twice: by stock
`dcp.save`, and by the writer of this package as the live export to compare with.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from dcp_hf_writer import HFDualWriter, HFExport
from support.hf_models import build
from support.parallel_models import parallel_model
from support.rank_process import Raised

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

WORLD_SIZE = 4
EXPORT: Mapping[str, Any] = {"dtype": torch.bfloat16, "max_shard_size": "20KB"}

StateOf = dict[str, Any]


def _one_step(model: nn.Module) -> torch.optim.Optimizer:
    """Take a step, so that there are moments; the gradient of a weight is the weight."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for tensor in model.parameters():
        tensor.grad = tensor.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _weights(model: nn.Module, **options: bool) -> StateOf:
    return get_model_state_dict(model, options=StateDictOptions(**options))


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer, **options: bool) -> StateOf:
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**options))


def _both(model: nn.Module, **options: bool) -> StateOf:
    """Return weights and moments in an entry each, as torch's own recipe does."""
    optimizer = _one_step(model)
    moments = _moments(model, optimizer, **options)
    return {"model": _weights(model, **options), "optim": moments, "step": 7}


def _titan(model: nn.Module) -> StateOf:
    """Return what torchtitan saves: the weights at the top, everything else beside them."""
    optimizer = _one_step(model)
    moments = _moments(model, optimizer, flatten_optimizer_state_dict=True)
    return {
        **_weights(model),
        "optimizer": moments,
        "lr_scheduler": {"last_epoch": 2, "_step_count": 3},
        "train_state": {"step": torch.tensor(2), "ntokens_seen": torch.tensor(128)},
        "dataloader": {f"dp_rank_{dist.get_rank()}": b"place", "world_size": WORLD_SIZE},
    }


def _titan_below(model: nn.Module) -> StateOf:
    """Return what older versions of torchtitan save: the weights below `model`."""
    whole, names = _titan(model), _weights(model)
    return {"model": names, **{name: value for name, value in whole.items() if name not in names}}


def _fsdp1(model: PreTrainedModel, *, hybrid: bool = False, mesh: bool = False) -> nn.Module:
    layers = {type(layer) for layer in model.model.layers}
    if hybrid:
        places = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        strategy = ShardingStrategy.HYBRID_SHARD
    else:
        places = init_device_mesh("cpu", (WORLD_SIZE,)) if mesh else None
        strategy = ShardingStrategy.FULL_SHARD
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(layers),
        device_id=torch.device("cpu"),
        sharding_strategy=strategy,
        device_mesh=places,
        use_orig_params=True,
    )


def _fsdp1_state(model: nn.Module, kind: StateDictType) -> StateOf:
    optimizer = _one_step(model)
    with FullyShardedDataParallel.state_dict_type(model, kind):
        moments = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        return {"model": model.state_dict(), "optimizer": moments}


def _fsdp2(name: str) -> nn.Module:
    return parallel_model(name, "fsdp", saved=None)


def _plain(name: str) -> PreTrainedModel:
    return build(name)


def _on_rank_0(state: StateOf) -> StateOf:
    return state if dist.get_rank() == 0 else {}


FORMS: Mapping[str, Callable[[str], StateOf]] = {
    "fsdp2": lambda name: _both(_fsdp2(name)),
    "fsdp2_flat_optimizer": lambda name: _both(_fsdp2(name), flatten_optimizer_state_dict=True),
    "fsdp2_gathered_on_rank_0": lambda name: _on_rank_0(
        _both(_fsdp2(name), full_state_dict=True, cpu_offload=True)
    ),
    "fsdp2_weights_alone": lambda name: _weights(_fsdp2(name)),
    "hsdp2": lambda name: _both(parallel_model(name, "hsdp", saved=None)),
    "titan": lambda name: _titan(_fsdp2(name)),
    "titan_below_model": lambda name: _titan_below(_fsdp2(name)),
    "fsdp1_full": lambda name: _fsdp1_state(_fsdp1(_plain(name)), StateDictType.FULL_STATE_DICT),
    "fsdp1_sharded": lambda name: _fsdp1_state(
        _fsdp1(_plain(name)), StateDictType.SHARDED_STATE_DICT
    ),
    "fsdp1_sharded_dtensor": lambda name: _fsdp1_state(
        _fsdp1(_plain(name), mesh=True), StateDictType.SHARDED_STATE_DICT
    ),
    "hsdp1": lambda name: _fsdp1_state(
        _fsdp1(_plain(name), hybrid=True), StateDictType.SHARDED_STATE_DICT
    ),
    "ddp": lambda name: {"model": DistributedDataParallel(_plain(name)).state_dict()},
    "compiled_fsdp2": lambda name: {"model": torch.compile(_fsdp2(name)).state_dict()},
    "tp": lambda name: _both(parallel_model(name, "tp", saved=None)),
    "fsdp_tp": lambda name: _both(parallel_model(name, "fsdp_tp", saved=None)),
    "ep_fsdp": lambda name: _both(parallel_model(name, "ep_fsdp", saved=None)),
}


def save_stock_layouts(
    rank: int, world_size: int, root: Path, forms: list[tuple[str, str]]
) -> dict[tuple[str, str], Raised]:
    """Save each (model, form) by stock torch and live; return what failed."""
    warnings.simplefilter("ignore")
    failures = {}
    for name, form in forms:
        try:
            _save(root / name / form, build(name), FORMS[form](name))
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            failures[name, form] = Raised.of(error)
    return failures


def _save(directory: Path, unsharded: PreTrainedModel, state: StateOf) -> None:
    dcp.save(state, checkpoint_id=directory / "stock")
    export = HFExport.from_transformers(unsharded, **EXPORT)
    dcp.save(state, storage_writer=HFDualWriter(directory / "live", export=export))
