"""Turn the codes and scales of quantised checkpoints into floats, tile by tile.

Pure: both functions read CPU tensors and fill a CPU tensor. Temporary memory is a few MiB, whatever
the size of the tensor. They compute in float32 and round once, to the dtype of the target.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Words = npt.NDArray[np.uint64]
    Bytes = npt.NDArray[np.uint8]

MX_GROUP = 32
"""Number of mxfp4 values that share one scale."""
MX_GROUP_NBYTES = MX_GROUP // 2

# Elements per tile. Their float32 values and the lookup tables fit in the second-level cache.
# Measured on 4096 columns: tiles of half or twice this size are no faster.
_TILE_NUMEL = 1 << 17

# The value of each E2M1 code: one sign bit, two exponent bits, one mantissa bit.
_FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
_E8M0_BIAS = 127
# The largest scale, 2 ** (255 - 127), overflows float32, but its product with a small value does
# not. So the tables hold the values times 2 ** 2 and the scales times 2 ** -2.
_SHIFT = 2


def dequantize_blocks(
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    first: tuple[int, int],
    block: tuple[int, int],
    out: torch.Tensor,
) -> None:
    """Multiply each code by the scale of its block, into `out`.

    Args:
        codes: A box of the weight, `(..., rows, columns)`, of a one-byte floating-point dtype.
        scales: The scales of all blocks that the box touches, `(..., block rows, block columns)`;
            either floats, or bytes that hold exponents of two with a bias of 127.
        first: Row and column of the box's first element within its block.
        block: Rows and columns of a block.
        out: Target, with the shape of `codes`; any floating-point dtype, any strides.
    """
    pairs = _pairs_of_bytes(codes.dtype)
    scratch = _floats(min(codes.numel(), _TILE_NUMEL))
    for lead in itertools.product(*map(range, codes.shape[:-2])):
        weight, target, grid = codes[lead], out[lead], scales[lead]
        for rows, columns in _tiles(codes.shape[-2], codes.shape[-1], _TILE_NUMEL):
            part = weight[rows, columns]
            tile = scratch[: part.numel()].view(part.shape)
            _look_up(part.reshape(-1).view(torch.uint8).numpy(), pairs, tile.view(-1).numpy())
            tile.mul_(_spread(grid, first=first, block=block, rows=rows, columns=columns))
            target[rows, columns].copy_(tile)


def dequantize_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, *, skip: int, out: torch.Tensor
) -> None:
    """Write the values of packed fp4 groups into `out`, with rows and columns swapped.

    Args:
        blocks: Bytes of whole groups, `(experts, rows, groups, 16)`. A byte holds two values, the
            first in its lower four bits.
        scales: Exponents of two with a bias of 127, `(experts, rows, groups)`.
        skip: Number of values in the first group that precede the first value of `out`.
        out: Target `(experts, columns, rows)`; any floating-point dtype, any strides.
    """
    pairs, powers = _pairs_of_fp4(), _powers_of_two()
    experts, rows_in_all, groups, _ = blocks.shape
    room = min(rows_in_all * groups * MX_GROUP, _TILE_NUMEL)
    scratch = _floats(room)
    rounded = torch.empty(room, dtype=out.dtype, device="cpu")
    tiles = list(_tiles(rows_in_all, groups, _TILE_NUMEL // MX_GROUP))
    for expert, (rows, columns) in itertools.product(range(experts), tiles):
        part = blocks[expert, rows, columns]
        values = scratch[: part.numel() * 2]
        np.take(pairs, part.reshape(-1).numpy(), out=values.numpy().view(np.uint64), mode="clip")
        by_group = values.view(*part.shape[:2], MX_GROUP)
        by_group.mul_(torch.from_numpy(powers[scales[expert, rows, columns].numpy()])[..., None])
        start = max(columns.start * MX_GROUP - skip, 0)
        stop = min(columns.stop * MX_GROUP - skip, out.shape[1])
        before = start + skip - columns.start * MX_GROUP
        kept = by_group.flatten(1)[:, before : before + stop - start]
        # Round first, then transpose: a transposed copy between two dtypes is half as fast.
        tile = rounded[: kept.numel()].view(kept.shape).copy_(kept)
        out[expert, start:stop, rows].copy_(tile.T)


def _floats(numel: int) -> torch.Tensor:
    # dtype and device are explicit, because trainers change torch's defaults.
    return torch.empty(numel, dtype=torch.float32, device="cpu")


def _tiles(rows: int, columns: int, numel: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into tiles of at most `numel` elements, each as wide as possible."""
    width = max(1, min(columns, numel))
    height = max(1, numel // width)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield (
                slice(row, min(row + height, rows)),
                slice(column, min(column + width, columns)),
            )


def _look_up(codes: Bytes, pairs: Words, out: npt.NDArray[np.float32]) -> None:
    """Decode two bytes per table lookup, which is six times as fast as torch's conversion."""
    even = codes.size // 2 * 2
    # Every index is in the table, so nothing is clipped; numpy's default mode would buffer `out`.
    np.take(pairs, codes[:even].view(np.uint16), out=out[:even].view(np.uint64), mode="clip")
    if even < codes.size:
        last = np.array([codes[even], 0], np.uint8).view(np.uint16)
        out[even] = pairs[last].view(np.float32)[0]


def _spread(
    scales: torch.Tensor,
    *,
    first: tuple[int, int],
    block: tuple[int, int],
    rows: slice,
    columns: slice,
) -> torch.Tensor:
    """Return the float32 scale of each element of a tile."""
    row_blocks = _block_of_each(rows, first[0], block[0])
    column_blocks = _block_of_each(columns, first[1], block[1])
    top, left = int(row_blocks[0]), int(column_blocks[0])
    grid = scales[top : int(row_blocks[-1]) + 1, left : int(column_blocks[-1]) + 1]
    wide = _as_floats(grid).index_select(1, column_blocks - left)
    return wide.index_select(0, row_blocks - top)


def _block_of_each(indices: slice, first: int, size: int) -> torch.Tensor:
    return torch.arange(indices.start + first, indices.stop + first, device="cpu") // size


def _as_floats(scales: torch.Tensor) -> torch.Tensor:
    if scales.dtype == torch.uint8:
        return (scales.to(torch.float32) - float(_E8M0_BIAS)).exp2()
    return scales.to(torch.float32)


def _in_pairs(values: npt.NDArray[np.float32]) -> Words:
    return np.ascontiguousarray(values, np.float32).view(np.uint64).reshape(-1)


@functools.cache
def _pairs_of_bytes(dtype: torch.dtype) -> Words:
    """Return the two floats for each pair of bytes, as one word of eight bytes."""
    values = (
        torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).to(torch.float32).numpy()
    )
    return _in_pairs(values[np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2)])


@functools.cache
def _pairs_of_fp4() -> Words:
    """Return the two floats for each byte, times `2 ** _SHIFT`, as one word of eight bytes."""
    codes = np.arange(256)
    values = np.ldexp(np.array(_FP4_VALUES, np.float32), _SHIFT)
    return _in_pairs(values[np.stack((codes & 0xF, codes >> 4), axis=1)])


@functools.cache
def _powers_of_two() -> npt.NDArray[np.float32]:
    """Return the scale that each byte stands for, times `2 ** -_SHIFT`."""
    exponents = np.arange(256) - _E8M0_BIAS - _SHIFT
    return np.ldexp(np.ones(256, np.float32), exponents)
