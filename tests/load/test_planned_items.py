"""The reader loads what a planner plans: planners that leave out, resize, rename or cast."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.metadata import MetadataIndex

from dcp_hf_writer import HFDualReader, HFDualWriter, HFLoadPlanner
from dcp_hf_writer.errors import MismatchError
from support.drop_in_rows import LeavesOut

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

SAVED = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4.0) + 10,
    "head": torch.arange(5.0) + 20,
    "scalar": torch.tensor(7.0),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "step-1"
    dcp.save({**SAVED}, storage_writer=HFDualWriter(path), no_dist=True)
    return path


class LeavesOutEarly(DefaultLoadPlanner):
    """The same, from the state dict that the planner shows."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        super().set_up_planner(*args, **kwargs)
        assert self.metadata is not None
        there = self.metadata.state_dict_metadata
        self.state_dict = {k: v for k, v in self.state_dict.items() if k in there}


class Resizes(DefaultLoadPlanner):
    """Gives each tensor the stored shape."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        for fqn, value in self.state_dict.items():
            value.resize_(self.metadata.state_dict_metadata[fqn].size)  # type: ignore[union-attr]
        return super().create_local_plan()


class Renames(DefaultLoadPlanner):
    """Loads `student.x` from `x`."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = {fqn.removeprefix("student."): v for fqn, v in self.state_dict.items()}
        plan = create_default_local_load_plan(stored, self.metadata)
        items = [
            replace(one, dest_index=replace(one.dest_index, fqn=f"student.{one.dest_index.fqn}"))
            for one in plan.items
        ]
        return replace(plan, items=items)


class ThroughOneBuffer(DefaultLoadPlanner):
    """Reads every item into one buffer, casts, and copies it away when the item is committed."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = torch.full((64,), -5.0)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.buffer[: read_item.lengths.numel()].view(read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        target = super().resolve_tensor(read_item)
        target.copy_(tensor * 2)


class Halves(DefaultLoadPlanner):
    """Loads only the first half of the rows."""

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        items = []
        for one in plan.items:
            lengths = torch.Size([one.lengths[0] // 2, *one.lengths[1:]])
            items.append(replace(one, lengths=lengths))
        return replace(plan, items=items)


CASES: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "leaves out": (
        LeavesOut,
        {"a": torch.zeros(2, 3), "head": torch.ones(7), "new": torch.ones(1)},
    ),
    "leaves out early": (LeavesOutEarly, {"a": torch.zeros(2, 3), "new": torch.ones(1)}),
    "resizes": (Resizes, {"a": torch.zeros(1), "b": torch.zeros(9)}),
    "renames": (Renames, {"student.a": torch.zeros(2, 3), "student.scalar": torch.tensor(0.0)}),
    "one buffer": (
        ThroughOneBuffer,
        {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)},
    ),
    "halves": (Halves, {"a": torch.zeros(2, 3), "b": torch.zeros(4)}),
    "allows missing": (
        lambda: DefaultLoadPlanner(allow_partial_load=True),
        {"a": torch.zeros(2, 3), "new": torch.ones(1)},
    ),
}


@pytest.mark.parametrize("source", ["dcp", "hf"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_planned_is_loaded_as_torch_loads_it(saved: Path, name: str, source: Any) -> None:
    planner, state = CASES[name]
    wanted = {fqn: value.clone() for fqn, value in state.items()}
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(saved), planner=planner(), no_dist=True)
    found = {fqn: value.clone() for fqn, value in state.items()}
    reader = HFDualReader(saved, source=source)
    dcp.load(found, storage_reader=reader, planner=planner(), no_dist=True)
    assert found.keys() == wanted.keys()
    for fqn, value in wanted.items():
        assert found[fqn].dtype == value.dtype
        assert torch.equal(found[fqn], value), fqn
    assert any(not torch.equal(value, state[fqn]) for fqn, value in wanted.items() if fqn in state)


class AsksFor(DefaultLoadPlanner):
    """Plans one item, changed."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes = changes

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        return replace(plan, items=[replace(plan.items[0], **self.changes)])


@pytest.mark.parametrize("source", ["dcp", "hf"])
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"storage_offsets": torch.Size([1])}, "b .*elements at"),
        ({"storage_index": MetadataIndex("c", torch.Size([0]))}, "1 missing: c"),
        ({"storage_index": MetadataIndex("b", torch.Size([2]))}, "no stored chunk"),
        ({"storage_index": MetadataIndex("a", torch.Size([0, 0]))}, "no stored chunk"),
    ],
    ids=["beyond the chunk", "other name", "other chunk", "other shape"],
)
def test_item_that_no_chunk_holds_is_refused_before_anything_is_read(
    saved: Path, changes: dict[str, Any], text: str, source: Any
) -> None:
    state = {"b": torch.zeros(4)}
    reader = HFDualReader(saved, source=source)
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=reader, planner=AsksFor(**changes), no_dist=True)
    error = caught.value.failures[0][0]
    assert isinstance(error, MismatchError)
    assert re.search(text, str(error))
    assert not state["b"].any()


@pytest.mark.parametrize("planner", [DefaultLoadPlanner, HFLoadPlanner])
def test_planner_that_loads_everything_still_gets_one_error_for_all(
    saved: Path, planner: Any
) -> None:
    state = {"a": torch.zeros(7), "new": torch.zeros(1), "b": torch.zeros(4)}
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=HFDualReader(saved), planner=planner(), no_dist=True)
    error = caught.value.failures[0][0]
    assert "1 missing: new" in str(error)
    assert "1 mismatched: a (shape [7], stored as [2, 3])" in str(error)
    assert not state["b"].any()


class Casts(DefaultLoadPlanner):
    """Loads codes into floats, which HuggingFace files do not mean."""

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return torch.zeros(super().lookup_tensor(index).shape, dtype=torch.int32)


def test_tensor_of_a_planner_that_cannot_take_the_stored_dtype_is_refused(saved: Path) -> None:
    reader = HFDualReader(saved, source="hf")
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"a": torch.zeros(2, 3)}, storage_reader=reader, planner=Casts(), no_dist=True)
    assert "a (torch.int32, stored as torch.float32)" in str(caught.value.failures[0][0])
