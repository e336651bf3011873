"""What a tensor of a HuggingFace directory is made of: itself, or codes and scales.

Pure: no I/O. A logical tensor says which boxes of which stored tensors a box of it needs, and turns
them into its values.
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
    """A logical tensor of a HuggingFace directory; this class: stored as it is."""

    shape: Shape
    """Its shape."""
    dtype: str
    """Its safetensors dtype; of a quantised one, what the model computes in."""
    keys: tuple[str, ...]
    """The stored tensors that it is made of."""

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are those of its one stored tensor."""
        return True

    @property
    def dims_in_file(self) -> tuple[int, ...]:
        """Its dimensions in the order of the file, outermost first.

        Parts that are cut along the first ones are long runs of the file.
        """
        return tuple(range(len(self.shape)))

    def raw_boxes(self, box: Box) -> dict[str, Box]:
        """Return the boxes of the stored tensors that a box needs; none if it has no element."""
        return dict.fromkeys(self.keys, box) if box.numel else {}

    def dequantize(self, box: Box, raw: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        """Write the values of a box.

        A value is computed in float32 and rounded once, to the dtype of `out`: give the target
        itself, or memory of its dtype.

        Args:
            box: Part of the tensor; its borders may be anywhere.
            raw: For each key of `raw_boxes(box)` that box, on the CPU, in the stored dtype.
            out: Target of the shape of the box; any floating-point dtype, any strides.
        """
        if box.numel:
            out.copy_(raw[self.keys[0]])


@dataclass(frozen=True, slots=True)
class BlockScaled(Stored):
    """A float of one byte, multiplied by the scale of its block of the last two dimensions."""

    scale_shape: Shape
    """Shape of the stored scales; one element: the scale of the whole tensor."""
    block: tuple[int, int]
    """Rows and columns that share a scale; the last ones of a tensor may be fewer."""

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are those of its one stored tensor."""
        return False

    @property
    def _has_one_scale(self) -> bool:
        return whole(self.scale_shape).numel == 1

    def raw_boxes(self, box: Box) -> dict[str, Box]:
        """Return the box itself of the weight, and the scales of all blocks that it touches."""
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
        """Write the values of a box; see `Stored.dequantize`."""
        if not box.numel:
            return
        codes, scales = (raw[key] for key in self.keys)
        if self._has_one_scale:
            scales = scales.reshape(1, 1).expand(*box.sizes[:-2], 1, 1)
        rows, columns = (o % b for o, b in zip(box.offsets[-2:], self.block, strict=True))
        dequantize_blocks(codes, scales, first=(rows, columns), block=self.block, out=out)


@dataclass(frozen=True, slots=True)
class PackedFp4(Stored):
    """`(experts, columns, rows)` of bytes that hold two values, `(experts, rows, groups, 16)`."""

    @property
    def dims_in_file(self) -> tuple[int, ...]:
        """Its dimensions in the order of the file, outermost first."""
        return 0, 2, 1

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are those of its one stored tensor."""
        return False

    def raw_boxes(self, box: Box) -> dict[str, Box]:
        """Return the whole groups that a box touches, and their scales."""
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
        """Write the values of a box; see `Stored.dequantize`."""
        if box.numel:
            blocks, scales = (raw[key] for key in self.keys)
            dequantize_mxfp4(blocks, scales, skip=box.offsets[1] % MX_GROUP, out=out)
