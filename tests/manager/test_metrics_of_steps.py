"""The metrics of a step are part of its commit, so no crash makes `keep_best` forget the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dcp_hf_writer import CheckpointManager
from dcp_hf_writer.cli.keep_house_command import collect_garbage
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.manager.keep_house import Housekeeper
from dcp_hf_writer.manager.open_run import open_run
from dcp_hf_writer.manager.retention import KeepBest, Retention
from dcp_hf_writer.manager.step_names import StepNames
from support.faults import Strike, hits
from support.processes import FreshProcess
from support.store_runs import manager_on, small_state, steps_with_objects, store_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.store_saves import Store

KEEP: dict[str, Any] = {"keep_last": 1, "keep_best": ("loss", "min")}
LOSSES = {1: 0.3, 2: 0.1, 3: 0.2, 4: 0.4}


def save_until_killed(store: Store, root: Path) -> None:
    """Save steps 1 and 2; the process dies right after the commit of step 2."""
    manager = manager_on(store, save_every=1, **KEEP)
    with Strike(rank=0, point="after rename", action="kill", hit=2).installed(0, root):
        for step in (1, 2):
            manager.step(step, small_state(step), metrics={"loss": LOSSES[step]})
            manager.wait()


@pytest.mark.parametrize("kind", ["local", "shareddir"])
def test_best_step_stays_when_the_process_dies_right_after_its_commit(
    tmp_path: Path, kind: str
) -> None:
    store = store_of("shareddir", tmp_path, None)
    if kind == "local":
        store = type(store)(str(tmp_path / "run"))
    with FreshProcess(save_until_killed, store, tmp_path) as process:
        process.exitcode()
    assert hits(tmp_path) == ["0 kill after rename"]
    with manager_on(store, save_every=1, **KEEP) as manager:
        assert manager.restore(small_state(0)) == 2
        for step in (3, 4):
            manager.step(step, small_state(step), metrics={"loss": LOSSES[step]})
            manager.wait()
    assert manager.steps() == [2, 4]
    if kind == "shareddir":
        assert sorted(steps_with_objects(store)) == ["step-2", "step-4"]


def run_without_notes(root: Path) -> None:
    """Save three steps, and remove what the manager noted beside them."""
    with CheckpointManager(root, save_every=1) as manager:
        for step in (1, 2, 3):
            manager.step(step, small_state(step), metrics={"loss": LOSSES[step]})
    for notes in (root / ".dcp-hf-manager").glob("step-*.json"):
        notes.unlink()


def test_metrics_are_read_from_the_checkpoints_when_the_notes_are_gone(tmp_path: Path) -> None:
    run_without_notes(tmp_path)
    keep = Retention(keep_last=1, keep_best=KeepBest("loss", "min"))
    found = collect_garbage(str(tmp_path), "step-", keep, is_dry=False).value
    assert found["steps"] == [1]
    with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [2, 3]


def test_step_whose_metrics_cannot_be_read_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_without_notes(tmp_path)
    # Other bytes of the same size: a quick look does not see it.
    (file,) = (tmp_path / "step-1").glob("*.distcp")
    file.write_bytes(b"\xff" * file.stat().st_size)
    keep = Retention(keep_last=1, keep_best=KeepBest("loss", "min"))
    house = Housekeeper(open_run(tmp_path, StepNames()), keep)
    assert house.plan().steps == ()
    assert "step-1, whose metrics cannot be read" in caplog.text


def test_metrics_may_be_tensors_and_must_be_numbers(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=1) as manager:
        metrics: dict[str, Any] = {"loss": torch.tensor(0.5), "accuracy": np.float32(0.25)}
        manager.step(1, small_state(1), metrics=metrics)
        manager.wait()
        for bad in ("low", torch.zeros(2), None):
            with pytest.raises(ConfigError, match="metrics must be numbers"):
                manager.step(2, small_state(2), metrics={"loss": bad})  # type: ignore[dict-item]
    run = open_run(tmp_path, StepNames())
    assert run.notes_of(run.look_at(1)).metrics == {"loss": 0.5, "accuracy": 0.25}
