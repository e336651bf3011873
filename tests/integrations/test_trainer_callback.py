"""`HFDualCallback` in real runs of `transformers.Trainer`: killed, resumed, on other ranks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dcp_hf_writer import verify
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.integrations.trainer import HFDualCallback
from support.ranks import run_ranks, spawn_ranks
from support.trained_runs import FSDP2, STEPS, losses_of, make_trainer, tiny_llama

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
