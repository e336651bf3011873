"""The names of the dtypes of safetensors: element size, and order within a file.

No torch: reading a manifest needs the sizes only, and `dcp-hf ls` starts without torch.
"""

from __future__ import annotations

# safetensors 0.8 sorts the tensors of a file by its dtype enumeration, descending, then by name.
# The order below is that enumeration, largest first; a test compares it with the library.
ITEMSIZE: dict[str, int] = {
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
    "F32": 4,
    "U32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "U16": 2,
    "I16": 2,
    "F8_E5M2FNUZ": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E8M0": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "F4": 1,
    "BOOL": 1,
}
"""Bytes per element of the torch tensor, by name. One torch element holds two F4 values."""

SORT_RANK: dict[str, int] = {name: rank for rank, name in enumerate(ITEMSIZE)}
"""Place of a dtype in the order of a file, by name."""
