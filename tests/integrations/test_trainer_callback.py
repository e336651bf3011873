"""`HFDualCallback` in real runs of `transformers.Trainer`: killed, resumed, on other ranks."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from dcp_hf_writer import verify
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.integrations.trainer import HFDualCallback
from support.ranks import run_ranks, spawn_ranks
from support.trained_runs import (
    FSDP2,
    STEPS,
    assert_same_adapter,
    losses_of,
    make_trainer,
    tiny_llama,
)

if TYPE_CHECKING:
    from pathlib import Path


def train(  # noqa: PLR0917 - the arguments of a rank have no names
    rank: int,
    world_size: int,
    directory: Path,
    options: dict[str, Any],
    arguments: dict[str, Any],
    kill_at: int | None = None,
) -> None:
    """Train on a rank, and resume if there is something to resume from."""
    callback = HFDualCallback(resume=True, **options)
    trainer = make_trainer(rank, world_size, directory, callback, kill_at, arguments)
    trainer.train()


def train_and_kill(directory: Path, arguments: dict[str, Any], world_size: int) -> None:
    """Start a run that kills its last rank at step 5, and kill the others."""
    with spawn_ranks(train, world_size, directory, {}, arguments, 5, timeout_s=100) as handle:
        outcomes = handle.outcomes()
    assert outcomes[-1].exitcode == -9


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("arguments", "world_size"), [({}, 1), ({}, 2), (FSDP2, 2)], ids=["one", "ddp", "fsdp2"]
)
def test_run_that_is_killed_resumes_to_the_same_losses(
    tmp_path: Path, arguments: dict[str, Any], world_size: int
) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    plain.mkdir()
    killed.mkdir()
    run_ranks(train, world_size, plain, {}, arguments, timeout_s=120)
    train_and_kill(killed, arguments, world_size)
    assert max(losses_of(killed)) < STEPS
    run_ranks(train, world_size, killed, {}, arguments, timeout_s=120)
    assert set(losses_of(plain)) == set(range(1, STEPS + 1))
    assert losses_of(killed) == losses_of(plain)
    assert verify(killed / "run" / f"step-{STEPS}").ok


class Grab(TrainerCallback):
    """Keeps the weights and the learning rate that training begins with."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, control
        found = kwargs["model"].state_dict()
        self.step, self.rate = state.global_step, kwargs["optimizer"].param_groups[0]["lr"]
        self.weights = {k: _full(tensor).clone() for k, tensor in found.items()}


def _full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def resumed_weights(
    rank: int, world_size: int, directory: Path, arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Resume from the last step; return the weights that training begins with."""
    callback, grab = HFDualCallback(verify=True), Grab()
    trainer = make_trainer(rank, world_size, directory, callback, None, arguments)
    trainer.add_callback(grab)
    trainer.train(resume_from_checkpoint=str(directory / "run" / f"step-{STEPS}"))
    assert (grab.step, grab.rate) == (STEPS, 0), "the schedule has ended"
    return grab.weights


@pytest.mark.timeout(300)
def test_run_loads_on_another_number_of_ranks_and_in_transformers(tmp_path: Path) -> None:
    run_ranks(train, 2, tmp_path, {}, FSDP2, timeout_s=120)
    alone = run_ranks(resumed_weights, 1, tmp_path, {}, timeout_s=120)[0]
    sharded = run_ranks(resumed_weights, 2, tmp_path, FSDP2, timeout_s=120)[0]
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"step-{STEPS}" / "hf")
    for name, tensor in served.state_dict().items():
        assert torch.equal(tensor, alone[name]), name
        assert torch.equal(tensor, sharded[name]), name
    assert not torch.equal(served.lm_head.weight, tiny_llama().lm_head.weight)
    names = sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("checkpoint"))
    assert names == [], "Trainer must not save by itself"


def resume_from_damage(rank: int, world_size: int, directory: Path) -> int:
    """Train, cut the newest step off, and return the step that the next run resumes from."""
    train(rank, world_size, directory, {}, {})
    (file,) = (directory / "run" / f"step-{STEPS}").glob("*.distcp")
    os.truncate(file, 1000)
    grab = Grab()
    trainer = make_trainer(rank, world_size, directory, HFDualCallback())
    trainer.add_callback(grab)
    trainer.train(resume_from_checkpoint=True)
    return grab.step


@pytest.mark.timeout(200)
def test_damaged_step_is_passed_over_and_replaced(tmp_path: Path) -> None:
    assert run_ranks(resume_from_damage, 1, tmp_path, timeout_s=120) == [STEPS - 2]
    assert verify(tmp_path / "run" / f"step-{STEPS}").ok
    assert {step: len(losses) for step, losses in losses_of(tmp_path).items()} == dict.fromkeys(
        range(1, STEPS + 1), 1
    ), "the same losses again"


def lora_model() -> Any:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return get_peft_model(tiny_llama(), config)


def train_lora(rank: int, world_size: int, directory: Path, kill_at: int | None = None) -> None:
    callback = HFDualCallback(resume=True)
    trainer = make_trainer(rank, world_size, directory, callback, kill_at, {}, lora_model())
    trainer.train()
    if rank == 0:
        trainer.model.save_pretrained(directory / "peft")


@pytest.mark.timeout(300)
def test_lora_run_resumes_and_saves_the_adapter_as_peft_does(tmp_path: Path) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    plain.mkdir()
    killed.mkdir()
    run_ranks(train_lora, 1, plain, timeout_s=120)
    with spawn_ranks(train_lora, 1, killed, 5, timeout_s=100) as handle:
        assert handle.outcomes()[0].exitcode == -9
    run_ranks(train_lora, 1, killed, timeout_s=120)
    assert losses_of(killed) == losses_of(plain)
    assert_same_adapter(killed / "run" / f"step-{STEPS}" / "hf", plain / "peft")


def train_for_best(rank: int, world_size: int, directory: Path) -> tuple[Any, ...]:
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "save_total_limit": 1,
        "learning_rate": 1e-2,
    }
    trainer = make_trainer(rank, world_size, directory, HFDualCallback(), None, arguments)
    trainer.train()
    return trainer.state.best_global_step, {
        k: t.clone() for k, t in trainer.model.state_dict().items()
    }


@pytest.mark.timeout(200)
def test_best_step_is_kept_and_loaded_at_the_end(tmp_path: Path) -> None:
    best, weights = run_ranks(train_for_best, 1, tmp_path, timeout_s=120)[0]
    # A higher loss counts as better here, so the best step is the first.
    assert best == 2
    kept = sorted(p.name for p in (tmp_path / "run").glob("step-*"))
    assert kept == ["step-2", f"step-{STEPS}"]
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step-2" / "hf")
    for name, tensor in served.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def train_with_wrong_use(rank: int, world_size: int, directory: Path) -> list[str]:
    """Return what each wrong use of the callback is told."""
    said = []
    trainer = make_trainer(rank, world_size, directory, HFDualCallback())
    with pytest.raises(ConfigError) as nothing:
        trainer.train(resume_from_checkpoint=True)
    said.append(str(nothing.value))
    late = make_trainer(rank, world_size, directory, Nothing())
    late.add_callback(HFDualCallback())
    with pytest.raises(ConfigError) as detached:
        late.train()
    said.append(str(detached.value))
    return said


class Nothing(TrainerCallback):
    """A callback that does nothing."""


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    nothing, detached = run_ranks(train_with_wrong_use, 1, tmp_path)[0]
    assert "no checkpoint to resume from" in nothing
    assert "not attached to its Trainer" in detached


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": 5}, r"expected TrainingArguments\(save_strategy"),
        ({"staging": "overlap"}, "the option staging cannot be set here"),
        ({"export": "hf"}, "expected \"auto\", an HFExport, or None; found 'hf'"),
    ],
)
def test_option_that_trainer_decides_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HFDualCallback(**options)


def test_url_as_root_is_refused_and_not_taken_for_a_local_path() -> None:
    with pytest.raises(ConfigError, match="cannot write to an object store"):
        HFDualCallback("s3://bucket/run")
