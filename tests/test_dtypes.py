"""The table of dtypes, compared with the safetensors that is installed."""

from __future__ import annotations

import itertools

import pytest
import safetensors.torch
import torch

from compare import parse
from dcp_hf_writer._dtypes import (
    CASTABLE,
    ITEMSIZE,
    NAME_BY_TORCH,
    SORT_RANK,
    TORCH_BY_NAME,
    export_dtype,
    safetensors_name,
)
from dcp_hf_writer.errors import ConfigError, LayoutError

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


def test_table_holds_no_dtype_that_the_library_lacks() -> None:
    assert set(NAME_BY_TORCH) <= set(STORED)
    assert set(NAME_BY_TORCH) >= CASTABLE


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
