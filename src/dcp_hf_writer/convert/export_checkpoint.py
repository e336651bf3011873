"""Export a stored DCP checkpoint to a HuggingFace directory, as a live save would have done."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.convert.one_rank_plan import plan_of_stored
from dcp_hf_writer.convert.stored_tensors import DCPTensors, open_dcp_tensors
from dcp_hf_writer.convert.stored_ties import refuse_drifted_ties
from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.formats.names_on_disk import INDEX_NAME
from dcp_hf_writer.plan.coverage import check_coverage
from dcp_hf_writer.plan.global_plan import GlobalPlan, plan_globally
from dcp_hf_writer.plan.rank_report import RankReport
from dcp_hf_writer.preflight import check_options
from dcp_hf_writer.preflight.check_export_place import refuse_export_path
from dcp_hf_writer.save.commit import new_checkpoint
from dcp_hf_writer.save.coordinator import export_files
from dcp_hf_writer.save.export_assets import assets_of
from dcp_hf_writer.save.hf_half import BlockWriter, regions_by_file
from dcp_hf_writer.save.tensor_bytes import chunk_of, digest_of
from dcp_hf_writer.storage.posix_outputs import (
    OutputFile,
    file_system_type,
    make_directories,
    sync_directory,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.layout import Layout, PlannedFile
    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.plan.written_block import WrittenBlock
    from dcp_hf_writer.save.export_assets import Assets
    from dcp_hf_writer.tensors.boxes import ByteRuns

_log = logging.getLogger(__name__)

PART_NBYTES = 64 << 20
"""Most bytes of a tensor that a thread holds; it also has a buffer of `_BOUNCE_NBYTES`."""
_BOUNCE_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote."""

    path: str
    """The HuggingFace directory."""
    files: tuple[str, ...]
    """Names of the files of weights."""
    tensors: int
    """Number of tensors in them."""
    nbytes: int
    """Their size in bytes."""
    left_out: tuple[str, ...]
    """What the state dict holds beside the model: one text each."""
    tied: Mapping[str, str]
    """Names that were left out because they are tied, each with the name that holds the bytes."""


def export_checkpoint(
    path: str,
    target: str,
    export: HFExport,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the model of a DCP checkpoint as a HuggingFace directory.

    Any DCP checkpoint will do, also of stock torch. The layout comes from the functions that plan a
    save, so the files equal those of a save with the same options. Each of `workers` threads holds
    one part of a tensor of at most 64 MiB, and a buffer of 16 MiB. The directory appears in one
    step, when all its bytes are durable.

    Args:
        path: The checkpoint, as a local path or an fsspec URL.
        target: Local path of the directory. If it exists, other files in it stay.
        export: Options of the export. A checkpoint does not record which tensors share memory, so
            `tied` or the specs must say so.
        workers: Number of files that are written at the same time.
        progress: Called with the bytes written and the total bytes, from any thread.

    Raises:
        ConfigError: If an option cannot be used as given.
        PlanningError: If the checkpoint cannot be exported with these options, or if tensors that
            are declared to be tied have different values.
        CoverageError: If the chunks of a tensor do not cover it.
        ReadError: If a file of `path` is missing or cannot be read.
        CorruptCheckpointError: If `path` contradicts itself.
        StorageError: If `target` may not be taken or cannot be written; nothing is left behind.
    """
    refuse_export_path(
        export, what="the export of a checkpoint", hint="its target says where the directory goes"
    )
    target = check_options.local_path(target)
    with open_dcp_tensors(path) as (tensors, metadata):
        plan = plan_of_stored(metadata, max_nbytes=PART_NBYTES)
        assets = assets_of(export)
        planned = plan_globally(
            [plan],
            export,
            options="",
            file_of_key=assets.file_of_key,
            architecture=assets.architecture,
        )
        if planned.layout is None:
            raise PlanningError(
                "the checkpoint holds no weights to export",
                phase="plan",
                path=path,
                found="; ".join(planned.left_out) or "no tensors",
                hint="name the model's entry with the key option",
            )
        refuse_drifted_ties(path, tensors, metadata, export)
        names = {name.partition("/")[2] for name in export_files(planned.layout, assets, export)}
        with new_checkpoint(target, overwrite=False, new_files=names) as directory:
            work = _Export(tensors, planned.layout, plan.items, directory.path, progress)
            work.run(workers)
            _write_whole(directory.path, planned.layout, assets)
    return _exported(target, planned, planned.layout)


def _exported(target: str, plan: GlobalPlan, layout: Layout) -> Exported:
    return Exported(
        path=target,
        files=tuple(file.name for file in layout.files),
        tensors=sum(len(file.keys) for file in layout.files),
        nbytes=sum(file.nbytes for file in layout.files),
        left_out=plan.left_out,
        tied=layout.tied,
    )


def _write_whole(path: str, layout: Layout, assets: Assets) -> None:
    whole = dict(assets.files)
    if layout.index is not None:
        whole[INDEX_NAME] = layout.index
    for name, data in whole.items():
        make_directories(os.path.dirname(os.path.join(path, name)))
        write_file(os.path.join(path, name), data)
    for below, _, _ in os.walk(path, topdown=False):
        sync_directory(below)


class _StoredItems:
    """Reads the tensors of items from a checkpoint; keeps the latest. One thread uses it."""

    def __init__(self, tensors: DCPTensors) -> None:
        self._tensors = tensors
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._held: tuple[WriteItem, torch.Tensor] | None = None

    def tensor(self, item: WriteItem) -> torch.Tensor:
        """Return the tensor of an item; valid until the next call for another item."""
        if self._held is not None and self._held[0] is item:
            return self._held[1]
        box = chunk_of(item)
        assert item.tensor_data is not None
        dtype = item.tensor_data.properties.dtype
        nbytes = box.numel * dtype.itemsize
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        found = self._memory[:nbytes].view(dtype).view(box.sizes)
        if nbytes:
            self._tensors.read(item.index.fqn, box, found)
        self._held = (item, found)
        return found

    def digest(self, _: WriteItem, data: memoryview) -> str:
        """Return the digest of some bytes."""
        return digest_of(data)


@dataclass(slots=True)
class _Export:
    """One run: the files of a layout, from the items of a checkpoint."""

    tensors: DCPTensors
    layout: Layout
    items: Sequence[WriteItem]
    path: str
    progress: Callable[[int, int], None] | None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _total: int = 0
    _done: int = 0

    def run(self, workers: int) -> None:
        """Write all files, then check that the blocks cover every byte."""
        work = regions_by_file(self.items, self.layout.targets)
        self._total = sum(file.nbytes - len(file.header) for file in self.layout.files)
        report = RankReport(0, "")
        jobs = [(file, work.get(number, [])) for number, file in enumerate(self.layout.files)]
        with ThreadPoolExecutor(max(1, workers), thread_name_prefix="dcp-hf-export") as pool:
            for blocks in pool.map(lambda job: self._write(*job), jobs):
                report.blocks += blocks
        check_coverage(self.layout, [report])

    def _write(
        self, file: PlannedFile, blocks: Sequence[tuple[WriteItem, Region]]
    ) -> list[WrittenBlock]:
        source, writer, written = _StoredItems(self.tensors), BlockWriter(), []
        # An item may hold the elements of several tensors of the file. It is read once: all blocks
        # of an item come together.
        by_item: dict[int, list[tuple[WriteItem, Region]]] = {}
        for block in blocks:
            by_item.setdefault(id(block[0]), []).append(block)
        with OutputFile(os.path.join(self.path, file.name), create=True) as output:
            output.set_size(file.nbytes, fs_type=file_system_type(self.path))
            output.write(memoryview(file.header), 0)
            for group in by_item.values():
                written += writer.write_file(
                    output, group, source, check=lambda: None, bounce_nbytes=_BOUNCE_NBYTES
                )
                self._count(region.hf_runs() for _, region in group)
            output.sync()
        return written

    def _count(self, written: Iterable[ByteRuns]) -> None:
        if self.progress is None:
            return
        nbytes = sum(runs.count * runs.nbytes for runs in written)
        with self._lock:
            self._done += nbytes
            self.progress(self._done, self._total)
