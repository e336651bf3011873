"""Loads from the HuggingFace half into state dicts whose names wrappers or lists have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from dcp_hf_writer import HFDualReader, HFDualWriter

if TYPE_CHECKING:
    from pathlib import Path

Fill = Callable[[int], torch.Tensor]


def parts_of_a_pipeline(fill: Fill) -> list[dict[str, torch.Tensor]]:
    return [{"layers.0.w": fill(2)}, {"layers.1.w": fill(3)}]


def compiled_layers(fill: Fill) -> dict[str, torch.Tensor]:
    return {"layers.0._orig_mod.w": fill(2), "_orig_mod.layers.1.w": fill(3)}


def compiled_parts(fill: Fill) -> list[dict[str, torch.Tensor]]:
    return [{"layers.0._orig_mod.w": fill(2)}, {"layers.1._checkpoint_wrapped_module.w": fill(3)}]


def values(state: Any) -> list[torch.Tensor]:
    parts = state if isinstance(state, list) else [state]
    return [value for part in parts for value in part.values()]


@pytest.mark.parametrize("source", ["hf", "dcp"])
@pytest.mark.parametrize("make", [parts_of_a_pipeline, compiled_layers, compiled_parts])
def test_model_is_exported_by_its_own_names_and_loads_back(
    make: Callable[[Fill], Any], source: Any, tmp_path: Path
) -> None:
    state = {"model": make(torch.rand)}
    dcp.save(state, storage_writer=HFDualWriter(tmp_path / "s"), no_dist=True)
    with safe_open(tmp_path / "s" / "hf" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["layers.0.w", "layers.1.w"]
    loaded = {"model": make(torch.zeros)}
    reader = HFDualReader(tmp_path / "s", source=source)
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    pairs = zip(values(loaded["model"]), values(state["model"]), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
