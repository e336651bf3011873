"""One union of the ties that ranks find and those that are declared."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer import HFExport, LoadSpec
from dcp_hf_writer.errors import LayoutError
from dcp_hf_writer.mapping.tied_names import (
    checked_ties,
    declared_ties,
    shared_groups,
    tie_fault,
    tied_names,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from random import Random

SHAPE = (4,)
NAMES = ("a", "b", "c", "d", "e", "f")
# Of a model, in state-dict order; the optimizer's tensors are not among them.
FQNS = {f"model.{name}": name for name in NAMES}
BESIDE = "optim.x"


def fqns(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"model.{name}" for name in names)


def components(edges: Iterable[Sequence[str]], nodes: Iterable[str]) -> set[frozenset[str]]:
    """Join nodes by widening one set after the other, with no order and no root."""
    sets = [frozenset({node}) for node in nodes]
    for edge in edges:
        met = [one for one in sets if not one.isdisjoint(edge)]
        sets = [one for one in sets if one not in met] + [frozenset().union(*met)]
    return {one for one in sets if one}


groups_of_ranks = st.lists(
    st.lists(
        st.lists(st.sampled_from([*FQNS, BESIDE]), min_size=2, max_size=4, unique=True).map(tuple),
        max_size=3,
    ),
    max_size=4,
)


@st.composite
def exports(draw: st.DrawFn) -> HFExport:
    """Draw an export some of whose names are aliases of one that is exported, or left out."""
    kinds = draw(st.fixed_dictionaries({name: st.sampled_from("..sxa") for name in NAMES}))
    owners = [name for name in NAMES if kinds[name] in ".s"]
    specs = []
    for name, kind in kinds.items():
        if kind == "s":
            specs.append(LoadSpec(name, f"hub.{name}", SHAPE))
        elif kind == "x":
            specs.append(LoadSpec(name, global_shape=SHAPE, pieces=()))
        elif kind == "a" and owners:
            owner = draw(st.sampled_from(owners))
            key = owner if kinds[owner] == "." else f"hub.{owner}"
            specs.append(LoadSpec(name, f"hub.{name}", SHAPE, alias_of=key))
    return HFExport(specs=specs)


def keys_of(name: str, export: HFExport) -> tuple[str, ...]:
    spec = export.spec_by_fqn.get(name)
    return (name,) if spec is None else spec.hf_keys


@given(groups_of_ranks)
def test_groups_are_the_connected_components_of_what_all_ranks_found(
    ranks: list[list[tuple[str, ...]]],
) -> None:
    found = list(itertools.chain.from_iterable(ranks))
    # A tensor beside the model joins nothing: a stream of the model alone does not see it.
    within = [[fqn for fqn in group if fqn in FQNS] for group in found]
    joined = shared_groups(found, FQNS)
    assert {frozenset(group) for group in joined} == {
        one for one in components(filter(None, within), FQNS) if len(one) > 1
    }
    order = list(FQNS)
    assert [sorted(group, key=order.index) for group in joined] == [list(g) for g in joined]
    assert sorted(joined, key=lambda group: order.index(group[0])) == list(joined)
    assert shared_groups(joined, FQNS) == joined


@given(groups_of_ranks, exports(), st.randoms(use_true_random=False))
def test_order_of_ranks_and_groups_changes_nothing(
    ranks: list[list[tuple[str, ...]]], export: HFExport, random: Random
) -> None:
    found = list(itertools.chain.from_iterable(ranks))
    turned = [tuple(random.sample(group, len(group))) for group in found]
    random.shuffle(turned)
    assert shared_groups(turned, FQNS) == shared_groups(found, FQNS)
    assert list(tied_names(turned, FQNS, export).items()) == list(
        tied_names(found, FQNS, export).items()
    )


@given(groups_of_ranks)
def test_first_name_in_state_dict_order_is_kept_when_nothing_is_declared(
    ranks: list[list[tuple[str, ...]]],
) -> None:
    found = list(itertools.chain.from_iterable(ranks))
    expected = {
        FQNS[fqn]: FQNS[group[0]] for group in shared_groups(found, FQNS) for fqn in group[1:]
    }
    assert tied_names(found, FQNS, HFExport()) == expected
    assert tied_names(found, FQNS, HFExport(tied={})) == {}


@settings(max_examples=300)
@given(groups_of_ranks, exports())
def test_each_tensor_is_exported_and_what_an_alias_names_is_kept(
    ranks: list[list[tuple[str, ...]]], export: HFExport
) -> None:
    found = list(itertools.chain.from_iterable(ranks))
    tied = tied_names(found, FQNS, export)
    assert checked_ties(dict.fromkeys(NAMES, SHAPE), tied, export) == tied
    aliases = {n: s.alias_of for n, s in export.spec_by_fqn.items() if s.alias_of is not None}
    # What a spec declares holds.
    assert aliases.items() <= tied.items()
    owner_of = {key: name for name in NAMES if name not in aliases for key in keys_of(name, export)}
    kept = {name: owner_of[key] for name, key in tied.items()}
    assert kept.keys().isdisjoint(owner_of[key] for key in aliases.values())
    declared = [(name, owner_of[key]) for name, key in aliases.items()]
    seen = [[FQNS[fqn] for fqn in group if fqn in FQNS] for group in found]
    for one in components([*filter(None, seen), *declared], NAMES):
        # Only names of one tensor are left out for one another.
        assert {kept[name] for name in one & kept.keys()} <= one
        exported = {name for name in one - kept.keys() if keys_of(name, export)}
        assert exported or not any(keys_of(name, export) for name in one)
        # Twice only where aliases lead to two of its keys.
        needed = {owner_of[aliases[name]] for name in one & aliases.keys()}
        assert exported == needed if needed else len(exported) <= 1


def test_tensor_is_left_out_for_what_another_name_of_it_is_an_alias_of() -> None:
    specs = [LoadSpec("a", "hub.a", SHAPE), LoadSpec("b", "hub.b", SHAPE, alias_of="hub.a")]
    export = HFExport(specs=specs)
    for found in (fqns("bc"), fqns("cb")):
        assert tied_names([found], FQNS, export) == {"b": "hub.a", "c": "hub.a"}
    first = {fqn: FQNS[fqn] for fqn in fqns("cba")}
    assert tied_names([fqns("bc")], first, export) == {"b": "hub.a", "c": "hub.a"}


def test_ties_that_are_given_hold_in_any_order() -> None:
    pairs = {"c": "a", "b": "a", "e": "d"}
    for order in itertools.permutations(pairs.items()):
        found = tied_names([fqns("df")], FQNS, HFExport(tied=dict(order)))
        assert list(found.items()) == [("b", "a"), ("c", "a"), ("e", "d")]


@pytest.mark.parametrize("tied", [{"a": "a"}, {"a": "b", "b": "c"}], ids=["itself", "chain"])
def test_declared_tie_that_leads_to_no_kept_name_is_refused(tied: Mapping[str, str]) -> None:
    export = HFExport(tied=tied)
    ties = tied_names([], FQNS, export)
    with pytest.raises(LayoutError, match="lead from a dropped tensor to one that is kept"):
        checked_ties(dict.fromkeys(NAMES, SHAPE), ties, export)


@given(st.dictionaries(st.sampled_from(list(FQNS)), st.integers(0, 2)), groups_of_ranks)
def test_fault_is_a_group_of_which_this_rank_sees_two_memories(
    memory: dict[str, int], ranks: list[list[tuple[str, ...]]]
) -> None:
    shared = shared_groups(itertools.chain.from_iterable(ranks), FQNS)
    fault = tie_fault(shared, memory, phase="plan")
    split = [group for group in shared if len({memory[f] for f in group if f in memory}) > 1]
    assert (fault is None) == (not split)
    if fault is not None:
        assert fault.fqn in split[0]


def test_declared_ties_are_named_as_the_model_names_its_tensors() -> None:
    specs = [
        LoadSpec("a", "hub.a", SHAPE),
        LoadSpec("b", "hub.b", SHAPE),
        LoadSpec("c", "hub.c", SHAPE, alias_of="hub.a"),
        # Its key is the name of another tensor, and a tie by name is of that one.
        LoadSpec("e", "d", SHAPE),
    ]
    export = HFExport(specs=specs, tied={"hub.b": "hub.a", "f": "d"})
    assert list(declared_ties(export, NAMES)) == [("c", "a"), ("b", "a"), ("f", "d")]
