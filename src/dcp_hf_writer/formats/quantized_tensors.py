"""Logical tensors of a HuggingFace directory: each is one stored tensor, or codes and scales.

Pure: no I/O. A logical tensor tells which boxes of which stored tensors to read for a box of its
own, and computes the values of its box from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.formats.dequantize import (
    MX_GROUP,
    MX_GROUP_NBYTES,
    dequantize_blocks,
    dequantize_mxfp4,
)
from dcp_hf_writer.tensors.boxes import Box, Shape, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


@dataclass(frozen=True, slots=True)
class Stored:
    """A logical tensor that is stored unchanged; the base class of the quantised forms."""

    shape: Shape
    """Shape of the logical tensor."""
    dtype: str
    """Its safetensors dtype; for a quantised tensor, the dtype that the model computes in."""
    keys: tuple[str, ...]
    """Keys of the stored tensors that it is made of."""

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is stored unchanged, as one stored tensor."""
        return True

    @property
    def dims_in_file(self) -> tuple[int, ...]:
        """Dimensions in the order of the file, outermost first.

        A part cut along the first of them is one long run of bytes in the file.
        """
        return tuple(range(len(self.shape)))

    def raw_boxes(self, box: Box) -> dict[str, Box]:
        """Return, by key, the boxes to read for `box`; empty if `box` has no element."""
        return dict.fromkeys(self.keys, box) if box.numel else {}

    def dequantize(self, box: Box, raw: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the values of a box into `out`.

        Each value is computed in float32 and rounded once, to the dtype of `out`. So pass the final
        target, or memory of its dtype; otherwise the value is rounded twice.

        Args:
            box: Any part of the tensor; it need not align with blocks or groups.
            raw: The data of each box in `raw_boxes(box)`, by key; on the CPU, in its stored dtype.
            out: Target, with the shape of `box`; any floating-point dtype, any strides.
        """
        if box.numel:
            out.copy_(raw[self.keys[0]])


@dataclass(frozen=True, slots=True)
class BlockScaled(Stored):
    """One-byte floats; each block of the last two dimensions has its own scale."""

    scale_shape: Shape
    """Shape of the stored scales; with one element, that scale holds for the whole tensor."""
    block: tuple[int, int]
    """Rows and columns that share a scale; the last blocks of a tensor may be smaller."""

    @property
    def is_plain(self) -> bool:
        """Always False: reading it needs its scales."""
        return False

    @property
    def _has_one_scale(self) -> bool:
        return whole(self.scale_shape).numel == 1

    def raw_boxes(self, box: Box) -> dict[str, Box]:
        """Return `box` for the weight, and the box of the scales of all blocks that it touches."""
        if not box.numel:
            return {}
        weight, scales = self.keys
        if self._has_one_scale:
            return {weight: box, scales: whole(self.scale_shape)}
        first = [o // b for o, b in zip(box.offsets[-2:], self.block, strict=True)]
        stop = [
            -(-(o + s) // b)
            for o, s, b in zip(box.offsets[-2:], box.sizes[-2:], self.block, strict=True)
        ]
        touched = Box(
            (*box.offsets[:-2], *first),
            (*box.sizes[:-2], *(b - a for a, b in zip(first, stop, strict=True))),
        )
        return {weight: box, scales: touched}

    def dequantize(self, box: Box, raw: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the values of a box into `out`; see `Stored.dequantize`."""
        if not box.numel:
            return
        codes, scales = (raw[key] for key in self.keys)
        if self._has_one_scale:
            scales = scales.reshape(1, 1).expand(*box.sizes[:-2], 1, 1)
        rows, columns = (o % b for o, b in zip(box.offsets[-2:], self.block, strict=True))
        dequantize_blocks(codes, scales, first=(rows, columns), block=self.block, out=out)


@dataclass(frozen=True, slots=True)
class PackedFp4(Stored):
    """mxfp4 values `(experts, columns, rows)`, stored as bytes `(experts, rows, groups, 16)`.

    A byte holds two values.
    """

    @property
    def dims_in_file(self) -> tuple[int, ...]:
        """Dimensions in the order of the file, outermost first."""
        return 0, 2, 1

    @property
    def is_plain(self) -> bool:
        """Always False: reading it needs its scales."""
        return False

    def raw_boxes(self, box: Box) -> dict[str, Box]:
        """Return the boxes of all groups that `box` touches, and of their scales."""
        if not box.numel:
            return {}
        blocks, scales = self.keys
        (expert, column, row), (experts, columns, rows) = box.offsets, box.sizes
        first, stop = column // MX_GROUP, -(-(column + columns) // MX_GROUP)
        offsets, sizes = (expert, row, first), (experts, rows, stop - first)
        return {
            blocks: Box((*offsets, 0), (*sizes, MX_GROUP_NBYTES)),
            scales: Box(offsets, sizes),
        }

    def dequantize(self, box: Box, raw: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the values of a box into `out`; see `Stored.dequantize`."""
        if box.numel:
            blocks, scales = (raw[key] for key in self.keys)
            dequantize_mxfp4(blocks, scales, skip=box.offsets[1] % MX_GROUP, out=out)
