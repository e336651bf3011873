"""Checkpoints that torch 2.0 to 2.3 wrote are read; `golden/torch-*` holds one of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from dcp_hf_writer import HFDualReader, materialize, verify
from support.compare import tensor_difference

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = ("2.0", "2.1", "2.2", "2.3")
each_version = pytest.mark.parametrize("version", VERSIONS)


def state(value: float) -> dict[str, Any]:
    """Return the state dict that two ranks saved, filled with another value."""
    return {
        "model": {
            "pair": torch.full((4, 3), value),
            "norm": torch.full((2,), value, dtype=torch.float64),
            "scale": torch.tensor(value, dtype=torch.bfloat16),
        },
        "optim": {
            "state": {0: {"step": torch.tensor(value), "exp_avg": torch.full((4, 3), value)}},
            "param_groups": [{"lr": value, "betas": (value, value), "params": [value]}],
        },
        "losses": [value, value],
        "step": value,
        "name": "",
    }


def tensors(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    moments = next(iter(found["optim"]["state"].values()))
    return {**found["model"], **moments}


def assert_saved(found: dict[str, Any]) -> None:
    pair = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    wanted = {
        "pair": pair,
        "norm": torch.tensor([0.5, -1.5], dtype=torch.float64),
        "scale": torch.tensor(3.0, dtype=torch.bfloat16),
        "step": torch.tensor(7.0),
        "exp_avg": pair / 8,
    }
    assert tensor_difference(tensors(found), wanted) is None
    assert found["optim"]["param_groups"] == [{"lr": 0.5, "betas": (0.9, 0.95), "params": [0]}]
    assert (found["losses"], found["step"], found["name"]) == ([3.0, 2.5], 7, "run")


@each_version
def test_checkpoint_of_an_old_torch_is_loaded(version: str) -> None:
    found = state(-1.0)
    dcp.load(found, storage_reader=HFDualReader(GOLDEN / f"torch-{version}"), no_dist=True)
    assert_saved(found)


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning")
@each_version
@pytest.mark.parametrize(
    "keys", [None, "model", {"optim", "model.norm"}], ids=["all", "one", "two"]
)
def test_keys_of_an_old_checkpoint_are_loaded_as_torch_loads_them(version: str, keys: Any) -> None:
    path = GOLDEN / f"torch-{version}"
    wanted = _load_state_dict_from_keys(keys, storage_reader=dcp.FileSystemReader(path))
    found = _load_state_dict_from_keys(keys, storage_reader=HFDualReader(path))
    assert str(found) == str(wanted)
    if keys is None:
        assert_saved(found)


@each_version
def test_old_checkpoint_is_checked_and_rewritten(version: str, tmp_path: Path) -> None:
    path = GOLDEN / f"torch-{version}"
    assert verify(path).ok, str(verify(path))
    materialize(path, tmp_path / "new")
    found = state(-1.0)
    dcp.load(found, checkpoint_id=tmp_path / "new", no_dist=True)
    assert_saved(found)


def test_metadata_with_the_old_class_is_read(tmp_path: Path) -> None:
    with patch("torch.distributed.checkpoint.metadata.TensorProperties", TensorProperties):
        dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path / "x")
    assert b"sharded_tensor" in (tmp_path / "x" / ".metadata").read_bytes()
    found = {"a": torch.zeros(3)}
    dcp.load(found, storage_reader=HFDualReader(tmp_path / "x"))
    assert torch.equal(found["a"], torch.ones(3))
