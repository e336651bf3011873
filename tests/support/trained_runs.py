"""Runs of `transformers.Trainer` on real ranks, small enough for two cores."""

from __future__ import annotations

import json
import os
import re
import signal
import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 8
LINE = re.compile(r"step (\d+) loss (\S+)")


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of token ids; each row depends on its number only."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


class Watcher(TrainerCallback):
    """Writes the losses of a rank to a file, which outlives a kill, and may end the process."""

    def __init__(self, directory: Path, rank: int, kill_at: int | None) -> None:
        self._path, self._kill_at = directory / f"losses-{rank}.txt", kill_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        del args, control
        if "loss" in logs:
            with self._path.open("a") as losses:
                losses.write(f"step {state.global_step} loss {logs['loss']!r}\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        if state.global_step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def tiny_llama() -> LlamaForCausalLM:
    """Make the model; its dropout makes the losses depend on the random number generators."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attention_dropout=0.2,
    )
    return LlamaForCausalLM(config)


def losses_of(directory: Path) -> dict[int, set[str]]:
    """Return all losses that any rank ever logged for a step."""
    found: dict[int, set[str]] = {}
    for path in directory.glob("losses-*.txt"):
        for step, loss in LINE.findall(path.read_text()):
            found.setdefault(int(step), set()).add(loss)
    return found


def use_fsdp2_on_gloo(trainer: Trainer) -> None:
    """Switch on accelerate's FSDP2, which accelerate itself offers on accelerators only.

    What shards, wraps and steps is accelerate's own code.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True


def make_trainer(  # noqa: PLR0917 - the arguments of a rank have no names
    rank: int,
    world_size: int,
    directory: Path,
    callback: Any,
    kill_at: int | None = None,
    arguments: dict[str, Any] | None = None,
    model: Any = None,
) -> Trainer:
    """Make a Trainer on a rank, as a script under `torchrun` does."""
    warnings.simplefilter("ignore")
    if world_size > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        os.environ.update(dict(zip(names, map(str, (rank, rank, world_size)), strict=True)))
    given: dict[str, Any] = {
        "output_dir": str(directory / "run"),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
    }
    args = TrainingArguments(**given, **(arguments or {}))
    rows = Rows()
    trainer = Trainer(
        model=model or tiny_llama(),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[callback, Watcher(directory, rank, kill_at)],
    )
    if args.fsdp:
        use_fsdp2_on_gloo(trainer)
    return trainer


FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
    },
}


def assert_same_adapter(ours: Path, theirs: Path) -> None:
    """Check two directories of an adapter: equal weights, and equal configs.

    PEFT keeps the names of modules in a set, whose order may change when it is copied. So the lists
    in the config are compared sorted.
    """
    name = "adapter_model.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    found, expected = (
        json.loads((directory / "adapter_config.json").read_text()) for directory in (ours, theirs)
    )
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, list):
            assert sorted(found[key]) == sorted(value), key
        else:
            assert found[key] == value, key
