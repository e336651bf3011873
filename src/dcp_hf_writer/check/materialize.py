"""materialize: rewrite a checkpoint whose weights are stored once, so that torch alone reads it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from dcp_hf_writer.check.plain_dcp_files import (
    ChunkToWrite,
    by_file,
    finish_plain,
    write_archives,
)
from dcp_hf_writer.formats.weights_once_places import StoredOnce
from dcp_hf_writer.load.choose_half import read_dcp_metadata
from dcp_hf_writer.load.dcp_source import DCPSource, Wanted
from dcp_hf_writer.load.read_phase import run_reads
from dcp_hf_writer.load.read_plan import plan_reads
from dcp_hf_writer.plan.rank_report import DCPFile
from dcp_hf_writer.preflight import check_options
from dcp_hf_writer.save.commit import new_checkpoint
from dcp_hf_writer.save.tensor_bytes import host_bytes
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.open_inputs import OpenInputs
from dcp_hf_writer.storage.posix_outputs import OutputFile

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    from dcp_hf_writer.save.commit import StagingDirectory
    from dcp_hf_writer.tensors.boxes import Box, Shape

# Size of the buffer that all tensors pass through.
_BUFFER_NBYTES = 64 << 20


def materialize(
    path: str | os.PathLike[str], target: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Rewrite a checkpoint whose weights are stored once as a plain DCP checkpoint.

    The result holds everything that the DCP half of `path` describes, and `dcp.load` reads it
    without this package. The export is not copied; it stays complete in `path`. One process does
    the work. Its buffer is 64 MiB, whatever the size of a tensor. It publishes the result in one
    step, as a save does. If `path` was saved with `weights="both"`, its DCP files are copied
    unchanged.

    Args:
        path: The checkpoint to read, as a local path or an fsspec URL.
        target: Local path of the new checkpoint. If it exists, files in it that no checkpoint made
            stay.
        overwrite: Replace the files of an existing checkpoint in the step that publishes.

    Raises:
        ConfigError: If `path` is not a path or URL, or `target` is not a local path.
        ReadError: If a file of `path` is missing or cannot be read.
        CorruptCheckpointError: If `path` contradicts itself.
        StorageError: If `target` may not be taken or cannot be written; nothing is left behind.
    """
    with OpenInputs(open_directory(path, None)) as inputs:
        metadata = read_dcp_metadata(inputs.files)
        with new_checkpoint(check_options.local_path(target), overwrite=overwrite) as directory:
            _Rewrite(inputs, metadata, directory).run()


class _Rewrite:
    """One run of `materialize`, from one directory to the other."""

    def __init__(self, inputs: OpenInputs, metadata: Metadata, directory: StagingDirectory) -> None:
        self._inputs = inputs
        self._metadata = metadata
        self._source = DCPSource(inputs, metadata)
        self._directory = directory
        self._buffer = torch.empty(_BUFFER_NBYTES, dtype=torch.uint8, device="cpu")
        self._shapes = {
            (fqn, chunk.offsets): tuple(chunk.sizes)
            for fqn, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
        }
        self._files: list[DCPFile] = []

    def run(self) -> None:
        storage = dict(self._metadata.storage_data or {})
        names = {w.relative_path for w in storage.values() if isinstance(w, _StorageInfo)}
        for name in sorted(names):
            self._copy(name)
        once = [index for index, where in storage.items() if isinstance(where, StoredOnce)]
        taken = set(names)
        chunks = (ChunkToWrite(one, self._shape(one), self._dtype(one)) for one in once)
        for number, group in enumerate(by_file(chunks)):
            path = self._path(_free_name(number, taken))
            places, file = write_archives(path, group, self._read, self._buffer)
            storage |= places
            self._files.append(file)
        finish_plain(self._directory, replace(self._metadata, storage_data=storage), self._files)

    def _copy(self, name: str) -> None:
        """Copy a file unchanged."""
        whole, position = xxhash.xxh3_64(), 0
        with self._inputs.use(name) as file, self._create(name) as output:
            view = host_bytes(self._buffer)
            while position < file.nbytes:
                part = view[: min(len(view), file.nbytes - position)]
                file.read_into([part], position)
                whole.update(part)
                output.write(part, position)
                position += len(part)
            output.sync()
        self._files.append(DCPFile(name, position, (), whole.hexdigest()))

    def _read(self, chunk: ChunkToWrite, box: Box, target: torch.Tensor) -> None:
        item = ReadItem(
            LoadItemType.TENSOR,
            dest_index=chunk.index,
            dest_offsets=torch.Size(box.offsets),
            storage_index=chunk.index,
            storage_offsets=torch.Size(box.offsets),
            lengths=torch.Size(box.sizes),
        )
        fetches, _ = self._source.fetches([Wanted(item, target)])
        run_reads(self._inputs, plan_reads(fetches), [target])

    def _create(self, name: str) -> OutputFile:
        return OutputFile(self._path(name), create=True)

    def _path(self, name: str) -> str:
        return os.path.join(self._directory.path, name)

    def _shape(self, index: MetadataIndex) -> Shape:
        assert index.offset is not None
        return self._shapes[index.fqn, index.offset]

    def _dtype(self, index: MetadataIndex) -> torch.dtype:
        entry = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.properties.dtype


def _free_name(number: int, taken: set[str]) -> str:
    """Return an unused name for a new file, similar to the names of torch's own files."""
    name = f"__once_{number}.distcp"
    while name in taken:
        name = f"_{name}"
    taken.add(name)
    return name
