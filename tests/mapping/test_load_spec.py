"""LoadSpec: what it accepts, and the parts that it comes to."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import LoadSpec, ShardSpec
from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.tensors.boxes import Box, Shape, tiling_fault, whole
from dcp_hf_writer.tensors.strided_copies import hf_box


def parts_of(spec: LoadSpec) -> list[tuple[str, Shape, Shape]]:
    """Return key, first index in the runtime tensor, and shape of each part."""
    return [(part.key, part.copies[0].start, part.shape) for part in spec.parts]


def test_one_key_may_be_given_as_text() -> None:
    spec = LoadSpec("w", "hf.w", [3, 4])
    assert spec.hf_keys == ("hf.w",)
    assert parts_of(spec) == [("hf.w", (0, 0), (3, 4))]


def test_arguments_are_those_of_the_design() -> None:
    spec = LoadSpec(
        name="qkv", hf_keys=["q", "k"], global_shape=(4, 8), fused_dim=1, origin_shape=(4, 6)
    )
    assert parts_of(spec) == [("q", (0, 0), (4, 3)), ("k", (0, 3), (4, 3))]


def test_spec_of_a_tensor_has_its_shape() -> None:
    spec = LoadSpec.from_tensor(
        name="qkv", hf_keys=["q", "k"], tensor=torch.zeros(6, 2), origin_shape=(4, 2)
    )
    assert spec == LoadSpec("qkv", ["q", "k"], (6, 2), 0, (), (4, 2))


def test_spec_of_a_dtensor_says_how_it_is_cut() -> None:
    mesh = SimpleNamespace(shape=(3, 2), get_coordinate=lambda: [2, 1])
    tensor = SimpleNamespace(
        shape=(12, 8), device_mesh=mesh, placements=(Replicate(), _StridedShard(1, split_factor=2))
    )
    spec = LoadSpec.from_tensor(name="w", hf_keys="w", tensor=cast("torch.Tensor", tensor))
    assert spec.shards == (ShardSpec(1, 1, 2, interleave=2),)
    assert LoadSpec.from_tensor(name="w", hf_keys="w", tensor=torch.zeros(2)).shards == ()


def test_parts_of_unequal_extent_follow_one_another() -> None:
    spec = LoadSpec("qkv", ["q", "k", "v"], (8, 5), fused_sizes=[4, 3, 1])
    assert parts_of(spec) == [("q", (0, 0), (4, 5)), ("k", (4, 0), (3, 5)), ("v", (7, 0), (1, 5))]


def test_negative_fused_dim_counts_from_the_end() -> None:
    assert LoadSpec("w", ["a", "b"], (2, 3, 4), -1) == LoadSpec("w", ["a", "b"], (2, 3, 4), 2)


def test_scalar_may_be_renamed() -> None:
    assert parts_of(LoadSpec("scale", "hf.scale", ())) == [("hf.scale", (), ())]


@settings(deadline=None)
@given(st.data(), st.lists(st.integers(0, 8), min_size=1, max_size=3), st.integers(1, 4))
def test_parts_tile_the_shape_without_padding(
    data: st.DataObject, shape: list[int], count: int
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    shape[dim] = sum(sizes)
    padded = [n + data.draw(st.integers(0, 2)) for n in shape]
    keys = [f"k{i}" for i in range(count)]
    spec = LoadSpec("w", keys, padded, dim, (), shape, fused_sizes=sizes)
    assert tuple(part.key for part in spec.parts) == tuple(keys)
    boxes = [Box(copy.start, part.shape) for part in spec.parts for copy in part.copies]
    assert tiling_fault(boxes, tuple(shape)) is None
    assert all(hf_box(copy) == whole(part.shape) for part in spec.parts for copy in part.copies)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hf_keys": []}, "distinct names"),
        ({"hf_keys": ["a", "a"]}, "distinct names"),
        ({"hf_keys": ["a", "b", "c"]}, "3 parts that sum to 4"),
        ({"hf_keys": ["a", "b"], "fused_dim": 2}, "0 <= fused_dim < 2; found 2"),
        ({"hf_keys": ["a", "b"], "fused_dim": -3}, "found -1"),
        ({"hf_keys": ["a", "b"], "global_shape": ()}, "fused_dim"),
        ({"hf_keys": ["a", "b"], "fused_sizes": [4]}, "1 parts that sum to 4"),
        ({"hf_keys": ["a", "b"], "fused_sizes": [5, -1]}, "do not add up"),
        ({"hf_keys": ["a"], "fused_sizes": [3]}, "1 parts that sum to 3"),
        ({"hf_keys": ["a"], "origin_shape": (5, 3)}, r"within \(4, 3\); found \(5, 3\)"),
        ({"hf_keys": ["a"], "origin_shape": (4,)}, "origin_shape"),
        ({"hf_keys": ["a"], "origin_shape": (-1, 3)}, "origin_shape"),
    ],
)
def test_spec_is_refused_with_its_name_when_it_does_not_fit_itself(
    options: dict[str, Any], words: str
) -> None:
    arguments = {"name": "layers.0.w", "global_shape": (4, 3), **options}
    with pytest.raises(SpecError, match=words) as caught:
        LoadSpec(**arguments)
    assert caught.value.fqn == "layers.0.w"


def test_spec_travels_to_other_processes_and_cannot_be_changed() -> None:
    spec = LoadSpec("w", ["a", "b"], (4, 3), 1, (), (4, 2), dtype=torch.bfloat16)
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(AttributeError):
        spec.name = "v"  # type: ignore[misc]
