"""The tensors of a stored checkpoint, from either half, one box at a time."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from dcp_hf_writer.load.choose_half import find_place, open_hf_source, read_dcp_metadata
from dcp_hf_writer.load.dcp_source import DCPSource, Wanted
from dcp_hf_writer.load.dequantized_reads import run_dequantized
from dcp_hf_writer.load.hf_source import WantedBlock
from dcp_hf_writer.load.read_phase import run_reads
from dcp_hf_writer.load.read_plan import plan_reads
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.open_inputs import OpenInputs
from dcp_hf_writer.tensors.boxes import Box, intersect

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.distributed.checkpoint.metadata import Metadata

    from dcp_hf_writer.load.hf_source import HFSource
    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.tensors.boxes import Shape


@dataclass(frozen=True, slots=True)
class StoredKind:
    """Shape and dtype of a stored tensor."""

    shape: Shape
    """Global shape."""
    dtype: torch.dtype
    """Stored dtype; of a quantised weight, the dtype that it is dequantised to."""


class StoredTensors(Protocol):
    """The tensors of one half. Thread-safe."""

    @property
    def kinds(self) -> Mapping[str, StoredKind]:
        """Every tensor, by name."""

    def read(self, name: str, box: Box, target: torch.Tensor) -> None:
        """Read a box of a tensor into `target`, a contiguous host tensor of the box's shape.

        Raises:
            ReadError: If a file cannot be read.
            CorruptCheckpointError: If a file contradicts the metadata or its header.
        """


class DCPTensors:
    """The tensors of a DCP checkpoint, by FQN."""

    def __init__(self, inputs: OpenInputs, metadata: Metadata) -> None:
        """Read from files that the caller keeps open."""
        self._inputs, self._source = inputs, DCPSource(inputs, metadata)
        self._chunks: dict[str, list[tuple[Box, MetadataIndex]]] = {}
        self.kinds: dict[str, StoredKind] = {}
        """Every tensor, by FQN."""
        for fqn, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.kinds[fqn] = StoredKind(tuple(entry.size), entry.properties.dtype)
                self._chunks[fqn] = [
                    (Box(tuple(c.offsets), tuple(c.sizes)), MetadataIndex(fqn, c.offsets, number))
                    for number, c in enumerate(entry.chunks)
                ]

    def read(self, name: str, box: Box, target: torch.Tensor) -> None:
        """Read a box of a tensor, from as many chunks as it lies in."""
        wanted = []
        for chunk, index in self._chunks[name]:
            common = intersect(box, chunk)
            if common is not None:
                wanted.append(_wanted(index, common, chunk, box, target))
        fetches, whole = self._source.fetches(wanted)
        run_reads(self._inputs, plan_reads(fetches), [one.target for one in wanted], readers=1)
        for read in whole:
            self._source.load_whole(read)


def _wanted(
    index: MetadataIndex, common: Box, chunk: Box, box: Box, target: torch.Tensor
) -> Wanted:
    starts = [at - first for at, first in zip(common.offsets, box.offsets, strict=True)]
    part = target
    for dim, (start, length) in enumerate(zip(starts, common.sizes, strict=True)):
        part = part.narrow(dim, start, length)
    within = [at - first for at, first in zip(common.offsets, chunk.offsets, strict=True)]
    item = ReadItem(
        LoadItemType.TENSOR,
        dest_index=MetadataIndex(index.fqn, common.offsets),
        dest_offsets=torch.Size(starts),
        storage_index=index,
        storage_offsets=torch.Size(within),
        lengths=torch.Size(common.sizes),
    )
    return Wanted(item, part)


class HFTensors:
    """The tensors of a HuggingFace directory, by the names of `specs`, or by their keys."""

    def __init__(self, inputs: OpenInputs, source: HFSource) -> None:
        """Read from files that the caller keeps open."""
        self._inputs, self._source = inputs, source
        self.kinds: dict[str, StoredKind] = {
            name: StoredKind(*source.kind(name)) for name in source.names()
        }
        """Every tensor, by name."""

    def read(self, name: str, box: Box, target: torch.Tensor) -> None:
        """Read a box of a tensor."""
        jobs = self._source.jobs([WantedBlock(name, box, target)])
        for padded in jobs.padded:
            padded.zero_()
        run_reads(self._inputs, plan_reads(jobs.fetches), [target], readers=1)
        run_dequantized(self._inputs, self._source.directory, jobs.computed)


@contextmanager
def open_dcp_tensors(path: str) -> Iterator[tuple[DCPTensors, Metadata]]:
    """Open the DCP half of a checkpoint, for the body of the `with` statement.

    Raises:
        ReadError: If there is none, or a file cannot be read.
        CorruptCheckpointError: If the metadata is damaged.
    """
    files = open_directory(path)
    metadata = read_dcp_metadata(files)
    with OpenInputs(files) as inputs:
        yield DCPTensors(inputs, metadata), metadata


@contextmanager
def open_hf_tensors(path: str, specs: Mapping[str, LoadSpec]) -> Iterator[HFTensors]:
    """Open the HuggingFace half of a checkpoint, for the body of the `with` statement.

    Raises:
        ReadError: If there is none, or a file cannot be read.
        CorruptCheckpointError: If a file is damaged.
        PlanningError: If it is quantised in a way that this package cannot read.
    """
    place = find_place(path, "hf", None, with_manifest=False)
    source, inputs = open_hf_source(place, specs, names=tuple(specs))
    with inputs:
        yield HFTensors(inputs, source)
