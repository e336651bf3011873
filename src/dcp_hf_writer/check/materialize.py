"""materialize: rewrite a checkpoint whose weights are stored once, so that torch alone reads it."""

from __future__ import annotations

import io
import math
import os
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from dcp_hf_writer.formats.encode_torch_archive import tensor_archive
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME
from dcp_hf_writer.formats.weights_once_places import StoredOnce
from dcp_hf_writer.load.choose_half import read_dcp_metadata
from dcp_hf_writer.load.dcp_source import DCPSource, Wanted
from dcp_hf_writer.load.read_phase import run_reads
from dcp_hf_writer.load.read_plan import plan_reads
from dcp_hf_writer.plan.encode_manifest import WholeFile, encode_manifest
from dcp_hf_writer.plan.rank_report import DCPFile, RankReport
from dcp_hf_writer.preflight import check_options
from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.owner_process import Owner, new_save_id
from dcp_hf_writer.save.tensor_bytes import host_bytes
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.open_inputs import OpenInputs
from dcp_hf_writer.storage.posix_outputs import OutputFile, sync_directory, write_file
from dcp_hf_writer.tensors.boxes import whole
from dcp_hf_writer.tensors.row_major_parts import row_major_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    from dcp_hf_writer.tensors.boxes import Shape

# Size of the buffer that all tensors pass through.
_BUFFER_NBYTES = 64 << 20

# Start a new file after this many bytes, so that several readers can share the work.
_FILE_NBYTES = 5 * 10**9


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
        directory = StagingDirectory.of(check_options.local_path(target), new_save_id())
        record = directory.create(overwrite=overwrite)
        try:
            with record:
                record.sync()
            _Rewrite(inputs, metadata, directory).run()
            directory.publish(overwrite=overwrite)
        finally:
            directory.remove()


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
        self._report = RankReport(0, Owner.me().to_json().get("host", ""))

    def run(self) -> None:
        storage = dict(self._metadata.storage_data or {})
        names = {w.relative_path for w in storage.values() if isinstance(w, _StorageInfo)}
        for name in sorted(names):
            self._copy(name)
        once = [index for index, where in storage.items() if isinstance(where, StoredOnce)]
        taken = set(names)
        for number, group in enumerate(self._by_file(once)):
            name = _free_name(number, taken)
            storage |= self._write_tensors(name, group)
        self._finish(replace(self._metadata, storage_data=storage))

    def _by_file(self, indices: list[MetadataIndex]) -> Iterator[list[MetadataIndex]]:
        group: list[MetadataIndex] = []
        nbytes = 0
        for index in indices:
            group.append(index)
            nbytes += self._dtype(index).itemsize * math.prod(self._shape(index))
            if nbytes >= _FILE_NBYTES:
                yield group
                group, nbytes = [], 0
        if group:
            yield group

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
        self._report.dcp_files.append(DCPFile(name, position, (), whole.hexdigest()))

    def _write_tensors(
        self, name: str, indices: list[MetadataIndex]
    ) -> dict[MetadataIndex, _StorageInfo]:
        """Write one archive per tensor into a new file; return where each archive is."""
        places: dict[MetadataIndex, _StorageInfo] = {}
        ranges: list[tuple[int, int, str]] = []
        rest, position = xxhash.xxh3_64(), 0
        with self._create(name) as output:
            for index in indices:
                # Only dtype and shape matter here, so nothing reads or writes this memory.
                before, after = tensor_archive(
                    torch.empty(self._shape(index), dtype=self._dtype(index), device="cpu")
                )
                rest.update(before)
                output.write(memoryview(before), position)
                start = position + len(before)
                nbytes, digest = self._write_data(output, index, start)
                ranges.append((start, nbytes, digest))
                rest.update(after)
                output.write(memoryview(after), start + nbytes)
                length = len(before) + nbytes + len(after)
                places[index] = _StorageInfo(name, position, length)
                position += length
            output.sync()
        self._report.dcp_files.append(DCPFile(name, position, tuple(ranges), rest.hexdigest()))
        return places

    def _write_data(self, output: OutputFile, index: MetadataIndex, start: int) -> tuple[int, str]:
        digest, position = xxhash.xxh3_64(), start
        dtype = self._dtype(index)
        box = whole(self._shape(index))
        for one in row_major_parts(box, _BUFFER_NBYTES // dtype.itemsize):
            offsets, sizes = one.offsets, one.sizes
            part = self._buffer[: math.prod(sizes) * dtype.itemsize].view(dtype).view(sizes)
            item = ReadItem(
                LoadItemType.TENSOR,
                dest_index=index,
                dest_offsets=torch.Size(offsets),
                storage_index=index,
                storage_offsets=torch.Size(offsets),
                lengths=torch.Size(sizes),
            )
            fetches, _ = self._source.fetches([Wanted(item, part)])
            run_reads(self._inputs, plan_reads(fetches), [part])
            data = host_bytes(part)
            digest.update(data)
            output.write(data, position)
            position += data.nbytes
        return position - start, digest.hexdigest()

    def _finish(self, metadata: Metadata) -> None:
        target = self._directory.target
        old = metadata.storage_meta or StorageMeta()
        metadata = replace(metadata, storage_meta=replace(old, checkpoint_id=target))
        data = io.BytesIO()
        pickle.dump(metadata, data)
        write_file(self._path(METADATA_NAME), data.getvalue())
        digest = xxhash.xxh3_64_hexdigest(data.getvalue())
        self._report.nbytes["dcp"] = sum(file.nbytes for file in self._report.dcp_files)
        manifest = encode_manifest(
            save_id=self._directory.save_id,
            target=target,
            owner=Owner.me().to_json(),
            step=None,
            subdir="",
            layout=None,
            reports=[self._report],
            whole_files=[WholeFile(METADATA_NAME, data.getbuffer().nbytes, digest)],
            seconds={},
            export_error=None,
        )
        write_file(self._path(MANIFEST_NAME), manifest)
        sync_directory(self._directory.path)

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
