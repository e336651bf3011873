"""The HuggingFace half: a rank's own blocks of the output files, written where they belong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import xxhash

from dcp_hf_writer._boxes import Box, byte_runs
from dcp_hf_writer._dtypes import ITEMSIZE, TORCH_BY_NAME
from dcp_hf_writer._hooks import reach
from dcp_hf_writer._layout import Region, chunk_regions, needs_cast
from dcp_hf_writer._report import Piece
from dcp_hf_writer._source import TensorSource, chunk_of, digest_of, host_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer._boxes import ByteRuns
    from dcp_hf_writer._layout import PartTarget
    from dcp_hf_writer.storage._posix import OutputFile

# Casts and blocks that are not contiguous go through at most this much reused memory: fresh pages
# cost ten times the copy.
MAX_BOUNCE_NBYTES = 8 << 20


def regions_by_file(
    items: Iterable[WriteItem], targets: Mapping[str, Sequence[PartTarget]]
) -> dict[int, list[tuple[WriteItem, Region]]]:
    """Sort a rank's blocks by output file, ascending within each.

    Args:
        items: Tensor items that this rank writes.
        targets: Where the parts of each tensor go, by FQN.
    """
    found: dict[int, list[tuple[WriteItem, Region]]] = {}
    for item in items:
        parts = targets.get(item.index.fqn)
        if parts is None:
            continue
        for region in chunk_regions(chunk_of(item), parts):
            found.setdefault(region.target.file, []).append((item, region))
    for blocks in found.values():
        blocks.sort(key=lambda block: (block[1].target.start, block[1].disk.offsets))
    return found


def is_interleaved(blocks: Iterable[tuple[WriteItem, Region]]) -> bool:
    """Whether blocks are runs between those of other ranks, as column shards are."""
    return any(_runs(region.target, region.disk).count > 1 for _, region in blocks)


class BlockWriter:
    """Writes blocks of one rank; keeps its bounce buffer from save to save."""

    def __init__(self) -> None:
        """Start without a buffer."""
        self._bounce = torch.empty(0, dtype=torch.uint8)
        self._bounce_nbytes = MAX_BOUNCE_NBYTES

    def write_file(
        self,
        file: OutputFile,
        blocks: Iterable[tuple[WriteItem, Region]],
        source: TensorSource,
        *,
        check: Callable[[], None],
        bounce_nbytes: int,
    ) -> list[Piece]:
        """Write this rank's blocks of one output file.

        Args:
            file: Open for writing, of its final size.
            blocks: What to write, ascending.
            source: Resolves items to tensors.
            check: Called before each block; raises if the save was given up.
            bounce_nbytes: Size of the buffer for casts and blocks that are not contiguous.

        Returns:
            One piece a block.

        Raises:
            WriteError: If the file system does not take the bytes.
        """
        pieces = []
        self._bounce_nbytes = bounce_nbytes
        for item, region in blocks:
            check()
            reach("mid hf")
            digest = self._write_block(file, item, region, source)
            pieces.append(Piece(region.target.key, region.disk.offsets, region.disk.sizes, digest))
        return pieces

    def _write_block(
        self, file: OutputFile, item: WriteItem, region: Region, source: TensorSource
    ) -> str:
        tensor = source.tensor(item)
        view = _narrow(tensor, region.local)
        if not needs_cast(tensor.dtype, region.target) and view.is_contiguous():
            data = host_bytes(view)
            _write_runs(file, data, _runs(region.target, region.disk))
            return source.digest(item, data) if view.shape == tensor.shape else digest_of(data)
        digest = xxhash.xxh3_64()
        dtype = TORCH_BY_NAME[region.target.dtype]
        for local, disk in _split(region, self._bounce_nbytes // dtype.itemsize):
            part = self._buffer(dtype, local.sizes)
            part.copy_(_narrow(tensor, local))
            data = host_bytes(part)
            digest.update(data)
            _write_runs(file, data, _runs(region.target, disk))
        return str(digest.hexdigest())

    def _buffer(self, dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
        if self._bounce.nbytes < self._bounce_nbytes:
            self._bounce = torch.zeros(self._bounce_nbytes, dtype=torch.uint8)
        count = 1
        for n in sizes:
            count *= n
        return self._bounce[: count * dtype.itemsize].view(dtype).view(sizes)


def _narrow(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, offset, size)
    return tensor


def _runs(target: PartTarget, disk: Box) -> ByteRuns:
    return byte_runs(
        disk, target.part.sizes, itemsize=ITEMSIZE[target.dtype], tensor_start=target.start
    )


def _write_runs(file: OutputFile, data: memoryview, runs: ByteRuns) -> None:
    if runs.count == 1:
        file.write(data, runs.start)
    else:
        file.write_runs(data, runs.nbytes, runs.starts())


def _split(region: Region, max_elements: int) -> Iterator[tuple[Box, Box]]:
    """Cut a block into blocks that fit the buffer, in row-major order."""
    local, disk = region.local, region.disk
    if local.numel <= max_elements:
        yield local, disk
        return
    dim = next(d for d, n in enumerate(local.sizes) if n > 1)
    row = local.numel // local.sizes[dim]
    step = max(1, max_elements // row)
    for start in range(0, local.sizes[dim], step):
        size = min(step, local.sizes[dim] - start)
        part = Region(region.target, _slab(local, dim, start, size), _slab(disk, dim, start, size))
        yield from _split(part, max_elements)


def _slab(box: Box, dim: int, start: int, size: int) -> Box:
    offsets = tuple(o + start if d == dim else o for d, o in enumerate(box.offsets))
    return Box(offsets, tuple(size if d == dim else n for d, n in enumerate(box.sizes)))
