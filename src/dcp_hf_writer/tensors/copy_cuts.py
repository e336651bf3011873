"""Cut a copy at any two of its elements, counted in the order of its loops.

Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.tensors.strided_copies import narrowed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_hf_writer.tensors.strided_copies import Copy


def elements_between(copy: Copy, first: int, stop: int) -> Iterator[Copy]:
    """Yield copies that together visit some elements of a copy, in the same order.

    Args:
        copy: A copy with at least one element.
        first: Number of the first element, in the order of the loops.
        stop: One past the number of the last one.
    """
    if first >= stop:
        return
    if stop - first == copy.numel:
        yield copy
        return
    inner = copy.numel // copy.loops[0].extent
    (step, skipped), (end, rest) = divmod(first, inner), divmod(stop, inner)
    if step == end:
        yield from elements_between(_steps(copy, step, 1), skipped, rest)
        return
    if skipped:
        yield from elements_between(_steps(copy, step, 1), skipped, inner)
        step += 1
    if step < end:
        yield _steps(copy, step, end - step)
    if rest:
        yield from elements_between(_steps(copy, end, 1), 0, rest)


def _steps(copy: Copy, first: int, count: int) -> Copy:
    """Keep some steps of the outermost loop."""
    return narrowed(copy, (0,) * len(copy.start), [(0, first, count)])
