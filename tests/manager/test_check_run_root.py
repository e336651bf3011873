"""A checkpoint is not taken for a run: as a run it would look empty, and training start again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import CheckpointManager, HFDualWriter
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.manager.check_run_root import check_run_root
from support.command import dcp_hf
from support.store_runs import manager_on, small_state, store_of
from support.store_saves import Store

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

WORDS = "path of one checkpoint, not of a run"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "ckpt" / "step-10"
    state = {"model": {"w": torch.ones(2)}}
    dcp.save(state, storage_writer=HFDualWriter(path), no_dist=True)
    return path


def test_manager_refuses_the_path_of_a_checkpoint_and_names_the_run(checkpoint: Path) -> None:
    before = sorted(checkpoint.rglob("*"))
    with pytest.raises(ConfigError, match=WORDS) as raised:
        CheckpointManager(checkpoint)
    assert f"pass {checkpoint.parent}" in str(raised.value)
    assert sorted(checkpoint.rglob("*")) == before
    with CheckpointManager(checkpoint.parent) as manager:
        assert manager.latest() == 10


def test_manager_refuses_a_checkpoint_of_torch(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "old", no_dist=True)
    with pytest.raises(ConfigError, match=WORDS):
        CheckpointManager(tmp_path / "old")


@pytest.mark.parametrize("kind", ["memory", "shareddir"])
def test_manager_refuses_the_url_of_a_checkpoint(tmp_path: Path, kind: str) -> None:
    store = store_of(kind, tmp_path, None)
    with manager_on(store, save_every=1) as manager:
        manager.step(1, small_state(1))
    inner = Store(store.at("step-1"), store.storage_options)
    with manager_on(inner) as manager:
        with pytest.raises(ConfigError, match=WORDS):
            manager.latest()
        with pytest.raises(ConfigError, match=WORDS):
            manager.restore(small_state(0))


@pytest.mark.parametrize("command", ["ls", "latest", "gc"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_command_refuses_the_path_of_a_checkpoint(
    checkpoint: Path, command: str, scheme: str
) -> None:
    found = dcp_hf(command, f"{scheme}{checkpoint}")
    assert found.code == 2
    assert WORDS in " ".join(found.err.split())
    assert str(checkpoint.parent) in found.err.replace("\n", "")


def test_run_may_lie_beside_a_checkpoint_in_one_directory() -> None:
    check_run_root("runs/a", ["dcp-hf.json", ".metadata", "step-1"], has_steps=True)
    check_run_root("runs/a", ["notes.txt"], has_steps=False)
