"""Whether DCP's metadata fits the files beside it, and its chunks fit their tensors.

Pure. Nothing of the data is read.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from dcp_hf_writer.digests.problems import Problem
from dcp_hf_writer.formats.names_on_disk import METADATA_NAME
from dcp_hf_writer.formats.stored_once_places import StoredOnce
from dcp_hf_writer.plan.parse_manifest import is_relative_name
from dcp_hf_writer.tensors.boxes import BoxTable, tiling_fault
from dcp_hf_writer.tensors.dtypes import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.distributed.checkpoint.metadata import Metadata

    from dcp_hf_writer.tensors.boxes import Shape


# More cells than this for the blocks of a tensor, and it is not cut as any mesh cuts it: looking at
# each would take memory without end.
_MAX_CELLS = 1 << 20
_CELLS_A_BLOCK = 64

Item = tuple[int, int, str]
"""Start, stop and FQN of what one item of a plan takes of a file."""


def items_by_file(metadata: Metadata) -> dict[str, list[Item]]:
    """Return what the metadata says lies in each file, ascending."""
    found: dict[str, list[Item]] = {}
    for index, info in _storage(metadata).items():
        if not isinstance(info, StoredOnce):
            place = (info.offset, info.offset + info.length, index.fqn)
            found.setdefault(info.relative_path, []).append(place)
    for items in found.values():
        items.sort()
    return found


def fqn_at(items: Sequence[Item], position: int) -> str | None:
    """Return the FQN of the item that holds a byte."""
    at = bisect_right(items, position, key=lambda item: item[0]) - 1
    return items[at][2] if at >= 0 and position < items[at][1] else None


def dcp_problems(metadata: Metadata, sizes: Mapping[str, int]) -> Iterator[Problem]:
    """Yield what is wrong.

    Args:
        metadata: Read by `parse_dcp_metadata`.
        sizes: Size of every file of the checkpoint, by path within it.
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
            expected="a relative path within it",
            found=ascii(name)[:200],
        )
        return
    if name not in sizes:
        what = f"the file is missing; {len(items)} items of the metadata are in it"
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
            what = "the metadata names a file of weights that is not there"
            yield Problem(file=METADATA_NAME, what=what, fqn=fqn, found=ascii(part.path)[:200])
        elif stop > sizes[part.path]:
            what = "weights of the metadata end beyond the end of their file"
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
            yield Problem(file=METADATA_NAME, what=what, fqn=fqn, found=f"one at {list(lost[0])}")
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
    """Say why boxes do not tile a tensor, in bounded memory whatever they are."""
    count = len(boxes.offsets)
    cells = 1
    for d in range(len(shape)):
        borders = {row[d] for row in boxes.offsets}
        borders |= {o[d] + n[d] for o, n in zip(boxes.offsets, boxes.sizes, strict=True)}
        cells *= max(len(borders) - 1, 1)
    if cells > max(_MAX_CELLS, _CELLS_A_BLOCK * count):
        return f"{count} parts whose borders make {cells} cells"
    return tiling_fault(boxes, shape)
