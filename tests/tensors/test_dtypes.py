"""The table of dtypes, compared with the safetensors that is installed."""

from __future__ import annotations

import itertools

import pytest
import safetensors
import safetensors.torch
import torch

from dcp_hf_writer.errors import ConfigError, LayoutError
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE, SORT_RANK
from dcp_hf_writer.tensors.dtypes import (
    CASTABLE,
    NAME_BY_TORCH,
    TORCH_BY_NAME,
    export_dtype,
    safetensors_name,
    stored_shape,
)
from support.compare import parse

PACKED = torch.float4_e2m1fn_x2
STORED = sorted(safetensors.torch._SIZE, key=str)


def some(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8).view(dtype)


def keys_in_file(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [key for key, _ in parse(safetensors.torch.save(tensors)).header]


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_name_and_size_equal_those_of_the_library(dtype: torch.dtype) -> None:
    name = parse(safetensors.torch.save({"x": some(dtype)})).header[0][1]["dtype"]
    assert safetensors_name(dtype, fqn="x") == name
    assert TORCH_BY_NAME[name] is dtype
    assert ITEMSIZE[name] == dtype.itemsize == safetensors.torch._SIZE[dtype]


def test_order_equals_that_of_the_library_for_every_pair() -> None:
    wrong = [
        (first, second)
        for first, second in itertools.permutations(STORED, 2)
        if (keys_in_file({"a": some(second), "z": some(first)}) == ["z", "a"])
        != (SORT_RANK[NAME_BY_TORCH[first]] < SORT_RANK[NAME_BY_TORCH[second]])
    ]
    assert wrong == []


def test_table_holds_the_dtypes_of_the_library_and_no_others() -> None:
    assert set(NAME_BY_TORCH) == set(STORED)
    assert set(NAME_BY_TORCH) >= CASTABLE


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_shape_in_the_header_equals_that_of_the_library(dtype: torch.dtype) -> None:
    # Two numbers of F4 are one element of torch, and the library counts numbers.
    tensor = torch.zeros(48, dtype=torch.uint8).view(dtype).reshape(3, -1)
    entry = parse(safetensors.torch.save({"x": tensor})).header[0][1]
    assert list(stored_shape(entry["dtype"], tuple(tensor.shape), key="x")) == entry["shape"]


def test_scalar_of_a_packed_dtype_is_refused() -> None:
    with pytest.raises(LayoutError, match="'x'"):
        stored_shape("F4", (), key="x")
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.save({"x": torch.zeros(1, dtype=torch.uint8).view(PACKED).reshape(())})


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32, torch.qint8], ids=str)
def test_dtype_is_refused_with_its_tensor_when_safetensors_has_none(dtype: torch.dtype) -> None:
    with pytest.raises(LayoutError, match=r"layers\.0\.w") as caught:
        safetensors_name(dtype, fqn="layers.0.w")
    assert caught.value.found == str(dtype)


@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_export_dtype_takes_a_dtype_or_its_name(value: torch.dtype | str) -> None:
    assert export_dtype(value) is torch.bfloat16


def test_export_dtype_takes_none_for_no_cast() -> None:
    assert export_dtype(None) is None


@pytest.mark.parametrize(
    "value", [torch.int8, torch.float8_e4m3fn, "int32", "nn", "no such", "", torch.complex64, 16]
)
def test_export_dtype_is_refused_when_it_is_no_floating_point_dtype(value: object) -> None:
    with pytest.raises(ConfigError, match="floating-point") as caught:
        export_dtype(value)  # type: ignore[arg-type]
    assert caught.value.found == repr(value)
