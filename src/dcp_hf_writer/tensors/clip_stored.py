"""Cut a copy by a box of the stored tensor; `clip` cuts it by a box of the runtime tensor.

Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.tensors.strided_copies import Copy, Loop, clip

if TYPE_CHECKING:
    from dcp_hf_writer.tensors.boxes import Box


def clip_stored(copy: Copy, box: Box) -> list[Copy]:
    """Return the part of a copy that lies in a box of the HuggingFace tensor.

    Args:
        copy: A copy whose `hf_start` counts from the first index of the whole HuggingFace tensor.
        box: A box of that tensor.

    Returns:
        Disjoint copies whose `hf_start` counts from the first index of the box.
    """
    return [_mirrored(one) for one in clip(_mirrored(copy), box)]


def _mirrored(copy: Copy) -> Copy:
    """Return a copy in the other direction; its loops need not ascend in its stored tensor."""
    loops = (Loop(one.extent, one.dim, one.step, one.hf_dim, one.hf_step) for one in copy.loops)
    return Copy(copy.start, copy.hf_start, tuple(loops))
