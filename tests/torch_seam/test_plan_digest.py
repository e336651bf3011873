"""The digest of a local plan covers everything that the plan holds."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcp_hf_writer import HFSavePlanner
from dcp_hf_writer.torch_seam import plan_digest
from dcp_hf_writer.torch_seam.plan_digest import (
    digest_of_plan,
    digests_of_global_plan,
    plans_globally_as_torch,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def item(fqn: str = "model.w") -> WriteItem:
    offsets, sizes = torch.Size([2, 0]), torch.Size([2, 3])
    data = TensorWriteData(
        ChunkStorageMetadata(offsets, sizes), TensorProperties(torch.float32), torch.Size([4, 3])
    )
    return WriteItem(MetadataIndex(fqn, offsets), WriteItemType.SHARD, tensor_data=data)


def plan() -> SavePlan:
    value = WriteItem(MetadataIndex("step"), WriteItemType.BYTE_IO)
    return SavePlan([item(), value], planner_data={"model.w": ("model", "w"), "step": ("step",)})


FACTS = ("host", ("model.w", "step"), (("model.w", "model.v"),))


def of_tensor(**changes: Any) -> SavePlan:
    """Return the plan with other data of its tensor."""
    first, *rest = plan().items
    return replace(
        plan(), items=[replace(first, tensor_data=replace(first.tensor_data, **changes)), *rest]
    )


def of_item(**changes: Any) -> SavePlan:
    """Return the plan with another first item."""
    first, *rest = plan().items
    return replace(plan(), items=[replace(first, **changes), *rest])


OFFSETS = torch.Size([2, 0])
CHANGED: dict[str, Callable[[], SavePlan]] = {
    "dtype": lambda: of_tensor(properties=TensorProperties(torch.bfloat16)),
    "requires_grad": lambda: of_tensor(
        properties=TensorProperties(torch.float32, requires_grad=True)
    ),
    "memory format": lambda: of_tensor(
        properties=TensorProperties(torch.float32, memory_format=torch.channels_last)
    ),
    "layout": lambda: of_tensor(
        properties=TensorProperties(torch.float32, layout=torch.sparse_coo)
    ),
    "pinned": lambda: of_tensor(properties=TensorProperties(torch.float32, pin_memory=True)),
    "offsets": lambda: of_tensor(
        chunk=ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    ),
    "sizes": lambda: of_tensor(chunk=ChunkStorageMetadata(OFFSETS, torch.Size([1, 3]))),
    "shape": lambda: of_tensor(size=torch.Size([5, 3])),
    "fqn": lambda: of_item(index=MetadataIndex("model.v", OFFSETS)),
    "offset of the index": lambda: of_item(index=MetadataIndex("model.w", torch.Size([0, 0]))),
    "no offset": lambda: of_item(index=MetadataIndex("model.w")),
    "index hint": lambda: of_item(index=MetadataIndex("model.w", OFFSETS, 1)),
    "kind": lambda: of_item(type=WriteItemType.TENSOR),
    "pickled size": lambda: of_item(bytes_io_data=BytesIOWriteData(8)),
    "new item": lambda: replace(plan(), items=[*plan().items, item("model.v")]),
    "missing item": lambda: replace(plan(), items=plan().items[:1]),
    "order": lambda: replace(plan(), items=plan().items[::-1]),
    "paths": lambda: replace(plan(), planner_data={"model.w": ("model.w",), "step": ("step",)}),
    "usable": lambda: replace(plan(), usable=False),
}
if "strides" in {field.name for field in fields(TensorProperties)}:  # since torch 2.15
    CHANGED["strides"] = lambda: of_tensor(
        properties=TensorProperties(torch.float32, strides=(1, 3))  # type: ignore[call-arg]
    )


def test_equal_plans_have_equal_digests_when_they_share_no_object() -> None:
    copied = pickle.loads(pickle.dumps(plan()))
    assert digest_of_plan(copied, *FACTS) == digest_of_plan(plan(), *FACTS) != ""


def test_digest_leaves_out_what_a_writer_adds() -> None:
    with_facts = replace(plan(), storage_data=object())
    assert digest_of_plan(with_facts, *FACTS) == digest_of_plan(plan(), *FACTS)


@pytest.mark.parametrize("what", CHANGED)
def test_digest_changes_with_each_field_of_a_plan(what: str) -> None:
    changed = digest_of_plan(CHANGED[what](), *FACTS)
    assert changed not in ("", digest_of_plan(plan(), *FACTS))


@pytest.mark.parametrize("at", range(len(FACTS)))
def test_digest_changes_with_each_fact(at: int) -> None:
    facts = [None if number == at else fact for number, fact in enumerate(FACTS)]
    assert digest_of_plan(plan(), *facts) not in ("", digest_of_plan(plan(), *FACTS))


@dataclass(frozen=True)
class WriteItemOfItsOwn(WriteItem):
    """An item with a field that the digest does not know."""

    more: int = 0


def test_plan_has_no_digest_when_an_item_is_of_a_subclass() -> None:
    known = plan().items[1]
    own = WriteItemOfItsOwn(known.index, known.type, more=3)
    assert digest_of_plan(SavePlan([own])) == ""


def test_plan_has_no_digest_when_its_planner_data_is_an_object() -> None:
    assert digest_of_plan(SavePlan([], planner_data=object())) == ""


def test_plan_has_no_digest_when_torch_has_other_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_digest, "_IS_KNOWN", False)
    assert digest_of_plan(plan()) == ""


def test_fields_of_this_torch_are_known() -> None:
    assert plan_digest._IS_KNOWN


class LookingPlanner(DefaultSavePlanner):
    """Replaces only what happens on a rank."""

    def lookup_object(self, index: Any) -> Any:
        return super().lookup_object(index)


class GlobalPlanner(DefaultSavePlanner):
    """Replaces the global planning."""

    def create_global_plan(self, all_plans: Any) -> Any:
        return super().create_global_plan(all_plans)


class LowestPlanner(GlobalPlanner):
    """Inherits a replaced global planning."""


def patched_planner() -> DefaultSavePlanner:
    planner = DefaultSavePlanner()
    planner.create_global_plan = lambda plans: (plans, None)  # type: ignore[assignment]
    return planner


@pytest.mark.parametrize(
    ("planner", "is_torchs"),
    [
        (DefaultSavePlanner(), True),
        (HFSavePlanner(), True),
        (LookingPlanner(), True),
        (GlobalPlanner(), False),
        (LowestPlanner(), False),
        (patched_planner(), False),
    ],
)
def test_global_planning_of_others_is_recognised(
    planner: DefaultSavePlanner, *, is_torchs: bool
) -> None:
    assert plans_globally_as_torch(planner) == is_torchs
    assert (digests_of_global_plan([plan()], planner, ["a"]) is None) != is_torchs


def test_global_digests_change_with_the_options_of_the_planner_and_with_each_rank() -> None:
    plans = [plan(), plan()]
    found = {
        digests_of_global_plan(plans, DefaultSavePlanner(), ["a", "b"]),
        digests_of_global_plan(plans, DefaultSavePlanner(), ["b", "a"]),
        digests_of_global_plan(plans, DefaultSavePlanner(), ["a", "c"]),
        digests_of_global_plan([plan(), SavePlan([])], DefaultSavePlanner(), ["a", "b"]),
        digests_of_global_plan(
            plans, DefaultSavePlanner(dedup_save_to_lowest_rank=True), ["a", "b"]
        ),
    }
    assert len(found) == 5
    assert None not in found


def test_there_are_no_global_digests_when_a_rank_has_none() -> None:
    assert digests_of_global_plan([plan(), plan()], DefaultSavePlanner(), ["a", ""]) is None
