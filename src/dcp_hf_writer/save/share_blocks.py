"""Shared disk blocks: a tensor that both halves store is written to the disk once.

A rank first writes its ranges of the output files. Then it clones the disk blocks that a tensor
fills there into its `.distcp` file, and writes only the edges and the bytes of the archive. Both
files have the same bytes as without sharing, except for a gap of zeros before an archive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.plan.shared_runs import SharedRun, long_runs, phase_of, whole_blocks
from dcp_hf_writer.save.hf_half import way_of
from dcp_hf_writer.tensors.strided_copies import runtime_view

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.storage.block_clones import CloneSource
    from dcp_hf_writer.storage.posix_outputs import OutputFile


class BlockSharing:
    """What one rank can share in one save."""

    def __init__(
        self,
        work: Mapping[int, Sequence[tuple[WriteItem, Region]]],
        source: CloneSource,
    ) -> None:
        """Group the regions by the item that they belong to.

        Args:
            work: The blocks of each output file that this rank has written.
            source: Clones from these files.
        """
        self._source = source
        self._regions: dict[MetadataIndex, list[tuple[int, Region]]] = {}
        for number, blocks in work.items():
            for item, region in blocks:
                self._regions.setdefault(item.index, []).append((number, region))

    @property
    def nbytes(self) -> int:
        """Bytes that both halves share so far."""
        return self._source.shared_nbytes

    def runs_of(self, item: WriteItem, tensor: torch.Tensor) -> list[SharedRun]:
        """Return the runs of a tensor that its output files hold too, by their place in its data.

        Args:
            item: Item of the DCP plan.
            tensor: Its tensor; without runs if it is not contiguous.
        """
        if not tensor.is_contiguous():
            return []
        runs = []
        for number, region in self._regions.get(item.index, ()):
            if way_of(tensor, region) == "direct":
                view = runtime_view(tensor, region.copy)
                first = int(view.storage_offset() - tensor.storage_offset()) * tensor.itemsize
                runs += long_runs(region.hf_runs(), file=number, offset=first)
        return sorted(runs, key=lambda run: run.offset)

    def gap_before(self, runs: Sequence[SharedRun], data_start: int) -> int:
        """Return how many bytes to leave free before an archive, so that most of it can be shared.

        Args:
            runs: The runs of the tensor.
            data_start: Where its data would start in the `.distcp` file without a gap.
        """
        phase = phase_of(runs, self._source.block_nbytes)
        return 0 if phase is None else (phase - data_start) % self._source.block_nbytes

    def parts(self, runs: Sequence[SharedRun], data_start: int) -> list[SharedRun]:
        """Return the parts of the runs that fill disk blocks in both files, ascending."""
        nbytes = self._source.block_nbytes
        cut = (whole_blocks(run, data_start=data_start, block_nbytes=nbytes) for run in runs)
        return [part for part in cut if part is not None]

    def clone(self, part: SharedRun, into: OutputFile, data_start: int) -> bool:
        """Clone one part into the `.distcp` file; returns whether the file system did so."""
        reach("before clone")
        return self._source.clone(
            part.file, part.start, part.nbytes, into, data_start + part.offset
        )

    def close(self) -> None:
        """Close the output files."""
        self._source.close()
