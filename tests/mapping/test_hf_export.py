"""HFExport: what it accepts, and what it makes of it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from huggingface_hub.serialization._base import parse_size_to_int
from hypothesis import given
from hypothesis import strategies as st

from dcp_hf_writer import HFExport, LoadSpec
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.mapping.hf_export import size_in_bytes

SPEC = LoadSpec("w", "hf.w", (2,))


@given(
    st.floats(0.001, 999).map(lambda n: f"{n:.3f}".rstrip("0").rstrip(".")),
    st.sampled_from(["", " "]),
    st.sampled_from(["KB", "MB", "GB", "TB", "kb", "Gb"]),
)
def test_size_is_what_huggingface_hub_reads(number: str, space: str, unit: str) -> None:
    text = number + space + unit
    expected = parse_size_to_int(text)
    assert size_in_bytes(text, option="max_shard_size") == expected


@pytest.mark.parametrize(
    ("value", "nbytes"), [(1, 1), (10**15, 10**15), ("5GB", 5 * 10**9), (" 7 kb ", 7000), ("9", 9)]
)
def test_size_in_bytes(value: int | str, nbytes: int) -> None:
    assert HFExport(max_shard_size=value).max_shard_nbytes == nbytes


@pytest.mark.parametrize(
    "value",
    [0, -1, 1.5, True, None, "", "GB", "0GB", "-5GB", "5GiB", "5 G", "five", "1e9", "5GBGB", "nan"],
)
def test_size_is_refused_when_it_is_nonsense(value: Any) -> None:
    with pytest.raises(ConfigError, match="max_shard_size must be a positive size") as caught:
        HFExport(max_shard_size=value)
    assert caught.value.found == repr(value)


@pytest.mark.parametrize(
    "specs",
    [[SPEC], (SPEC,), {"anything": SPEC}, iter([SPEC])],
    ids=["list", "tuple", "mapping", "iterator"],
)
def test_specs_are_found_by_the_fqn_that_each_names(specs: Any) -> None:
    assert HFExport(specs=specs).spec_by_fqn == {"w": SPEC}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"specs": ["w"]}, "LoadSpec"),
        ({"specs": [SPEC, LoadSpec("w", "other", (2,))]}, "two specs name the same runtime tensor"),
        ({"dtype": "int8"}, "floating-point"),
        ({"keep_dtype": "norm"}, "collection of text"),
        ({"keep_dtype": ["("]}, r"invalid regular expression; .*; found '\(': missing \)"),
        ({"header_align": 0}, "header_align"),
        ({"header_align": 12}, "header_align"),
        ({"header_align": 8.0}, "header_align"),
        ({"single_file": "a/b.safetensors"}, "single_file must be one plain file name"),
        ({"single_file": "weights.bin"}, "a name that ends with .safetensors"),
        ({"single_file": "a.safetensors", "like": "base"}, "single_file and like cannot be given"),
        ({"subdir": ""}, "subdir"),
        ({"subdir": ".."}, "subdir"),
        ({"subdir": "a/b"}, "subdir"),
        ({"metadata": {"format": "np"}}, "must not have the key 'format'"),
        ({"metadata": {"epoch": 1}}, "text to text"),
        ({"order": "random"}, "order"),
    ],
)
def test_option_is_refused_when_it_cannot_be_used(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HFExport(**options)


def test_options_are_normalised() -> None:
    export = HFExport(
        dtype="bfloat16",
        keep_dtype=["a", "b"],
        expect_keys=iter("ba"),
        metadata={"z": "1", "a": ""},
    )
    assert export.dtype is torch.bfloat16
    assert export.keep_dtype == ("a", "b")
    assert export.expect_keys == frozenset("ab")
    assert list(export.metadata or {}) == ["a", "z"]


@pytest.mark.parametrize(
    ("options", "is_natural"),
    [
        ({}, False),
        ({"specs": [SPEC]}, True),
        ({"specs": [LoadSpec("w", "w", (2,))]}, False),
        ({"specs": [SPEC], "order": "state_dict"}, False),
        ({"order": "natural"}, True),
    ],
)
def test_order_is_natural_when_a_spec_renames_or_it_is_asked_for(
    options: dict[str, Any], *, is_natural: bool
) -> None:
    assert HFExport(**options).is_in_natural_order is is_natural


def test_export_travels_to_other_processes_and_cannot_be_changed() -> None:
    export = HFExport(
        specs=[SPEC], dtype=torch.bfloat16, max_shard_size="1GB", expect_keys=["hf.w"]
    )
    arrived = pickle.loads(pickle.dumps(export))
    assert vars(arrived) == vars(export)
    assert vars(copy.copy(export)) == vars(export)
    with pytest.raises(dataclasses.FrozenInstanceError):
        export.key = "model"  # type: ignore[misc]
