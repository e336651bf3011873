"""Cut a tensor into boxes of bounded size.

Pure: no I/O, no torch, no process group.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from dcp_hf_writer.tensors.boxes import Box

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_hf_writer.tensors.boxes import Shape


def row_major_parts(box: Box, max_elements: int) -> Iterator[Box]:
    """Cut a box of a tensor into boxes of at most `max_elements`, in row-major order.

    The bytes of each part are contiguous in a row-major copy of the box.

    Args:
        box: The box to cut; it yields nothing if the box has no elements.
        max_elements: Most elements of a part; at least 1.
    """
    shape = box.sizes
    if math.prod(shape) == 0:
        return
    dim = 0
    while dim < len(shape) and math.prod(shape[dim + 1 :]) > max_elements:
        dim += 1
    if dim == len(shape):
        yield box
        return
    step = max(1, max_elements // math.prod(shape[dim + 1 :]))
    rest = shape[dim + 1 :]
    for outer in itertools.product(*map(range, shape[:dim])):
        for start in range(0, shape[dim], step):
            first = (*outer, start, *(0 for _ in rest))
            sizes = (*(1 for _ in outer), min(step, shape[dim] - start), *rest)
            yield Box(_moved(box.offsets, first), sizes)


def _moved(offsets: Shape, by: Shape) -> Shape:
    return tuple(a + b for a, b in zip(offsets, by, strict=True))
