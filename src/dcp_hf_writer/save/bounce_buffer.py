"""The bounce buffer of a rank: reused memory for blocks that need a cast or a reordering."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

# At most this much memory, reused for casts and for blocks that are not contiguous: fresh pages
# would cost ten times the copy.
MAX_BOUNCE_NBYTES = 8 << 20

_PART_OF_BUDGET = 4
"""The buffer takes at most the rank's budget divided by this number."""


def bounce_nbytes_of(host_budget_bytes: int) -> int:
    """Return the size of a rank's bounce buffer, in bytes.

    Args:
        host_budget_bytes: Memory that a rank may use in addition to the staged copy.
    """
    return min(MAX_BOUNCE_NBYTES, host_budget_bytes // _PART_OF_BUDGET)


class BounceBuffer:
    """Host memory for one part of a block at a time; it keeps its pages from save to save."""

    def __init__(self) -> None:
        """Start without memory."""
        self.nbytes = MAX_BOUNCE_NBYTES
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def resize(self, nbytes: int) -> None:
        """Set the size for the next parts; the next `take` allocates the memory."""
        self.nbytes = nbytes

    def take(self, dtype: torch.dtype, sizes: Sequence[int]) -> torch.Tensor:
        """Return the start of the buffer as a tensor, which is valid until the next call.

        Args:
            dtype: Dtype of the tensor.
            sizes: Shape of the tensor; it must fit in `nbytes` bytes.
        """
        if self._memory.nbytes < self.nbytes:
            self._memory = torch.zeros(self.nbytes, dtype=torch.uint8, device="cpu")
        return self._memory[: math.prod(sizes) * dtype.itemsize].view(dtype).view(tuple(sizes))
