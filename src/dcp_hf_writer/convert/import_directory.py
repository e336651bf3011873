"""Import a HuggingFace directory as a DCP checkpoint, which `dcp.load` reads."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_hf_writer.check.plain_dcp_files import ChunkToWrite, by_file, finish_plain, write_archives
from dcp_hf_writer.convert.export_checkpoint import PART_NBYTES
from dcp_hf_writer.convert.stored_tensors import open_hf_tensors
from dcp_hf_writer.errors import ReadError
from dcp_hf_writer.preflight import check_options
from dcp_hf_writer.save.commit import new_checkpoint
from dcp_hf_writer.tensors.dtypes import CASTABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dcp_hf_writer.convert.stored_tensors import HFTensors, StoredKind
    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.plan.rank_report import DCPFile
    from dcp_hf_writer.save.commit import StagingDirectory
    from dcp_hf_writer.tensors.boxes import Box


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import wrote."""

    path: str
    """The checkpoint."""
    tensors: int
    """Number of tensors."""
    nbytes: int
    """Their size in bytes."""
    missing: tuple[str, ...]
    """Names in the specs that the directory does not hold."""


def import_directory(
    path: str,
    target: str,
    specs: Mapping[str, LoadSpec],
    *,
    entry: str = "model",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write the tensors of a HuggingFace directory as a DCP checkpoint with a manifest.

    One process does the work, with a buffer of 64 MiB. Quantised weights are dequantised. The
    checkpoint appears in one step, when all its bytes are durable.

    Args:
        path: The directory, as a local path or an fsspec URL.
        target: Local path of the checkpoint.
        specs: Specs by name within the model. A tensor without a spec keeps its key as its name.
        entry: Entry of the state dict that holds the model; `""` puts its tensors at the top.
        dtype: Dtype of floating-point tensors; `None` keeps their own.
        progress: Called with the bytes written and the total bytes.

    Raises:
        ConfigError: If a path cannot be used.
        ReadError: If there are no weights, or a file cannot be read.
        CorruptCheckpointError: If a file is damaged.
        PlanningError: If the weights are quantised in a way that this package cannot read.
        StorageError: If `target` may not be taken or cannot be written; nothing is left behind.
    """
    target = check_options.local_path(target)
    with open_hf_tensors(path, specs) as tensors:
        if not tensors.kinds:
            raise ReadError("the directory holds no tensor that can be imported", path=path)
        work = _Import(tensors, _named(tensors, entry, dtype), progress)
        with new_checkpoint(target, overwrite=False) as directory:
            work.run(directory, entry)
        missing = tuple(name for name in specs if name not in tensors.kinds)
    return Imported(target, len(work.names), work.total, missing)


def _named(
    tensors: HFTensors, entry: str, dtype: torch.dtype | None
) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    """Return name within the model, shape and dtype of each tensor, by FQN."""
    before = f"{entry}." if entry else ""
    return {
        before + name: (name, kind.shape, _dtype_of(kind, dtype))
        for name, kind in tensors.kinds.items()
    }


def _dtype_of(kind: StoredKind, dtype: torch.dtype | None) -> torch.dtype:
    return kind.dtype if dtype is None or kind.dtype not in CASTABLE else dtype


class _Import:
    """One run: the tensors of a directory, into the files of a checkpoint."""

    def __init__(
        self,
        tensors: HFTensors,
        names: Mapping[str, tuple[str, tuple[int, ...], torch.dtype]],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.names = names
        self.total = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in names.values())
        self._tensors, self._progress, self._done = tensors, progress, 0

    def run(self, directory: StagingDirectory, entry: str) -> None:
        """Write the data files, the metadata and the manifest; all are durable on return."""
        files: list[DCPFile] = []
        buffer = torch.empty(PART_NBYTES, dtype=torch.uint8, device="cpu")
        storage: dict[MetadataIndex, object] = {}
        chunks = (
            ChunkToWrite(MetadataIndex(fqn, torch.Size((0,) * len(shape))), shape, dtype)
            for fqn, (_, shape, dtype) in self.names.items()
        )
        for number, group in enumerate(by_file(chunks)):
            path = os.path.join(directory.path, f"__0_{number}.distcp")
            places, file = write_archives(path, group, self._read, buffer)
            storage |= places
            files.append(file)
        finish_plain(directory, self._metadata(entry, storage), files)

    def _read(self, chunk: ChunkToWrite, box: Box, target: torch.Tensor) -> None:
        self._tensors.read(self.names[chunk.index.fqn][0], box, target)
        self._done += target.nbytes
        if self._progress is not None:
            self._progress(self._done, self.total)

    def _metadata(self, entry: str, storage: dict[MetadataIndex, object]) -> Metadata:
        stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for fqn, (_, shape, dtype) in self.names.items():
            size = torch.Size(shape)
            chunk = ChunkStorageMetadata(torch.Size((0,) * len(shape)), size)
            stored[fqn] = TensorStorageMetadata(TensorProperties(dtype), size, [chunk])
        paths = {
            fqn: (entry, name) if entry else (name,) for fqn, (name, _, _) in self.names.items()
        }
        return Metadata(stored, planner_data=paths, storage_data=storage)
