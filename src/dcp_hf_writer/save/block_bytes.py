"""The bytes of a rank's blocks as the output files hold them, read from front to back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import xxhash

from dcp_hf_writer.save.hf_half import block_of, digest_in_place, way_of
from dcp_hf_writer.tensors.boxes import ByteRuns
from dcp_hf_writer.tensors.copy_cuts import elements_between
from dcp_hf_writer.tensors.dtypes import TORCH_BY_NAME
from dcp_hf_writer.tensors.strided_copies import runtime_view, split

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.plan.written_block import WrittenBlock
    from dcp_hf_writer.save.bounce_buffer import BounceBuffer
    from dcp_hf_writer.save.hf_half import ItemTensors
    from dcp_hf_writer.tensors.strided_copies import Copy


class FileBytes(Protocol):
    """Bytes of an output file that this rank holds."""

    file: int
    """Number of the file."""
    runs: ByteRuns
    """Where they are in the file."""

    def read(self, first: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield the bytes between two positions, as flat uint8 tensors on the host.

        A tensor is valid until the next one. Each call begins where the call before ended.
        """

    def in_memory(self) -> torch.Tensor | None:
        """Return all bytes if memory holds them as the file does; `None` if they must be made."""


class HeaderBytes:
    """The header of a file."""

    def __init__(self, file: int, header: bytes) -> None:
        """Hold the first bytes of a file."""
        self.file = file
        self.runs = ByteRuns(0, len(header), ())
        self._data = torch.frombuffer(bytearray(header), dtype=torch.uint8)

    def read(self, first: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield one tensor; see `FileBytes`."""
        yield self._data[first:stop]

    def in_memory(self) -> torch.Tensor:
        """Return the header."""
        return self._data


class BlockBytes:
    """The bytes of one block: cast, reordered and digested once, while they are read."""

    def __init__(
        self, file: int, item: WriteItem, region: Region, source: ItemTensors, bounce: BounceBuffer
    ) -> None:
        """Look at a block; reads no data.

        Args:
            file: Number of the block's file.
            item: Item of the block's tensor.
            region: The block.
            source: Resolves the item.
            bounce: Memory for casts and reordering; all blocks of a rank share it.
        """
        self.file = file
        self.runs = region.hf_runs()
        self._item, self._region, self._source, self._bounce = item, region, source, bounce
        self._dtype = TORCH_BY_NAME[region.target.dtype]
        self._digest = xxhash.xxh3_64()
        self._flat: torch.Tensor | None = None
        self._is_looked_up = False

    def read(self, first: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield the bytes between two positions; see `FileBytes`."""
        whole = self.in_memory()
        if whole is not None:
            yield whole[first:stop]
            return
        size = self._dtype.itemsize
        # A cell may end within an element. Then both of its cells cast it.
        before, behind = first // size, -(-stop // size)
        for copy in elements_between(self._region.copy, before, behind):
            for part in split(copy, max(1, self._bounce.nbytes // size)):
                data = self._made(part)
                reached, before = before * size, before + part.numel
                data = data[max(0, first - reached) : stop - reached]
                self._digest.update(data.numpy().data)
                yield data

    def _made(self, part: Copy) -> torch.Tensor:
        view = runtime_view(self._source.tensor(self._item), part)
        buffer = self._bounce.take(self._dtype, view.shape)
        buffer.copy_(view)
        return buffer.reshape(-1).view(torch.uint8)

    def in_memory(self) -> torch.Tensor | None:
        """Return all bytes if the host's memory holds them as the file does; else `None`."""
        if not self._is_looked_up:
            self._is_looked_up = True
            tensor = self._source.tensor(self._item)
            if tensor.device.type == "cpu" and way_of(tensor, self._region) == "direct":
                view = runtime_view(tensor, self._region.copy)
                self._flat = view.reshape(-1).view(torch.uint8)
        return self._flat

    def written(self) -> WrittenBlock:
        """Return the report of the block; all of it must have been read."""
        data = self.in_memory()
        if data is None:
            return block_of(self._region, str(self._digest.hexdigest()))
        tensor, memory = self._source.tensor(self._item), data.numpy().data
        return block_of(self._region, digest_in_place(self._item, tensor, memory, self._source))
