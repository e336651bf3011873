"""Put whole rows together from the slabs of a host's ranks, and write them in large pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.plan.row_groups import boxes_between
from dcp_hf_writer.plan.written_block import WrittenBlock
from dcp_hf_writer.save.tensor_bytes import host_bytes
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE
from dcp_hf_writer.tensors.dtypes import TORCH_BY_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from dcp_hf_writer.plan.row_groups import ColumnShard
    from dcp_hf_writer.save.bounce_buffer import BounceBuffer
    from dcp_hf_writer.save.whole_rows import RowShare
    from dcp_hf_writer.staging.neighbour_slabs import NeighbourSlabs
    from dcp_hf_writer.storage.posix_outputs import OutputFile
    from dcp_hf_writer.tensors.boxes import Box

# Pieces of this size stay in the processor's cache from the copy to the digest and the write.
_PIECE_NBYTES = 1 << 20


def write_rows(
    file: OutputFile,
    shares: Iterable[RowShare],
    slabs: NeighbourSlabs,
    bounce: BounceBuffer,
    check: Callable[[], None],
) -> list[WrittenBlock]:
    """Write this rank's rows of one output file.

    Args:
        file: The output file, open for writing and of its final size.
        shares: The rows.
        slabs: The slabs that hold the columns, mapped.
        bounce: The bounce buffer; one unit of each group fits.
        check: Called before each piece; raises if the save was given up.

    Returns:
        The blocks that this rank wrote, with their digests.

    Raises:
        WriteError: If the file system refuses a write.
        SaveAbortedError: If a rank's slab was given to another save meanwhile.
    """
    written: list[WrittenBlock] = []
    for share in shares:
        written += _write_share(file, share, slabs, bounce, check)
    # After the last read: what was read before is what the ranks staged for this save.
    slabs.check_turns()
    return written


def _write_share(
    file: OutputFile,
    share: RowShare,
    slabs: NeighbourSlabs,
    bounce: BounceBuffer,
    check: Callable[[], None],
) -> list[WrittenBlock]:
    group, units = share.part.group, share.part.units
    blocks = _BlockDigests(share)
    at_once = max(1, min(bounce.nbytes, _PIECE_NBYTES) // group.unit_nbytes)
    for begin in range(units.start, units.stop, at_once):
        check()
        reach("mid hf")
        piece = range(begin, min(begin + at_once, units.stop))
        data = host_bytes(_rows(share, piece, slabs, bounce))
        blocks.add(data)
        file.write(data, group.start_of(begin))
    return blocks.written


class _BlockDigests:
    """Digests of the boxes that a share consists of, from the bytes of the share in order."""

    def __init__(self, share: RowShare) -> None:
        self._key, dtype = share.target.key, share.target.dtype
        first = share.part.group.start_of(share.part.units.start) - share.target.start
        boxes = boxes_between(share.target.shape, dtype, first, first + share.nbytes)
        self._left = [(box, box.numel * ITEMSIZE[dtype]) for box in reversed(boxes)]
        self._digest = xxhash.xxh3_64()
        self._seen = 0
        self.written: list[WrittenBlock] = []
        """The boxes whose bytes were all added."""

    def add(self, data: memoryview) -> None:
        """Add the next bytes of the share."""
        while data.nbytes:
            box, nbytes = self._left[-1]
            part = data[: nbytes - self._seen]
            self._digest.update(part)
            self._seen, data = self._seen + part.nbytes, data[part.nbytes :]
            if self._seen == nbytes:
                self._end(box)

    def _end(self, box: Box) -> None:
        digest = str(self._digest.hexdigest())
        self.written.append(WrittenBlock(self._key, box.offsets, box.sizes, digest))
        self._left.pop()
        self._digest, self._seen = xxhash.xxh3_64(), 0


def _rows(
    share: RowShare, units: range, slabs: NeighbourSlabs, bounce: BounceBuffer
) -> torch.Tensor:
    """Put some units together; the result is valid until the next call.

    No view of a slab outlives the call: an error of a later write must not keep the slab mapped.
    """
    group, first = share.part.group, share.part.group.first
    dtype = TORCH_BY_NAME[first.dtype]
    rows = bounce.take(dtype, (len(units) * group.unit_rows, first.stride // ITEMSIZE[first.dtype]))
    for place, (_, shard) in zip(share.part.places, group.members, strict=True):
        steps = group.unit_rows // shard.rows_per_step
        view = slabs.view(
            place,
            offset=shard.offset,
            dtype=TORCH_BY_NAME[shard.held_dtype],
            extents=shard.extents,
            strides=shard.strides,
        )
        part = view[units.start * steps : units.stop * steps]
        column = (shard.start - first.start) // ITEMSIZE[first.dtype]
        _columns(rows, shard, column, len(part)).copy_(part)
    return rows


def _columns(rows: torch.Tensor, shard: ColumnShard, first: int, steps: int) -> torch.Tensor:
    """Return the columns of a shard in some whole rows, with the loops of the shard."""
    columns = rows[:, first : first + shard.nbytes // ITEMSIZE[shard.dtype]]
    outer, inner = shard.extents[1 : shard.row_loops], shard.extents[shard.row_loops :]
    # A single column has no loop of its own.
    columns = columns.unflatten(1, inner) if inner else columns.squeeze(1)
    return columns.unflatten(0, (steps, *outer)) if outer else columns
