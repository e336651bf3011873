"""Write a DCP checkpoint from tensors that are read a part at a time, in one process."""

from __future__ import annotations

import io
import math
import os
import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta

from dcp_hf_writer.formats.encode_torch_archive import tensor_archive
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME, digests_file_name
from dcp_hf_writer.plan.encode_manifest import WholeFile, encode_manifest
from dcp_hf_writer.plan.rank_digests import pack_report
from dcp_hf_writer.plan.rank_report import DCPFile, RankReport
from dcp_hf_writer.save.owner_process import Owner
from dcp_hf_writer.save.tensor_bytes import host_bytes
from dcp_hf_writer.storage.posix_outputs import (
    OutputFile,
    make_directories,
    sync_directory,
    write_file,
)
from dcp_hf_writer.tensors.boxes import whole
from dcp_hf_writer.tensors.row_major_parts import row_major_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    from dcp_hf_writer.save.commit import StagingDirectory
    from dcp_hf_writer.tensors.boxes import Box, Shape

# Start a new file after this many bytes, so that several readers can share the work.
_FILE_NBYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class ChunkToWrite:
    """A chunk of a tensor, which becomes one archive."""

    index: MetadataIndex
    """FQN and offsets."""
    shape: Shape
    """Its extent."""
    dtype: torch.dtype
    """Its dtype."""


def by_file(chunks: Iterable[ChunkToWrite]) -> Iterator[list[ChunkToWrite]]:
    """Divide chunks into files of about 5 GB."""
    group: list[ChunkToWrite] = []
    nbytes = 0
    for chunk in chunks:
        group.append(chunk)
        nbytes += chunk.dtype.itemsize * math.prod(chunk.shape)
        if nbytes >= _FILE_NBYTES:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


def write_archives(
    path: str,
    chunks: Sequence[ChunkToWrite],
    read: Callable[[ChunkToWrite, Box, torch.Tensor], None],
    buffer: torch.Tensor,
) -> tuple[dict[MetadataIndex, _StorageInfo], DCPFile]:
    """Write one archive per chunk into a new file; durable on return.

    Args:
        path: Path of the file.
        chunks: The chunks, in the order of the file.
        read: Reads a box of a chunk, counted from the start of the chunk, into a tensor.
        buffer: Host memory that all parts pass through, of dtype uint8.

    Returns:
        Where each archive is, and what the manifest says of the file.
    """
    name = os.path.basename(path)
    places: dict[MetadataIndex, _StorageInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    rest, position = xxhash.xxh3_64(), 0
    with OutputFile(path, create=True) as output:
        for chunk in chunks:
            # Only dtype and shape matter here, so nothing reads or writes this memory.
            before, after = tensor_archive(
                torch.empty(chunk.shape, dtype=chunk.dtype, device="cpu")
            )
            rest.update(before)
            output.write(memoryview(before), position)
            start = position + len(before)
            nbytes, digest = _write_data(output, chunk, start, read, buffer)
            ranges.append((start, nbytes, digest))
            rest.update(after)
            output.write(memoryview(after), start + nbytes)
            length = len(before) + nbytes + len(after)
            places[chunk.index] = _StorageInfo(name, position, length)
            position += length
        output.sync()
    return places, DCPFile(name, position, tuple(ranges), rest.hexdigest())


def _write_data(
    output: OutputFile,
    chunk: ChunkToWrite,
    start: int,
    read: Callable[[ChunkToWrite, Box, torch.Tensor], None],
    buffer: torch.Tensor,
) -> tuple[int, str]:
    digest, position, itemsize = xxhash.xxh3_64(), start, chunk.dtype.itemsize
    for box in row_major_parts(whole(chunk.shape), buffer.numel() // itemsize):
        part = buffer[: box.numel * itemsize].view(chunk.dtype).view(box.sizes)
        read(chunk, box, part)
        data = host_bytes(part)
        digest.update(data)
        output.write(data, position)
        position += data.nbytes
    return position - start, digest.hexdigest()


def finish_plain(directory: StagingDirectory, metadata: Metadata, files: Sequence[DCPFile]) -> None:
    """Write metadata and manifest of a checkpoint whose data files are durable."""
    target, owner = directory.target, Owner.me()
    old = metadata.storage_meta or StorageMeta()
    metadata = replace(metadata, storage_meta=replace(old, checkpoint_id=target))
    data = io.BytesIO()
    pickle.dump(metadata, data)
    write_file(os.path.join(directory.path, METADATA_NAME), data.getvalue())
    digest = xxhash.xxh3_64_hexdigest(data.getvalue())
    report = RankReport(0, owner.host, dcp_files=[*files])
    report.nbytes["dcp"] = sum(file.nbytes for file in files)
    digests = pack_report(report, {})
    path = os.path.join(directory.path, digests_file_name(report.rank))
    make_directories(os.path.dirname(path))
    write_file(path, digests)
    sync_directory(os.path.dirname(path))
    manifest = encode_manifest(
        save_id=directory.save_id,
        target=target,
        owner=owner.to_json(),
        step=None,
        subdir="",
        layout=None,
        reports=[report],
        whole_files=[WholeFile(METADATA_NAME, data.getbuffer().nbytes, digest)],
        seconds={},
        export_error=None,
    )
    write_file(os.path.join(directory.path, MANIFEST_NAME), manifest)
    sync_directory(directory.path)
