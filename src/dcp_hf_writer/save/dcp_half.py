"""The DCP half: torch's own writer decides names, plan and metadata; the bytes come from the slab.

torch's `FileSystemWriter` clones each tensor whose storage is larger than the tensor, computes a
CRC over every byte that no reader checks, and drops the errors of its threads. So this module
replaces its loop that writes a file, and keeps the rest of the class.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dcp_hf_writer.errors import CheckpointError, CoverageError, PlanningError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.formats.encode_torch_archive import tensor_archive
from dcp_hf_writer.plan.rank_report import DCPFile
from dcp_hf_writer.save.bounce_buffer import MAX_BOUNCE_NBYTES
from dcp_hf_writer.save.tensor_bytes import (
    TensorSource,
    host_bytes,
    row_major_bytes,
    whole_archive,
)
from dcp_hf_writer.storage.posix_outputs import PIECE_NBYTES, OutputFile
from dcp_hf_writer.torch_seam.tensor_forms import plain_of

if TYPE_CHECKING:
    import queue
    from collections.abc import Callable, Sequence

    import torch
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

    from dcp_hf_writer.plan.shared_runs import SharedRun
    from dcp_hf_writer.save.reuse_blocks import BlockReuse
    from dcp_hf_writer.save.share_blocks import BlockSharing

# Buffers collected for one system call; each tensor adds three.
_GROUP = 1000


class SlabFileSystemWriter(FileSystemWriter):
    """torch's writer with another write loop: no clone, no CRC, one thread, and errors raised."""

    def __init__(self, path: str, *, checkpoint_id: str) -> None:
        """Write into `path`; the metadata names `checkpoint_id`, the path after the commit."""
        super().__init__(path, single_file_per_rank=True, sync_files=True, thread_count=1)
        self._final_id = checkpoint_id
        self.files: list[DCPFile] = []
        self.source: TensorSource | None = None
        self.finish_file: Callable[[OutputFile], None] = _sync_and_close
        self.check: Callable[[], None] = lambda: None
        self.count: Callable[[int], object] = lambda _: None
        self.sharing: BlockSharing | None = None
        self.reuse: BlockReuse | None = None
        self.copied_nbytes = MAX_BOUNCE_NBYTES
        """Most bytes of a copy that brings a tensor into row-major order."""
        self._begin: Callable[[str], BytesInOrder] | None = None

    def send_to(self, begin: Callable[[str], BytesInOrder]) -> None:
        """Send the files elsewhere instead of writing them below `path`.

        Args:
            begin: Begins a file of a name; the caller finishes it, or gives it up.
        """
        self._begin = begin

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged: the coordinator has already made a new directory."""
        return plan

    def storage_meta(self) -> StorageMeta:
        """Name the final path of the checkpoint, not the directory that the save writes into."""
        return StorageMeta(checkpoint_id=self._final_id, save_id=self.save_id)

    def _write_data(
        self, planner: SavePlanner, file_queue: queue.Queue[tuple[Any, str, list[WriteItem]]]
    ) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        source = self.source or TensorSource(planner)
        while not file_queue.empty():
            path, name, items = file_queue.get_nowait()
            if self._begin is not None:
                sent = self._begin(name)
                sent.count = self.count
                written = _FileWriter(sent, name, planner, source, self)
                results += written.write(items, self.files)
                continue
            if self.reuse is not None:
                self.reuse.begin_dcp_file(name)
            file = OutputFile(str(path), create=True)
            file.count = self.count
            try:
                written = _FileWriter(file, name, planner, source, self)
                results += written.write(items, self.files)
            except BaseException:
                file.discard()
                raise
            self.finish_file(file)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def prepare_dcp(
    plans: Sequence[SavePlan], writer: StorageWriter | None, target: str
) -> list[SavePlan]:
    """Let the writer of the DCP half prepare the plans of all ranks.

    Args:
        plans: The plans, by rank; our facts in them are left out.
        writer: The user's writer; `None` for ours.
        target: The checkpoint.
    """
    bare = [replace(plan, storage_data=None) for plan in plans]
    used = SlabFileSystemWriter(target, checkpoint_id=target) if writer is None else writer
    return used.prepare_global_plan(bare)


def metadata_writer(
    path: str, checkpoint_id: str, *, rank: int, save_id: str
) -> SlabFileSystemWriter:
    """Return the writer with which the coordinator makes `.metadata`.

    Args:
        path: Where the writer writes.
        checkpoint_id: The path or URL that the metadata names.
        rank: Rank of the coordinator.
        save_id: Id that the metadata names.
    """
    writer = SlabFileSystemWriter(path, checkpoint_id=checkpoint_id)
    writer.save_id = save_id
    writer.set_up_storage_writer(True, rank=rank, use_collectives=True)
    return writer


def _sync_and_close(file: OutputFile) -> None:
    with file:
        file.sync()


class BytesInOrder(Protocol):
    """What a DCP file is written to: a local file, or an object of a store."""

    count: Callable[[int], object]
    """Called with the number of bytes after each write."""

    def write_many(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Write buffers one after another from `offset` on; return the offset after them."""


class _FileWriter:
    """Writes the items of one `.distcp` file, one archive after another."""

    def __init__(
        self,
        file: BytesInOrder,
        name: str,
        planner: SavePlanner,
        source: TensorSource,
        writer: SlabFileSystemWriter,
    ) -> None:
        self._file, self._name = file, name
        self._planner, self._source = planner, source
        self._check, self._sharing, self._reuse = writer.check, writer.sharing, writer.reuse
        self._copied_nbytes = writer.copied_nbytes
        # Copies wait in `_buffers` until the next flush.
        self._flush_nbytes = min(PIECE_NBYTES, 2 * writer.copied_nbytes)
        self._buffers: list[memoryview] = []
        self._gathered = 0
        self._written = 0
        self._position = 0
        self._rest = xxhash.xxh3_64()
        self._ranges: list[tuple[int, int, str]] = []

    def write(self, items: Sequence[WriteItem], files: list[DCPFile]) -> list[WriteResult]:
        blobs = [item for item in items if item.type == WriteItemType.BYTE_IO]
        tensors = [item for item in items if item.type != WriteItemType.BYTE_IO]
        results = [self._add_blob(item) for item in blobs]
        results += [self._add_tensor(item) for item in tensors]
        self._flush()
        files.append(
            DCPFile(self._name, self._position, tuple(self._ranges), self._rest.hexdigest())
        )
        return results

    def _add_blob(self, item: WriteItem) -> WriteResult:
        data = self._pickled(item)
        blob = data.getvalue() if isinstance(data, io.BytesIO) else bytes(data)
        start = self._position
        self._add_rest(blob)
        return self._result(item, start)

    def _pickled(self, item: WriteItem) -> Any:
        """Return the bytes of an object; torch's planner pickles it.

        Raises:
            PlanningError: If it cannot be pickled; names it.
        """
        try:
            return self._planner.resolve_data(item)
        except CheckpointError:
            raise
        except Exception as error:
            known = getattr(self._planner, "state_dict", None)
            value = known.get(item.index.fqn) if isinstance(known, Mapping) else None
            msg = "a value cannot be pickled"
            raise PlanningError(
                msg,
                phase="write",
                fqn=item.index.fqn,
                expected="a tensor, or a value that torch.save can store",
                found=f"{type(value).__name__}: {type(error).__name__}: {error}",
                hint="leave it out of the state dict, or save its state instead",
            ) from error

    def _add_tensor(self, item: WriteItem) -> WriteResult:
        self._check()
        reach("mid dcp")
        tensor = self._source.tensor(item)
        if plain_of(tensor) is None:
            start = self._position
            # The manifest counts the archive among the bytes around the data of tensors.
            self._add_rest(whole_archive(tensor, item.index.fqn))
            return self._result(item, start)
        # A block of a larger tensor is stored in row-major order, as torch's writer stores it.
        kind = tensor if tensor.is_contiguous() else tensor.new_empty(tensor.shape, device="meta")
        before, after = tensor_archive(kind)
        runs = [] if self._sharing is None else self._sharing.runs_of(item, tensor)
        if self._sharing is not None and runs:
            gap = self._sharing.gap_before(runs, self._position + len(before))
            self._add_rest(bytes(gap))
        start = self._position
        self._add_rest(before)
        if tensor.nbytes:
            began = self._position
            self._ranges.append((began, tensor.nbytes, self._add_data(item, tensor, runs)))
        self._add_rest(after)
        return self._result(item, start)

    def _add_data(self, item: WriteItem, tensor: torch.Tensor, runs: Sequence[SharedRun]) -> str:
        """Append the data of a tensor; returns the digest of the data."""
        if tensor.is_contiguous():
            data = host_bytes(tensor)
            whole = self._source.digest(item, data)
            self._add_cloned(data, runs)
            return whole
        digest = xxhash.xxh3_64()
        for data in row_major_bytes(tensor, copied_nbytes=self._copied_nbytes):
            digest.update(data)
            self._add(data)
        return str(digest.hexdigest())

    def _add_cloned(self, data: memoryview, runs: Sequence[SharedRun]) -> None:
        """Append data; share its disk blocks with other files where that works.

        Args:
            data: The data of one tensor.
            runs: Its runs that the export holds too. Without any, the earlier checkpoint may hold
                the data.
        """
        done, data_start = 0, self._position
        parts, clone = self._cloneable(data, runs, data_start)
        for part in parts:
            self._add(data[done : part.offset])
            self._flush()
            done = part.offset
            if clone(part):
                done += part.nbytes
                self._position = self._written = data_start + done
        self._add(data[done:])

    def _cloneable(
        self, data: memoryview, runs: Sequence[SharedRun], data_start: int
    ) -> tuple[Sequence[SharedRun], Callable[[SharedRun], bool]]:
        """Return the parts of data that other files hold, and what clones one of them."""
        file, name = self._file, self._name
        if isinstance(file, OutputFile):
            sharing, reuse = self._sharing, self._reuse
            parts = [] if sharing is None else sharing.parts(runs, data_start)
            if sharing is not None and parts:
                return parts, lambda part: sharing.clone(part, file, data_start)
            part = None if reuse is None else reuse.dcp_part(name, data, data_start)
            if reuse is not None and part is not None:
                return [part], lambda part: reuse.clone_dcp_part(name, part, file)
        return (), lambda _: False

    def _add_rest(self, data: bytes) -> None:
        self._rest.update(data)
        # Only the data of tensors counts as progress, as planned; the write below counts all.
        self._file.count(-len(data))
        self._add(memoryview(data))

    def _add(self, data: memoryview) -> None:
        self._buffers.append(data)
        self._gathered += data.nbytes
        self._position += data.nbytes
        if self._gathered >= self._flush_nbytes or len(self._buffers) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        self._written = self._file.write_many(self._buffers, self._written)
        self._buffers, self._gathered = [], 0

    def _result(self, item: WriteItem, start: int) -> WriteResult:
        length = self._position - start
        return WriteResult(
            index=item.index,
            size_in_bytes=length,
            storage_data=_StorageInfo(self._name, start, length),
        )


def check_results(items: Sequence[WriteItem], results: Sequence[WriteResult], rank: int) -> None:
    """Check that a writer reports every item: torch's own writer drops errors of its threads.

    Raises:
        CoverageError: If an item was not written; the error names its tensor.
    """
    missing = {item.index for item in items} - {result.index for result in results}
    if missing:
        msg = "the DCP writer did not write all items of its plan"
        raise CoverageError(
            msg,
            rank=rank,
            phase="write",
            fqn=min(index.fqn for index in missing),
            expected=f"{len(items)} items",
            found=f"{len(missing)} missing",
            hint="a thread of the writer failed; look for its error in the log",
        )


def digest_file(path: str) -> tuple[int, str]:
    """Return the size of a file in bytes and its xxh3_64, in hex."""
    digest, nbytes = xxhash.xxh3_64(), 0
    with open(path, "rb") as file:
        while data := file.read(PIECE_NBYTES):
            digest.update(data)
            nbytes += len(data)
    return nbytes, str(digest.hexdigest())
