"""`DualCheckpointer` with the parts of a real torchtitan, if it is there."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from dcp_hf_writer import verify
from dcp_hf_writer.errors import ConfigError, ReadError
from dcp_hf_writer.integrations.torchtitan import DualCheckpointer, checkpoint_config
from support.ranks import run_ranks, spawn_ranks
from support.titan_runs import (
    STEPS,
    TitanRun,
    base_config,
    reason_to_skip,
    run_to_end,
    values,
)

if TYPE_CHECKING:
    from pathlib import Path

with_torchtitan = pytest.mark.skipif(bool(reason_to_skip()), reason=str(reason_to_skip()))


def train(rank: int, world_size: int, directory: Path, kill_at: int | None = None) -> Any:
    del rank
    run = TitanRun(world_size)
    return run_to_end(run, run.build(checkpoint_config(base_config()), directory), kill_at)


def train_with_torchtitan(rank: int, world_size: int, directory: Path) -> Any:
    del rank
    run = TitanRun(world_size)
    return run_to_end(run, run.build(base_config(), directory))


def load(
    rank: int, world_size: int, directory: Path, fields: dict[str, Any], step: int = -1
) -> Any:
    """Load into a run with other values; return its progress and its values."""
    del rank
    is_ours = fields.pop("is_ours")
    run = TitanRun(world_size, seed=7)
    config = base_config(**fields)
    checkpointer = run.build(checkpoint_config(config) if is_ours else config, directory)
    is_loaded = checkpointer.load(step)
    checkpointer.close()
    moments = values(run.optimizers.state_dict())
    rates = run.lr_schedulers.state_dict()
    model = values(run.model_parts[0].state_dict())
    return is_loaded, run.progress.state_dict(), model, moments, rates


def steps_in(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in folder.iterdir() if re.fullmatch(r"step-\d+", p.name))


@with_torchtitan
@pytest.mark.timeout(300)
def test_run_that_is_killed_resumes_to_the_same_values(tmp_path: Path) -> None:
    plain, *_ = run_ranks(train, 2, tmp_path / "plain", timeout_s=120)
    assert (plain["loaded"], plain["saved"]) == (False, [1, 2, 4, STEPS])
    assert steps_in(tmp_path / "plain" / "checkpoint") == [2, 4, 6]
    with spawn_ranks(train, 2, tmp_path / "killed", 5, timeout_s=120) as handle:
        assert -9 in [one.exitcode for one in handle.outcomes()]
    again, *_ = run_ranks(train, 2, tmp_path / "killed", timeout_s=120)
    assert again["loaded"]
    assert again["start"] in {2, 4}, "the save of step 4 may have been cut off"
    want = {step: loss for step, loss in plain["losses"].items() if step > again["start"]}
    assert again["losses"] == want
    assert verify(tmp_path / "killed" / "checkpoint" / "step-6").ok


@with_torchtitan
@pytest.mark.timeout(300)
def test_either_checkpointer_resumes_from_the_other_on_another_number_of_ranks(
    tmp_path: Path,
) -> None:
    run_ranks(train, 2, tmp_path / "ours", timeout_s=120)
    run_ranks(train_with_torchtitan, 2, tmp_path / "theirs", timeout_s=120)
    found = [
        run_ranks(load, 1, tmp_path / name, {"is_ours": is_ours}, timeout_s=120)[0]
        for name in ("ours", "theirs")
        for is_ours in (True, False)
    ]
    assert found[0][:2] == (True, {"step": 6, "ntokens_seen": 384})
    assert found[1] == found[0]
    assert found[3] == found[2]
    assert found[2][:2] == found[0][:2]


@with_torchtitan
@pytest.mark.timeout(300)
def test_new_run_begins_with_the_export_and_a_last_save_may_hold_the_model_only(
    tmp_path: Path,
) -> None:
    (first, *_) = run_ranks(train, 2, tmp_path / "first", timeout_s=120)
    export = tmp_path / "first" / "checkpoint" / "step-6" / "hf"
    fields = {"initial_load_path": str(export), "initial_load_in_hf": True, "is_ours": True}
    is_loaded, progress, model, _, _ = run_ranks(load, 2, tmp_path / "second", fields)[0]
    assert (is_loaded, progress["step"]) == (True, 0)
    assert sum(model.values()) == first["losses"][6]
    assert load_file(export / "model.safetensors")


@with_torchtitan
def test_step_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"no checkpoint of this step \(.*step-3\)"):
        run_ranks(load, 1, tmp_path, {"is_ours": True}, 3)


def config_like_torchtitan(**fields: Any) -> Any:
    given = {"enable": True, "folder": "c", "interval": 2, "keep_latest_k": 0, "load_only": False}
    more = {"enable_first_step_checkpoint": False, "last_save_in_hf": False}
    return SimpleNamespace(**{**given, **more, "export_dtype": "float32", **fields})


def checkpointer(tmp_path: Path, config: Any, **options: Any) -> DualCheckpointer:
    return DualCheckpointer(
        config,
        model_parts=[],
        optimizers=None,
        lr_schedulers=None,
        dataloader=None,
        states={},
        base_folder=str(tmp_path),
        **options,
    )


def test_disabled_checkpointer_does_nothing(tmp_path: Path) -> None:
    made = checkpointer(tmp_path, config_like_torchtitan(enable=False))
    assert made.load() is False
    assert made.save(2, last_step=True) is False
    made.maybe_wait_for_staging()
    made.maybe_wait_for_saving()
    made.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"last_save_in_hf": True}, {}, "needs to know the layout of the hub"),
        ({}, {"keep_last": 3}, "expected checkpoint.keep_latest_k; found keep_last=3"),
        ({}, {"save_every": 3}, "expected checkpoint.interval"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    tmp_path: Path, fields: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        checkpointer(tmp_path, config_like_torchtitan(**fields), **options)


def test_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a CheckpointManager.Config; found dict"):
        checkpoint_config({})
