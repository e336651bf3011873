"""Short runs of torchtitan's own parts on real ranks: model, optimizers, schedulers, config."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import fully_shard

if TYPE_CHECKING:
    from pathlib import Path

# torchtitan and what its models import; it cannot be a dependency, since it wants another torch.
NEEDED = ("torchtitan", "tyro", "spmd_types", "triton", "torchdata")
STEPS = 6


def reason_to_skip() -> str | None:
    """Say what stands in the way of torchtitan; `None` if nothing does."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class Progress:
    """What torchtitan's trainer saves of itself."""

    def __init__(self) -> None:
        self.step, self.ntokens_seen = 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]


class TitanRun:
    """The parts of a run, put together as torchtitan's trainer does."""

    def __init__(self, world_size: int, *, seed: int = 0, layers: int = 2) -> None:
        warnings.simplefilter("ignore")
        llama3 = importlib.import_module("torchtitan.models.llama3")
        adapters = importlib.import_module("torchtitan.models.llama3.state_dict_adapter")
        parts = importlib.import_module("torchtitan.components.optimizer")
        config = llama3.llama3_configs["debugmodel"](attn_backend="flex")
        del config.layers[layers:]
        torch.manual_seed(seed)
        model = config.build()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.normal_()
        if world_size > 1:
            for layer in model.layers.values():
                fully_shard(layer)
            fully_shard(model)
        self.model_parts = [model]
        group = parts.ParamGroupConfig(
            pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.01}
        )
        self.optimizers = parts.OptimizersContainer.Config(
            param_groups=[group], implementation="for-loop"
        ).build(model_parts=self.model_parts)
        self.lr_schedulers = parts.LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.optimizers, training_steps=STEPS
        )
        self.progress = Progress()
        self.adapter = adapters.Llama3StateDictAdapter(config, None)

    def build(self, config: Any, directory: Path) -> Any:
        """Build a checkpointer from a config, as torchtitan's trainer does."""
        return config.build(
            dataloader=None,
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self.progress},
            sd_adapter=self.adapter,
            base_folder=str(directory),
        )

    def train_step(self, checkpointer: Any) -> float:
        """Take a step whose gradients depend on random numbers; return the norm of the weights."""
        self.progress.step += 1
        self.progress.ntokens_seen += 64
        for tensor in self.model_parts[0].parameters():
            tensor.grad = tensor.detach() * torch.rand(()).item()
        checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        self.lr_schedulers.step()
        self.optimizers.zero_grad()
        return sum(values(self.model_parts[0].state_dict()).values())


def values(state: dict[str, Any]) -> dict[str, float]:
    """Return a sum of each tensor that no two different tensors are likely to share."""
    found = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found[name] = whole.double().square().sum().item()
    return found


def base_config(**fields: Any) -> Any:
    """Make the checkpoint config of torchtitan."""
    titan = importlib.import_module("torchtitan.components.checkpointer")
    given = {
        "enable": True,
        "interval": 2,
        "enable_first_step_checkpoint": True,
        "last_save_model_only": False,
        "keep_latest_k": 3,
    }
    return titan.CheckpointManager.Config(**{**given, **fields})


def run_to_end(run: TitanRun, checkpointer: Any, kill_at: int | None = None) -> dict[str, Any]:
    """Load, train and save as torchtitan's trainer does; return losses and the steps saved."""
    found: dict[str, Any] = {"loaded": checkpointer.load(), "losses": {}, "saved": []}
    found["start"] = run.progress.step
    while run.progress.step < STEPS:
        loss = run.train_step(checkpointer)
        step = run.progress.step
        found["losses"][step] = loss
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if checkpointer.save(step, last_step=step == STEPS):
            found["saved"].append(step)
    checkpointer.close()
    return found
