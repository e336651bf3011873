"""The HuggingFace half: each rank writes its own blocks at their offsets in the output files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import xxhash

from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.plan.regions import Region, TargetTable, needs_cast
from dcp_hf_writer.plan.written_block import WrittenBlock
from dcp_hf_writer.save.bounce_buffer import BounceBuffer
from dcp_hf_writer.save.tensor_bytes import chunk_of, digest_of, host_bytes
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE
from dcp_hf_writer.tensors.dtypes import TORCH_BY_NAME
from dcp_hf_writer.tensors.strided_copies import hf_box, hf_loops, runtime_view, split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import torch
    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.plan.layout import PartTarget
    from dcp_hf_writer.storage.posix_outputs import OutputFile
    from dcp_hf_writer.tensors.boxes import ByteRuns


def regions_by_file(
    items: Iterable[WriteItem], targets: Mapping[str, Sequence[PartTarget]]
) -> dict[int, list[tuple[WriteItem, Region]]]:
    """Group a rank's blocks by output file, in ascending order within each file.

    Args:
        items: Tensor items that this rank writes.
        targets: Where the parts of each tensor go, by FQN.

    Returns:
        The blocks of each output file, by its number in the layout.
    """
    found: dict[int, list[tuple[WriteItem, Region]]] = {}
    tables: dict[str, TargetTable] = {}
    for item in items:
        fqn = item.index.fqn
        if fqn not in targets:
            continue
        # One table per FQN: a rank may hold many blocks of a tensor, and a tensor may go to many
        # HuggingFace tensors.
        if fqn not in tables:
            tables[fqn] = TargetTable(targets[fqn])
        for region in tables[fqn].regions(chunk_of(item)):
            found.setdefault(region.target.file, []).append((item, region))
    for blocks in found.values():
        blocks.sort(key=lambda block: (block[1].target.start, block[1].copy.hf_start))
    return found


def is_interleaved(blocks: Iterable[tuple[WriteItem, Region]]) -> bool:
    """Whether a block has several runs, so that other ranks write between them (column shards)."""
    return any(region.hf_runs().count > 1 for _, region in blocks)


def nbytes_of_blocks(blocks: Iterable[tuple[WriteItem, Region]]) -> int:
    """Return the size of blocks in their output files."""
    return sum(region.copy.numel * ITEMSIZE[region.target.dtype] for _, region in blocks)


def way_of(tensor: torch.Tensor, region: Region) -> Literal["direct", "cast", "strided"]:
    """Return how a block gets into its file: directly, or through the bounce buffer.

    Args:
        tensor: Tensor that the rank holds, on any device.
        region: A block of that tensor.

    Returns:
        `"direct"` if the bytes in memory are those of the file, `"cast"` if the buffer changes the
        dtype, `"strided"` if the buffer only brings the elements into the order of the file.
    """
    if needs_cast(tensor.dtype, region.target):
        return "cast"
    return "direct" if runtime_view(tensor, region.copy).is_contiguous() else "strided"


def block_of(region: Region, digest: str) -> WrittenBlock:
    """Return what a rank reports about a block that it wrote."""
    box = hf_box(region.copy)
    extent = hf_loops(region.copy) if box is None else box.sizes
    return WrittenBlock(region.target.key, region.copy.hf_start, extent, digest)


def digest_in_place(
    item: WriteItem, tensor: torch.Tensor, data: memoryview, source: ItemTensors
) -> str:
    """Return the digest of a block that is written as it lies in memory.

    If the block is the whole item, both halves share one computation.

    Args:
        item: Item of the block.
        tensor: Its tensor.
        data: The bytes of the block.
        source: Knows the digests of whole items.
    """
    is_item = tensor.is_contiguous() and data.nbytes == tensor.nbytes
    return source.digest(item, data) if is_item else digest_of(data)


class ItemTensors(Protocol):
    """What resolves items: `TensorSource` in a save, and a stored checkpoint in a conversion."""

    def tensor(self, item: WriteItem) -> torch.Tensor:
        """Return the tensor of an item."""

    def digest(self, item: WriteItem, data: memoryview) -> str:
        """Return the digest of the item's whole data."""


class BlockWriter:
    """Writes blocks of one rank; keeps its bounce buffer from one save to the next."""

    def __init__(self) -> None:
        """Start without a buffer."""
        self.bounce = BounceBuffer()
        """The buffer; valid for one block at a time."""

    def write_file(
        self,
        file: OutputFile,
        blocks: Iterable[tuple[WriteItem, Region]],
        source: ItemTensors,
        *,
        check: Callable[[], None],
        bounce_nbytes: int,
        reuse: Callable[[WriteItem, Region], WrittenBlock | None] | None = None,
    ) -> list[WrittenBlock]:
        """Write this rank's blocks of one output file.

        Args:
            file: The output file, open for writing and of its final size.
            blocks: Blocks to write, in ascending order.
            source: Resolves items to tensors.
            check: Called before each block; raises if the save was given up.
            bounce_nbytes: Size of the bounce buffer, in bytes.
            reuse: Called before each block; returns what to report if the file has the block now
                without a write.

        Returns:
            One reported block, with its digest, for each of `blocks`.

        Raises:
            WriteError: If the file system refuses a write.
        """
        written = []
        self.bounce.resize(bounce_nbytes)
        for item, region in blocks:
            check()
            reach("mid hf")
            there = None if reuse is None else reuse(item, region)
            if there is None:
                there = block_of(region, self._write_block(file, item, region, source))
            written.append(there)
        return written

    def _write_block(
        self, file: OutputFile, item: WriteItem, region: Region, source: ItemTensors
    ) -> str:
        tensor = source.tensor(item)
        if way_of(tensor, region) == "direct":
            data = host_bytes(runtime_view(tensor, region.copy))
            _write_runs(file, data, region.hf_runs())
            return digest_in_place(item, tensor, data, source)
        digest = xxhash.xxh3_64()
        dtype = TORCH_BY_NAME[region.target.dtype]
        for part in split(region.copy, self.bounce.nbytes // dtype.itemsize):
            view = runtime_view(tensor, part)
            buffer = self.bounce.take(dtype, view.shape)
            buffer.copy_(view)
            data = host_bytes(buffer)
            digest.update(data)
            _write_runs(file, data, Region(region.target, part).hf_runs())
        return str(digest.hexdigest())


def _write_runs(file: OutputFile, data: memoryview, runs: ByteRuns) -> None:
    if runs.count == 1:
        file.write(data, runs.start)
    else:
        file.write_runs(data, runs.nbytes, runs.starts())
