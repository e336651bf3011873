"""torch's `_load_state_dict_from_keys` through our reader: sets, strings and nested keys."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from dcp_hf_writer import HFDualReader, HFDualWriter, LoadSpec

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning")

STATE: dict[str, Any] = {
    "model": {"a.w": torch.ones(3), "b": {"w": torch.ones(2), "n": [torch.ones(1), 3]}},
    "optim": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.5}]},
    "step": 7,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "step-1"
    dcp.save(STATE, storage_writer=HFDualWriter(path, export=None), no_dist=True)
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    weights = {"a.w": torch.ones(3), "a.b.c": torch.ones(1), "ab": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "keys",
    [
        None,
        "step",
        {"model"},
        {"model.b"},
        {"model.a.w", "step"},
        {"optim.state.0"},
        {"optim.param_groups"},
        set(),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_keys_of_the_dcp_half_are_loaded_as_torch_loads_them(saved: Path, keys: Any) -> None:
    wanted = _load_state_dict_from_keys(keys, storage_reader=dcp.FileSystemReader(saved))
    found = _load_state_dict_from_keys(keys, storage_reader=HFDualReader(saved))
    assert str(found) == str(wanted)
    assert bool(found) == (keys != set())


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (None, ["a.b.c", "a.w", "ab"]),
        ("a.w", ["a.w"]),
        ({"a.w", "ab"}, ["a.w", "ab"]),
        ({"a"}, ["a.b.c", "a.w"]),
        ({"a.b"}, ["a.b.c"]),
        (set(), []),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_keys_of_a_huggingface_directory_are_loaded(
    directory: Path, keys: Any, wanted: list[str]
) -> None:
    found = _load_state_dict_from_keys(keys, storage_reader=HFDualReader(directory))
    assert sorted(found) == wanted
    assert all(bool((value == 1).all()) for value in found.values())


def test_keys_name_runtime_tensors_where_specs_map_them(directory: Path) -> None:
    reader = HFDualReader(
        directory, specs=[LoadSpec("joined", ["a.w", "ab"], (5,), 0, fused_sizes=(3, 2))]
    )
    found = _load_state_dict_from_keys({"joined"}, storage_reader=reader)
    assert {name: value.tolist() for name, value in found.items()} == {"joined": [1.0] * 5}


def test_keys_lie_in_the_entry_that_the_reader_names(directory: Path) -> None:
    reader = HFDualReader(directory, key="model")
    found = _load_state_dict_from_keys({"model.a"}, storage_reader=reader)
    assert sorted(found) == ["model.a.b.c", "model.a.w"]


@pytest.mark.parametrize("half", ["dcp", "hf"])
def test_key_that_names_nothing_is_said(
    saved: Path, directory: Path, half: str, caplog: pytest.LogCaptureFixture
) -> None:
    reader = HFDualReader(saved if half == "dcp" else directory)
    known = "step" if half == "dcp" else "ab"
    with caplog.at_level(logging.WARNING, "dcp_hf_writer"):
        found = _load_state_dict_from_keys({known, "teacher", "mod"}, storage_reader=reader)
    assert list(found) == [known]
    (record,) = [one for one in caplog.records if one.name.startswith("dcp_hf_writer")]
    assert "['mod', 'teacher']" in record.getMessage()


def test_keys_of_a_checkpoint_that_was_not_flattened_are_loaded(tmp_path: Path) -> None:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    state = {"a.w": torch.ones(3), "b": 4}
    dcp.save(state, checkpoint_id=tmp_path / "x", planner=planner, no_dist=True)
    found = _load_state_dict_from_keys({"a"}, storage_reader=HFDualReader(tmp_path / "x"))
    assert {name: value.tolist() for name, value in found.items()} == {"a.w": [1.0] * 3}


def test_checkpoint_becomes_a_file_of_torch(saved: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(saved, tmp_path / "x.pt")
    whole = _load_state_dict_from_keys(None, storage_reader=HFDualReader(saved))
    assert str(torch.load(tmp_path / "x.pt")) == str(whole)
