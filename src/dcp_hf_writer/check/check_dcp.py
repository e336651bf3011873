"""Check DCP's metadata: its items against the files, and its chunks against their tensors.

Pure. It reads no tensor data.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from dcp_hf_writer.digests.problems import Problem
from dcp_hf_writer.formats.names_on_disk import METADATA_NAME
from dcp_hf_writer.formats.weights_once_places import StoredOnce
from dcp_hf_writer.plan.parse_manifest import is_relative_name
from dcp_hf_writer.tensors.boxes import BoxTable, tiling_fault
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.distributed.checkpoint.metadata import Metadata

    from dcp_hf_writer.tensors.boxes import Shape


# The borders of the chunks cut a tensor into cells. No mesh makes more cells than this, but a
# hostile file could make so many that checking each of them would exhaust memory.
_MAX_CELLS = 1 << 20
_CELLS_A_BLOCK = 64

Item = tuple[int, int, str]
"""Start and stop in bytes, and FQN, of one item in a file."""


def items_by_file(metadata: Metadata) -> dict[str, list[Item]]:
    """Return the items that the metadata places in each file, in ascending order."""
    found: dict[str, list[Item]] = {}
    for index, info in _storage(metadata).items():
        if not isinstance(info, StoredOnce):
            place = (info.offset, info.offset + info.length, index.fqn)
            found.setdefault(info.relative_path, []).append(place)
    for items in found.values():
        items.sort()
    return found


def fqn_at(items: Sequence[Item], position: int) -> str | None:
    """Return the FQN of the item that contains the byte at `position`; `None` if no item does."""
    at = bisect_right(items, position, key=lambda item: item[0]) - 1
    return items[at][2] if at >= 0 and position < items[at][1] else None


def dcp_problems(metadata: Metadata, sizes: Mapping[str, int]) -> Iterator[Problem]:
    """Yield the problems of DCP's metadata.

    Args:
        metadata: The metadata, as `parse_metadata` returned it.
        sizes: Size in bytes of every file of the checkpoint, by path within it.
    """
    for name, items in items_by_file(metadata).items():
        yield from _file_problems(name, items, sizes)
    for index, info in _storage(metadata).items():
        if isinstance(info, StoredOnce):
            yield from _once_problems(index.fqn, info, sizes)
    yield from _tensor_problems(metadata)


def _storage(metadata: Metadata) -> Mapping[MetadataIndex, Any]:
    return metadata.storage_data or {}


def _file_problems(name: str, items: Sequence[Item], sizes: Mapping[str, int]) -> Iterator[Problem]:
    if not is_relative_name(name):
        yield Problem(
            file=METADATA_NAME,
            what="the metadata names a file outside the checkpoint",
            fqn=items[0][2],
            expected="a relative path within the checkpoint",
            found=ascii(name)[:200],
        )
        return
    if name not in sizes:
        what = f"the file is missing; the metadata places {len(items)} items in it"
        yield Problem(file=name, what=what, fqn=items[0][2])
        return
    reached = 0
    for start, stop, fqn in items:
        if stop > sizes[name]:
            found = f"{sizes[name]} bytes"
            what = "an item of the metadata ends beyond the end of its file"
            yield Problem(file=name, what=what, fqn=fqn, start=start, stop=stop, found=found)
        if start < reached and start < stop:
            what = "items of the metadata overlap in their file"
            yield Problem(file=name, what=what, fqn=fqn, start=start, stop=min(stop, reached))
        reached = max(reached, stop)


def _once_problems(fqn: str, info: StoredOnce, sizes: Mapping[str, int]) -> Iterator[Problem]:
    for part in info.parts:
        stop = part.start + math.prod(part.shape) * ITEMSIZE[part.dtype]
        if not is_relative_name(part.path) or part.path not in sizes:
            what = "the metadata names a weights file that does not exist"
            yield Problem(file=METADATA_NAME, what=what, fqn=fqn, found=ascii(part.path)[:200])
        elif stop > sizes[part.path]:
            what = "the weights end beyond the end of their file"
            yield Problem(
                file=part.path, what=what, key=part.key, fqn=fqn, start=part.start, stop=stop
            )


def _tensor_problems(metadata: Metadata) -> Iterator[Problem]:
    known = _storage(metadata)
    for fqn, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            if MetadataIndex(fqn) not in known:
                what = "the metadata does not say where an object is"
                yield Problem(file=METADATA_NAME, what=what, fqn=fqn)
            continue
        offsets = tuple(tuple(chunk.offsets) for chunk in entry.chunks)
        sizes = tuple(tuple(chunk.sizes) for chunk in entry.chunks)
        lost = [at for at in offsets if MetadataIndex(fqn, at) not in known]
        if lost:
            what = "the metadata does not say where a chunk is"
            yield Problem(
                file=METADATA_NAME,
                what=what,
                fqn=fqn,
                found=f"no place for the chunk at {list(lost[0])}",
            )
        fault = tiling_fault_within(BoxTable(offsets, sizes), tuple(entry.size))
        if fault is not None:
            yield Problem(
                file=METADATA_NAME,
                what="the chunks of a tensor do not cover it exactly once",
                fqn=fqn,
                expected=f"chunks that tile {list(entry.size)}",
                found=fault,
            )


def tiling_fault_within(boxes: BoxTable, shape: Shape) -> str | None:
    """Return why boxes do not tile a tensor; `None` if they do. Memory is bounded for any boxes."""
    count = len(boxes.offsets)
    cells = 1
    for d in range(len(shape)):
        borders = {row[d] for row in boxes.offsets}
        borders |= {o[d] + n[d] for o, n in zip(boxes.offsets, boxes.sizes, strict=True)}
        cells *= max(len(borders) - 1, 1)
    if cells > max(_MAX_CELLS, _CELLS_A_BLOCK * count):
        return f"{count} parts that cut the tensor into {cells} cells, too many to check"
    return tiling_fault(boxes, shape)
