"""What travels with DCP's plans, made from plans of simulated ranks."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcp_hf_writer import HFExport, LoadSpec, Piece
from dcp_hf_writer.errors import CoverageError, LayoutError, ModelKeyError, PlanningError
from dcp_hf_writer.plan.global_plan import (
    GlobalPlan,
    LocalFacts,
    check_tied,
    options_fingerprint,
    plan_globally,
    rank_plans,
)
from dcp_hf_writer.tensors.boxes import Box, whole
from support.partitions import partitions_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcp_hf_writer.tensors.boxes import Shape


def write_item(
    fqn: str, shape: Shape, chunk: Box | None = None, dtype: torch.dtype = torch.float32
) -> WriteItem:
    box = whole(shape) if chunk is None else chunk
    return WriteItem(
        index=MetadataIndex(fqn, torch.Size(box.offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(shape),
        ),
    )


def value_item(fqn: str) -> WriteItem:
    return WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO)


def plan_of(
    items: Sequence[WriteItem],
    *,
    host: str = "one",
    order: Sequence[str] | None = None,
    tied: Sequence[tuple[str, ...]] = (),
) -> SavePlan:
    """Make the plan of one rank; FQNs are paths, split at their first dot."""
    paths = {item.index.fqn: tuple(item.index.fqn.split(".", 1)) for item in items}
    facts = LocalFacts(host, None if order is None else tuple(order), tuple(tied))
    return SavePlan(list(items), storage_data=facts, planner_data=paths)


def planned(plans: list[SavePlan], **options: Any) -> GlobalPlan:
    export = HFExport(**options)
    return plan_globally(plans, export, options="options", file_of_key=None)


def keys_in_order(plan: GlobalPlan) -> list[str]:
    """Return the keys of an export that has one to a file, in the order of its files."""
    assert plan.layout is not None
    return [key for file in plan.layout.files for key in file.keys]


def prepared(plan: GlobalPlan) -> list[SavePlan]:
    dcp = [replace(one, storage_data=f"prefix {i}") for i, one in enumerate(plan.plans)]
    return rank_plans(plan, dcp)


SHAPE = (6, 4)


@settings(deadline=None)
@given(st.data(), st.integers(1, 5))
def test_chunks_of_all_ranks_make_one_tensor(data: st.DataObject, ranks: int) -> None:
    parts = [box for box in data.draw(partitions_of(whole(SHAPE))) if box.numel]
    items = [write_item("model.w", SHAPE, box) for box in data.draw(st.permutations(parts))]
    plans = [plan_of(items[rank::ranks]) for rank in range(ranks)]
    plan = planned(plans)
    assert plan.layout is not None
    assert plan.layout.targets["model.w"][0].shape == SHAPE
    with pytest.raises(CoverageError, match=r"'model\.w'"):
        planned([plan_of(items[1:])] if len(items) > 1 else [plan_of([*items, *items])])


def test_tensors_are_exported_in_the_order_of_the_coordinators_state_dict() -> None:
    names = ["model.c", "model.a", "model.b", "model.only on 1"]
    first = plan_of([write_item(names[1], (1,))], order=["step", *names[:3]])
    second = plan_of(
        [write_item(names[3], (1,)), write_item(names[2], (1,)), write_item(names[0], (1,))]
    )
    plan = planned([first, second], max_shard_size=4)
    assert keys_in_order(plan) == ["c", "a", "b", "only on 1"]


def test_other_entries_and_plain_values_are_not_exported() -> None:
    items = [write_item("model.w", (2,)), write_item("optim.w", (2,)), value_item("model.note")]
    plan = planned([plan_of(items)])
    assert keys_in_order(plan) == ["w"]
    assert set(plan.layout.targets if plan.layout else ()) == {"model.w"}


def test_model_is_the_entry_that_the_export_names() -> None:
    items = [write_item("actor.w", (2,)), write_item("critic.v", (2,))]
    assert keys_in_order(planned([plan_of(items)], key="critic")) == ["v"]
    with pytest.raises(ModelKeyError, match=r"\['actor', 'critic'\]"):
        planned([plan_of(items)])


def test_no_layout_is_made_without_an_export() -> None:
    plans = [plan_of([write_item("model.w", (2,))])]
    plan = plan_globally(plans, None, options="o", file_of_key=None)
    assert (plan.layout, plan.plans, plan.tied) == (None, plans, ())
    assert prepared(plan)[0].storage_data.targets == {}


def test_plan_of_another_writer_is_refused() -> None:
    plans = [plan_of([write_item("model.w", (2,))]), SavePlan([], storage_data="prefix")]
    with pytest.raises(PlanningError, match="not made by HFDualWriter"):
        planned(plans)


# Ties


@pytest.mark.parametrize(
    ("found", "dropped"),
    [
        ([[("model.a", "model.b")]], {"b": "a"}),
        ([[("model.b", "model.a")]], {"b": "a"}),
        ([[], [("model.a", "model.b")]], {"b": "a"}),
        ([[("model.a", "model.b", "model.c")]], {"b": "a", "c": "a"}),
        ([[("model.a", "model.b")], [("model.b", "model.c")]], {"b": "a", "c": "a"}),
        ([[("model.a", "model.c")], [("model.b", "model.c")]], {"b": "a", "c": "a"}),
        ([[("model.b", "model.c")], [("model.a", "model.c")]], {"b": "a", "c": "a"}),
        ([[("optim.x", "model.a")]], {}),
        ([[("optim.x", "model.b", "model.c")]], {"c": "b"}),
    ],
    ids=[
        *("pair", "other order", "other rank", "three", "two ranks", "last in both", "last first"),
        *("no model", "beside model"),
    ],
)
def test_first_name_of_tied_tensors_is_kept(
    found: list[list[tuple[str, ...]]], dropped: dict[str, str]
) -> None:
    names = ["model.a", "model.b", "model.c", "optim.x"]
    items = [write_item(name, (2,)) for name in names]
    plans = [
        plan_of(items if not rank else [], order=None if rank else names, tied=tied)
        for rank, tied in enumerate(found)
    ]
    plan = planned(plans)
    assert plan.layout is not None
    assert plan.layout.tied == dropped
    assert keys_in_order(plan) == sorted({"a", "b", "c"} - dropped.keys())
    same = {name for pair in dropped.items() for name in pair}
    assert plan.tied == ((tuple(f"model.{name}" for name in sorted(same)),) if same else ())


def test_tie_is_stored_once_though_an_alias_keeps_its_last_name() -> None:
    items = [write_item(f"model.{name}", (2,)) for name in "abc"]
    specs = [LoadSpec("c", "hub.c", (2,)), LoadSpec("b", "hub.b", (2,), alias_of="hub.c")]
    plans = [plan_of(items, tied=[("model.a", "model.b", "model.c")])]
    export = HFExport(specs=specs)
    plan = plan_globally(plans, export, options="options", file_of_key=None, once=True)
    assert keys_in_order(plan) == ["hub.c"]
    assert set(plan.once) == {"model.a", "model.b", "model.c"}


def test_tensor_is_stored_once_by_its_own_key_where_ties_are_given() -> None:
    items = [write_item("model.a", (2,)), write_item("model.b", (2,))]
    plans = [plan_of(items, tied=[("model.a", "model.b")])]
    export = HFExport(tied={})
    plan = plan_globally(plans, export, options="options", file_of_key=None, once=True)
    assert {fqn: [part.key for part in parts] for fqn, parts in plan.once.items()} == {
        "model.a": ["a"],
        "model.b": ["b"],
    }
    # Nothing leans on the tie, so that it need not hold on every rank.
    assert plan.tied == ()


def test_tie_that_was_found_is_checked_where_a_dropped_tensor_is_stored_by_it() -> None:
    items = [write_item("model.a", (2,)), write_item("model.b", (2,))]
    plans = [plan_of(items, tied=[("model.a", "model.b")])]
    export = HFExport(tied={"b": "a"})
    plan = plan_globally(plans, export, options="options", file_of_key=None, once=True)
    assert set(plan.once) == {"model.a", "model.b"}
    assert plan.tied == (("model.a", "model.b"),)


def test_ties_that_are_given_are_not_checked_against_memory() -> None:
    items = [write_item("model.a", (2,)), write_item("model.b", (2,))]
    tied = [("model.a", "model.b")]
    plan = planned([plan_of(items, tied=tied)], tied={})
    assert (keys_in_order(plan), plan.tied) == (["a", "b"], ())


@pytest.mark.parametrize(
    ("memory", "is_right"),
    [
        ({"a": 1, "b": 1}, True),
        ({"a": 1}, True),
        ({}, True),
        ({"a": 1, "b": 2}, False),
        # Neither is the one that is kept.
        ({"b": 1, "c": 2}, False),
    ],
    ids=["same", "nothing of one", "nothing", "different", "two that are left out"],
)
def test_tie_is_refused_on_a_rank_whose_memory_says_otherwise(
    memory: dict[str, int], *, is_right: bool
) -> None:
    if is_right:
        check_tied([("a", "b", "c")], memory, rank=3)
        return
    with pytest.raises(LayoutError, match="on some ranks only") as caught:
        check_tied([("a", "b", "c")], memory, rank=3)
    assert (caught.value.rank, caught.value.phase) == (3, "write")
    assert caught.value.fqn == list(memory)[1]


# What each rank gets


def test_ranks_get_their_own_targets_and_their_place_on_their_host() -> None:
    plans = [
        plan_of([write_item("model.a", (2,)), value_item("step")], host="x"),
        plan_of([write_item("model.b", (2,))], host="y"),
        plan_of([write_item("optim.a", (2,))], host="x"),
        plan_of([], host="x"),
    ]
    plan = planned(plans, max_shard_size=8)
    found = [one.storage_data for one in prepared(plan)]
    assert [set(one.targets) for one in found] == [{"model.a"}, {"model.b"}, set(), set()]
    assert [(one.host_rank, one.host_size) for one in found] == [(0, 3), (0, 1), (1, 3), (2, 3)]
    assert {one.plan_id for one in found} == {plan.plan_id}
    assert [one.dcp for one in found] == [f"prefix {i}" for i in range(4)]
    assert plan.layout is not None
    assert {one.files for one in found} == {
        tuple((file.name, file.nbytes) for file in plan.layout.files)
    }


COLUMNS = [Box((0, 0), (6, 2)), Box((0, 2), (6, 2))]
ROWS = [Box((0, 0), (3, 4)), Box((3, 0), (3, 4))]
TURNED = LoadSpec("w", ["t"], (6, 4), pieces=[Piece("t", (4, 6), ((6, 1, 4), (4, 6, 1)))])


@pytest.mark.parametrize(
    ("parts", "hosts", "specs", "expected"),
    [
        (COLUMNS, "xx", (), "xx"),
        (COLUMNS, "xy", (), ""),
        (ROWS, "xx", (), ""),
        ([whole(SHAPE)], "x", (), ""),
        (ROWS, "xx", (TURNED,), "xx"),
    ],
    ids=["columns", "of two hosts", "rows", "whole", "rows of a transposed tensor"],
)
def test_ranks_of_a_host_meet_when_they_may_hold_parts_of_the_same_rows(
    parts: list[Box], hosts: str, specs: Sequence[LoadSpec], expected: str
) -> None:
    plans = [
        plan_of([write_item("model.w", SHAPE, part)], host=host)
        for part, host in zip(parts, hosts, strict=True)
    ]
    plans.append(plan_of([write_item("model.v", (2,))], host="z"))
    plans.append(plan_of([write_item("optim.w", SHAPE, COLUMNS[0])], host="z"))
    found = [one.storage_data for one in prepared(planned(plans, specs=specs or None))]
    assert [one.shares_rows for one in found] == [host in expected for host in (*hosts, "z", "z")]
    members = [i for i, host in enumerate((*hosts, "z", "z")) if host == "z"]
    assert found[-1].host_ranks == tuple(members)


def test_ranks_of_a_host_meet_when_one_of_the_tensors_that_are_cut_alike_is_transposed() -> None:
    plans = [
        plan_of([write_item("model.v", SHAPE, part), write_item("model.w", SHAPE, part)])
        for part in ROWS
    ]
    found = [one.storage_data.shares_rows for one in prepared(planned(plans, specs=[TURNED]))]
    assert found == [True, True]


def experts_of(layer: int) -> LoadSpec:
    pieces = [Piece(f"{layer}.{e}", (4,), ((4, 1, 1),), start=4 * e) for e in range(SHAPE[0])]
    return LoadSpec(f"{layer}.experts", global_shape=SHAPE, pieces=pieces)


def test_ranks_get_the_experts_of_each_layer_that_they_hold() -> None:
    # Rank 0 holds experts that are dealt out in the first layer, and the first ones in the second.
    dealt = [[Box((e, 0), (1, 4)) for e in range(rank, 6, 2)] for rank in range(2)]
    plans = [
        plan_of(
            [
                *(write_item("model.0.experts", SHAPE, chunk) for chunk in dealt[rank]),
                write_item("model.1.experts", SHAPE, ROWS[rank]),
            ]
        )
        for rank in range(2)
    ]
    plan = planned(plans, specs=[experts_of(0), experts_of(1)])
    keys = [
        {fqn: [part.key for part in parts] for fqn, parts in one.storage_data.targets.items()}
        for one in prepared(plan)
    ]
    assert keys == [
        {"model.0.experts": ["0.0", "0.2", "0.4"], "model.1.experts": ["1.0", "1.1", "1.2"]},
        {"model.0.experts": ["0.1", "0.3", "0.5"], "model.1.experts": ["1.3", "1.4", "1.5"]},
    ]


def test_plan_of_a_rank_survives_the_way_to_it_and_names_no_save() -> None:
    plan = prepared(planned([plan_of([write_item("model.a", (2,))])]))[0]
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert "/" not in str(plan.storage_data)


def test_plans_are_told_apart_however_similar() -> None:
    plans = [plan_of([write_item("model.a", (2,))])]
    assert planned(plans).plan_id != planned(plans).plan_id


# Options


def fingerprint(files: Mapping[str, str] | None = None, **options: Any) -> str:
    return options_fingerprint(HFExport(**options), files)


def test_equal_options_have_equal_fingerprints() -> None:
    options: dict[str, Any] = {
        "specs": [LoadSpec("w", "v", (2,)), LoadSpec("a", "b", (2,))],
        "expect_keys": {"b", "v"},
        "metadata": {"a": "1", "b": "2"},
        "tied": {"x": "y", "z": "y"},
    }
    turned = {
        "specs": options["specs"][::-1],
        "expect_keys": ["v", "b"],
        "metadata": {"b": "2", "a": "1"},
        "tied": {"z": "y", "x": "y"},
    }
    assert fingerprint(**options) == fingerprint(**turned)
    assert fingerprint({"a": "x", "b": "y"}) == fingerprint({"b": "y", "a": "x"})
    # They change no layout.
    assert fingerprint() == fingerprint(assets={"config.json": b"{}"}, subdir="export")
    assert fingerprint(max_shard_size="5GB") == fingerprint(max_shard_size=5 * 10**9)


CHANGES: dict[str, dict[str, Any]] = {
    "key": {"key": "model"},
    "specs": {"specs": [LoadSpec("w", "v", (2,))]},
    "dtype of a spec": {"specs": [LoadSpec("w", "v", (2,), dtype=torch.float16)]},
    "dtype": {"dtype": torch.bfloat16},
    "keep_dtype": {"keep_dtype": ["norm"]},
    "max_shard_size": {"max_shard_size": 100},
    "tied": {"tied": {}},
    "expect_keys": {"expect_keys": []},
    "header_align": {"header_align": 4096},
    "metadata": {"metadata": {"a": "1"}},
    "order": {"order": "natural"},
    "files of like": {"files": {"a": "x"}},
}


def test_every_option_that_changes_the_layout_changes_the_fingerprint() -> None:
    found = [fingerprint(**options) for options in CHANGES.values()]
    found += [fingerprint(), options_fingerprint(None, None)]
    assert len(set(found)) == len(CHANGES) + 2
