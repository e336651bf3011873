"""The dtypes of safetensors: name and torch dtype. `dtype_names` has sizes and order."""

from __future__ import annotations

import torch

from dcp_hf_writer.errors import ConfigError, LayoutError
from dcp_hf_writer.tensors.dtype_names import SORT_RANK

TORCH_BY_NAME: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F4": torch.float4_e2m1fn_x2,
    "BOOL": torch.bool,
}
NAME_BY_TORCH: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_BY_NAME.items()}

# `HFExport.dtype` casts only these. fp8 tensors come with scales, which a cast would make wrong;
# integers and bools are indices and masks.
CASTABLE: frozenset[torch.dtype] = frozenset(
    {torch.float64, torch.float32, torch.bfloat16, torch.float16}
)


def stored_shape(name: str, shape: tuple[int, ...], *, key: str) -> tuple[int, ...]:
    """Return the shape that the header declares for a torch tensor of `shape`.

    The two differ for F4 only: one torch element holds two F4 values of the last dimension.

    Raises:
        LayoutError: If an F4 tensor is a scalar, which has no dimension for its two values.
    """
    if name != "F4":
        return shape
    if not shape:
        msg = "a scalar of a packed dtype cannot be stored in safetensors"
        raise LayoutError(
            msg, phase="plan", key=key, expected="at least one dimension", found="shape []"
        )
    return (*shape[:-1], 2 * shape[-1])


def safetensors_name(dtype: torch.dtype, *, fqn: str) -> str:
    """Return the safetensors name of a dtype.

    Raises:
        LayoutError: If safetensors has no such dtype.
    """
    name = NAME_BY_TORCH.get(dtype)
    if name is None:
        msg = "dtype cannot be stored in safetensors"
        raise LayoutError(
            msg,
            phase="plan",
            fqn=fqn,
            expected=f"one of {', '.join(sorted(SORT_RANK))}",
            found=str(dtype),
            hint="leave the tensor out of the model's entry, or cast it before saving",
        )
    return name


def export_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """Turn the `dtype` option of an export, such as `"bfloat16"`, into a torch dtype or `None`.

    Raises:
        ConfigError: If the value is not one of `CASTABLE` and not `None`.
    """
    if value is None:
        return None
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if dtype not in CASTABLE:
        msg = "export dtype must be a floating-point dtype"
        names = ", ".join(sorted(str(one) for one in CASTABLE))
        raise ConfigError(msg, expected=f"one of {names}, or None", found=repr(value))
    return dtype
