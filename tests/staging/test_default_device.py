"""A default device of torch's is the trainer's, and decides nothing about a checkpoint's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualReader, HFDualWriter, load_hf, materialize, verify
from support.compare import tensor_difference
from support.small_states import spoil, state_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any


def save(state: dict[str, Any], writer: HFDualWriter) -> None:
    dcp.save(state, storage_writer=writer)


def save_in_background(state: dict[str, Any], writer: HFDualWriter) -> None:
    dcp.async_save(state, storage_writer=writer).result()


# On the meta device whatever is computed with is lost, which on a GPU would be an error.
@pytest.mark.parametrize("how", [save, save_in_background])
@pytest.mark.parametrize("weights", ["both", "once"])
def test_trip_under_a_default_device(
    tmp_path: Path, how: Callable[..., None], weights: Any
) -> None:
    state, state["model"]["column"] = state_of(3), torch.arange(6000.0).reshape(60, 100).t()
    wanted = {name: value.clone() for name, value in state["model"].items()}
    path = tmp_path / "checkpoint"
    with torch.device("meta"):
        how(state, HFDualWriter(path, weights=weights))
        for source in ("dcp", "hf"):
            spoil(state)
            dcp.load({"model": state["model"]}, storage_reader=HFDualReader(path, source=source))
            assert tensor_difference(state["model"], wanted) is None
        spoil(state)
        load_hf(state["model"], path)
        assert tensor_difference(state["model"], wanted) is None
        assert verify(path).ok
        materialize(path, tmp_path / "plain")
    spoil(state)
    dcp.load({"model": state["model"]}, checkpoint_id=tmp_path / "plain")
    assert tensor_difference(state["model"], wanted) is None
