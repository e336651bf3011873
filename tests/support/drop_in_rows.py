"""The programs of the drop-in table: what four ranks, or one process, save and load.

Each makes its models anew, with the same values, and loads into values of another seed.
"""

from __future__ import annotations

import datetime as dt
import http
import io
import random
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.distributed.checkpoint.planner import LoadPlan

    from support.drop_in import Calls

WORLD_SIZE = 4


class Net(nn.Module):
    """Two layers and a buffer; no size is a multiple of four."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.register_buffer("count", torch.tensor(float(seed)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def stepped(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Make an optimizer that has taken a step, so that it has moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * lr
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def trained(calls: Calls, made: Callable[[int], nn.Module], **options: Any) -> dict[str, Any]:
    """Save a model with its optimizer, and load both into others."""
    how = StateDictOptions(**options)
    model = made(1)
    optimizer = stepped(model, 0.01)
    weights, moments = get_state_dict(model, optimizer, options=how)
    calls.save({"model": weights, "optim": moments, "step": 7})
    model = made(2)
    optimizer = stepped(model, 0.5)
    weights, moments = get_state_dict(model, optimizer, options=how)
    state = calls.load({"model": weights, "optim": moments, "step": 0})
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=how,
    )
    weights, moments = get_state_dict(model, optimizer, options=how)
    return {"model": weights, "optim": moments, "step": state["step"]}


def sharded(seed: int, mesh: Any) -> nn.Module:
    model = Net(seed)
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2(calls: Calls) -> Any:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    return trained(calls, lambda seed: sharded(seed, mesh))


def fsdp2_flat(calls: Calls) -> Any:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    return trained(calls, lambda seed: sharded(seed, mesh), flatten_optimizer_state_dict=True)


def fsdp2_full(calls: Calls) -> Any:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    made = sharded(1, mesh)
    whole = StateDictOptions(full_state_dict=True)
    calls.save({"model": get_model_state_dict(made, options=whole)})
    return calls.load({"model": get_model_state_dict(sharded(2, mesh))})


def loaded_alone(calls: Calls) -> Any:
    """What four ranks saved is loaded by each rank alone, whole."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    calls.save({"model": get_model_state_dict(sharded(1, mesh))})
    return calls.load({"model": Net(2).state_dict()}, no_dist=True)


def hsdp(calls: Calls) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return trained(calls, lambda seed: sharded(seed, mesh))


def tensor_parallel(seed: int, mesh: Any) -> nn.Module:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(Net(seed), mesh, plan)


def tp(calls: Calls) -> Any:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    return trained(calls, lambda seed: tensor_parallel(seed, mesh))


def fsdp2_and_tp(calls: Calls) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def made(seed: int) -> nn.Module:
        return fully_shard(tensor_parallel(seed, mesh["tp"]), mesh=mesh["dp"])

    return trained(calls, made)


def fsdp1(calls: Calls, kind: StateDictType, *, use_orig_params: bool) -> Any:
    def made(seed: int) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(
            Net(seed), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    def taken(model: FullyShardedDataParallel, lr: float) -> dict[str, Any]:
        optimizer = stepped(model, lr)
        with FullyShardedDataParallel.state_dict_type(model, kind):
            moments = FullyShardedDataParallel.optim_state_dict(model, optimizer)["state"]
            return {"model": model.state_dict(), "optim": moments}

    calls.save(taken(made(1), 0.01))
    model = made(2)
    state = calls.load(taken(model, 0.5))
    with FullyShardedDataParallel.state_dict_type(model, kind):
        model.load_state_dict(state["model"])
        return {"model": model.state_dict(), "optim": state["optim"]}


def fsdp1_sharded(calls: Calls) -> Any:
    return fsdp1(calls, StateDictType.SHARDED_STATE_DICT, use_orig_params=False)


def fsdp1_sharded_orig(calls: Calls) -> Any:
    return fsdp1(calls, StateDictType.SHARDED_STATE_DICT, use_orig_params=True)


def fsdp1_full(calls: Calls) -> Any:
    return fsdp1(calls, StateDictType.FULL_STATE_DICT, use_orig_params=True)


def pipeline_stages(calls: Calls) -> Any:
    """Each rank holds the layers of its stage only, under names of their own."""
    rank = dist.get_rank()

    def state(seed: int) -> dict[str, Any]:
        stage = {f"layers.{rank}.{name}": one for name, one in Net(seed).state_dict().items()}
        return {"model": stage, "optim": {f"layers.{rank}.lr": seed}}

    calls.save(state(1))
    return calls.load(state(2))


def resharded(calls: Calls) -> Any:
    """Save over one mesh, and load over meshes of another shape and with other placements."""
    line = init_device_mesh("cpu", (WORLD_SIZE,))
    square = init_device_mesh("cpu", (2, 2))
    values = {
        "rows": torch.arange(63.0).reshape(9, 7),
        "columns": torch.arange(30.0).reshape(3, 10),
        "few": torch.arange(3.0),
    }
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "few": [Shard(0)]}
    state = {k: distribute_tensor(v, line, placements[k]) for k, v in values.items()}
    calls.save({"model": state})
    others = {
        "rows": (square, [Shard(1), Shard(0)]),
        "columns": (square, [Replicate(), Shard(0)]),
        "few": (line, [Replicate()]),
    }
    blank = {k: distribute_tensor(torch.zeros_like(v), *others[k]) for k, v in values.items()}
    return calls.load({"model": blank})


def subgroup(calls: Calls) -> Any:
    """Two of the four ranks save and load, through a group of their own."""
    group = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        return {"apart": 1}
    state = {"model": Net(1).state_dict()}
    calls.save(state, process_group=group)
    return calls.load({"model": Net(2).state_dict()}, process_group=group)


class App:
    """A Stateful: torch asks for its state, and gives it its state."""

    def __init__(self, seed: int) -> None:
        self.model = Net(seed)
        self.optimizer = stepped(self.model, 0.1 * seed)

    def state_dict(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optim": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )


def stateful(calls: Calls) -> Any:
    calls.save({"app": App(1), "step": 3})
    app = App(2)
    state = calls.load({"app": app, "step": 0})
    return {"app": app.state_dict(), "step": state["step"]}


def partial_load(calls: Calls) -> Any:
    calls.save({"model": Net(1).state_dict(), "step": 3})
    some = {name: one for name, one in Net(2).state_dict().items() if "up" in name}
    kept = {"model": {**some, "new": torch.ones(2)}}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    return [calls.load({"model": some}), calls.load(kept, planner=planner)]


def keyed_load(calls: Calls) -> Any:
    calls.save({"model": Net(1).state_dict(), "optim": {"lr": [0.1, 0.2]}, "step": 3})
    return [calls.load_keys(keys) for keys in ("step", {"model.up.bias"}, {"optim", "step"})]


class LeavesOut(DefaultLoadPlanner):
    """Loads what fits, such as everything but a new head."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        there: Any = self.metadata.state_dict_metadata
        fitting = {
            k: v for k, v in self.state_dict.items() if k in there and there[k].size == v.size()
        }
        return create_default_local_load_plan(fitting, self.metadata)


class Doubles(DefaultSavePlanner):
    """Saves twice the value of each tensor."""

    def resolve_data(self, write_item: Any) -> Any:
        found = super().resolve_data(write_item)
        return found * 2 if isinstance(found, torch.Tensor) else found


def custom_load_planner(calls: Calls) -> Any:
    calls.save({"model": Net(1).state_dict()})
    state = {"model": {**Net(2).state_dict(), "up.bias": torch.zeros(3), "new": torch.ones(1)}}
    return calls.load(state, planner=LeavesOut())


def custom_save_planner(calls: Calls) -> Any:
    state = {"model": Net(1).state_dict(), "ema": Net(3).state_dict()}
    calls.save(state, planner=Doubles())
    return calls.load({"model": Net(2).state_dict(), "ema": Net(2).state_dict()})


def not_flattened(calls: Calls) -> Any:
    calls.save(dict(Net(1).state_dict()), planner=DefaultSavePlanner(flatten_state_dict=False))
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    return calls.load(dict(Net(2).state_dict()), planner=planner)


def plan_caching(calls: Calls) -> Any:
    """Save three times with plans that torch keeps; the third has another layout."""
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    found = []
    for step in range(3):
        state = {"model": get_model_state_dict(sharded(step, mesh))}
        blank = {"model": get_model_state_dict(sharded(9, mesh))}
        if step == 2:
            state["more"], blank["more"] = torch.ones(3), torch.zeros(3)  # type: ignore[assignment]
        planner = DefaultSavePlanner(enable_plan_caching=True)
        calls.save(state, f"step-{step}", planner=planner)
        found.append(calls.load(blank, f"step-{step}"))
    return found


def optimizer_in_backward(calls: Calls) -> Any:
    with warnings.catch_warnings():
        # The import compiles functions in a way that newer versions of Python deprecate.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import _apply_optimizer_in_backward

    def made(seed: int) -> tuple[nn.Module, list[Any]]:
        model = Net(seed)
        _apply_optimizer_in_backward(torch.optim.AdamW, model.parameters(), {"lr": 0.1 * seed})
        model(torch.ones(2, 6)).sum().backward()
        optimizers: Any = [p._in_backward_optimizers[0] for p in model.parameters()]  # type: ignore[attr-defined]
        return model, optimizers

    model, optimizers = made(1)
    weights, moments = get_state_dict(model, optimizers)
    calls.save({"model": weights, "optim": moments})
    model, optimizers = made(2)
    weights, moments = get_state_dict(model, optimizers)
    return calls.load({"model": weights, "optim": moments})


def checkpoint_id_with_a_writer(calls: Calls) -> Any:
    """One writer and one reader for several checkpoints."""
    writer, reader = calls.writer("first"), calls.reader("first")
    found = []
    for step in (1, 2):
        where = calls.path(f"step-{step}")
        calls.save({"model": Net(step).state_dict()}, checkpoint_id=where, storage_writer=writer)
        blank = {"model": Net(9).state_dict()}
        found.append(calls.load(blank, checkpoint_id=where, storage_reader=reader))
    return found


def checkpoint_id_without_a_reader(calls: Calls) -> Any:
    calls.save({"model": Net(1).state_dict(), "step": 3})
    blank = {"model": Net(2).state_dict(), "step": 0}
    where = calls.path("step-1")
    return calls.load(blank, checkpoint_id=where, storage_reader=None)


def no_dist(calls: Calls) -> Any:
    calls.options["no_dist"] = True
    calls.save({"model": Net(1).state_dict(), "step": 3})
    return calls.load({"model": Net(2).state_dict(), "step": 0})


def to_torch_save(calls: Calls) -> Any:
    calls.save({"model": Net(1).state_dict(), "optim": {"lr": [0.1]}})
    file = calls.path("file.pt")
    dcp_to_torch_save(calls.path("step-1"), file)
    return torch.load(file)


def from_torch_save(calls: Calls) -> Any:
    file = calls.path("file.pt")
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": Net(1).state_dict(), "optim": {"lr": [0.1]}}, file)
    torch_save_to_dcp(file, calls.path("step-1"))
    return calls.load({"model": Net(2).state_dict(), "optim": {"lr": [0.0]}})


def values_beside_weights(calls: Calls) -> Any:
    """What trainers keep beside weights."""

    def state(seed: int) -> dict[str, Any]:
        np.random.seed(seed)  # noqa: NPY002 - the state that trainers keep
        random.seed(seed)
        torch.manual_seed(seed)
        kept = {
            "rng": (np.random.get_state(), random.getstate(), torch.get_rng_state()),  # noqa: NPY002
            "torch": torch.get_rng_state(),
            "losses": np.arange(3) * seed,
            "best": np.float64(seed),
            "loader": io.BytesIO(bytes([seed])),
            "when": dt.datetime(2026, 1, seed, tzinfo=dt.timezone.utc),
            "data": Path(f"/data/{seed}"),
            "status": http.HTTPStatus(200 + seed),
            "names": {"a", f"b{seed}"},
            "nothing": None,
        }
        return {"model": Net(seed).state_dict(), "trainer": kept}

    calls.save(state(1))
    return calls.load(state(2))


RANK_ROWS: Mapping[str, Callable[[Calls], Any]] = {
    "FSDP1, sharded state dicts": fsdp1_sharded,
    "FSDP1, sharded state dicts, `use_orig_params`": fsdp1_sharded_orig,
    "FSDP1, full state dicts": fsdp1_full,
    "FSDP2 with AdamW": fsdp2,
    "FSDP2, flattened optimizer state": fsdp2_flat,
    "FSDP2, full state dict saved, shards loaded": fsdp2_full,
    "FSDP2 saved, loaded by each rank alone": loaded_alone,
    "HSDP": hsdp,
    "TP": tp,
    "FSDP2 and TP": fsdp2_and_tp,
    "pipeline stages": pipeline_stages,
    "DTensors, resharded between meshes": resharded,
    "`process_group=` of some ranks": subgroup,
    "`Stateful` objects": stateful,
    "plan caching": plan_caching,
}
"""Rows of four ranks."""

ROWS: Mapping[str, Callable[[Calls], Any]] = {
    "partial loads": partial_load,
    "loads by key": keyed_load,
    "load planner that leaves out": custom_load_planner,
    "save planner that changes values": custom_save_planner,
    "planners that do not flatten": not_flattened,
    "optimizer in backward": optimizer_in_backward,
    "`checkpoint_id=` with a writer and a reader": checkpoint_id_with_a_writer,
    "`checkpoint_id=` without a reader": checkpoint_id_without_a_reader,
    "`no_dist=True`": no_dist,
    "`dcp_to_torch_save`": to_torch_save,
    "`torch_save_to_dcp`": from_torch_save,
    "random states, numpy, dates, paths, enums": values_beside_weights,
}
"""Rows of one process."""
