"""Tensors of a nested state dict have the names that DCP gives them."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.mapping.flattening import flat_tensors, flat_values, fqn_of, walk_tensors

leaves = st.builds(torch.empty, st.just((1,))) | st.integers() | st.none()
keys = st.text("ab", min_size=1, max_size=3) | st.integers(0, 3)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.dictionaries(keys, inner, max_size=3).map(MappingProxyType),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text("ab", min_size=1, max_size=3), nested, max_size=4))
def test_tensors_have_the_names_and_paths_of_torchs_own_flattening(state: dict[str, Any]) -> None:
    try:
        flat, paths = flatten_state_dict(state)
    except ValueError:
        # Two values have one name; ours looks at tensors alone.
        return
    expected = {
        fqn: (paths[fqn], id(value))
        for fqn, value in flat.items()
        if isinstance(value, torch.Tensor)
    }
    found = {fqn: (path, id(tensor)) for fqn, (path, tensor) in flat_tensors(state).items()}
    assert list(found.items()) == list(expected.items())


@given(st.dictionaries(st.text("ab", min_size=1, max_size=3), nested, max_size=4))
def test_values_have_the_names_and_paths_of_torchs_own_flattening(state: dict[str, Any]) -> None:
    try:
        flat, paths = flatten_state_dict(state)
    except ValueError:
        return
    found = {fqn: (path, id(value)) for fqn, (path, value) in flat_values(state).items()}
    assert found == {fqn: (paths[fqn], id(value)) for fqn, value in flat.items()}


def test_tensors_that_would_have_one_name_are_refused() -> None:
    state = {"a": {"b": torch.empty(1)}, "a.b": torch.empty(1)}
    with pytest.raises(PlanningError, match=r"'a\.b'.*\['a', 'b'\] and \['a\.b'\]"):
        flat_tensors(state)
    with pytest.raises(ValueError, match="duplicated"):
        flatten_state_dict(state)


def test_tuples_are_looked_into_on_request() -> None:
    one, two = torch.empty(1), torch.empty(2)
    state = {"a": (one, [two]), "b": two}
    assert list(walk_tensors(state, into_tuples=False)) == [(("b",), two)]
    found = [(fqn_of(path), tensor) for path, tensor in walk_tensors(state, into_tuples=True)]
    assert found == [("a.0", one), ("a.1.0", two), ("b", two)]
