"""The write phase of a rank: its DCP file and its ranges of the output files, in rotated order.

The kernel locks a file during each buffered write. Ranks of a host that go through the same files
in the same order would wait for each other. So each rank starts at another place in its list of
files. The list includes the rank's DCP file, which no other rank writes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch.distributed.checkpoint.planner import WriteItemType

from dcp_hf_writer.errors import CheckpointError, WriteError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.formats.names_on_disk import digests_file_name
from dcp_hf_writer.plan.rank_digests import most_nbytes, pack_report
from dcp_hf_writer.save.agree_on_links import agree_on_links
from dcp_hf_writer.save.bounce_buffer import bounce_nbytes_of
from dcp_hf_writer.save.dcp_half import (
    SlabFileSystemWriter,
    check_results,
)
from dcp_hf_writer.save.digests_output import DigestsOutput
from dcp_hf_writer.save.exchanged_half import ExchangedHalf
from dcp_hf_writer.save.export_failures import FATAL, export_error
from dcp_hf_writer.save.given_writer import run_given_writer
from dcp_hf_writer.save.hf_half import (
    BlockWriter,
    is_interleaved,
    nbytes_of_blocks,
    regions_by_file,
)
from dcp_hf_writer.save.host_meeting import HostMeeting
from dcp_hf_writer.save.rank_results import (
    begun_report,
    nbytes_of_items,
    report_result,
    stored_once_results,
    without_results,
)
from dcp_hf_writer.save.reuse_blocks import BlockReuse
from dcp_hf_writer.save.row_writes import write_rows
from dcp_hf_writer.save.share_blocks import BlockSharing
from dcp_hf_writer.save.tensor_bytes import TensorSource
from dcp_hf_writer.save.whole_rows import nbytes_of_shares, take_rows
from dcp_hf_writer.staging.neighbour_slabs import NeighbourSlabs
from dcp_hf_writer.storage.block_clones import PROBE, CloneSource
from dcp_hf_writer.storage.posix_outputs import OutputFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
    from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.plan.global_plan import RankPlan
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.commit import StagingDirectory
    from dcp_hf_writer.save.previous_files import PreviousFiles
    from dcp_hf_writer.save.save_target import Half
    from dcp_hf_writer.save.whole_rows import RowShare
    from dcp_hf_writer.storage.output_fsync import OpenFiles
    from dcp_hf_writer.storage.write_slots import WriteSlots

    Blocks = Sequence[tuple[WriteItem, Region]]

_log = logging.getLogger(__name__)

# The block writer of the latest save, kept to reuse its buffer. A save that runs at the same time
# as another one makes its own.
_idle_blocks: list[BlockWriter] = []


@dataclass(slots=True)
class WritePhase:
    """The write phase of one rank."""

    attempt: Attempt
    directory: StagingDirectory
    plan: SavePlan
    """The final plan; its `storage_data` comes from the DCP writer."""
    own: RankPlan
    planner: SavePlanner
    dcp_writer: StorageWriter | None
    """The user's writer for the DCP half; `None` for ours."""
    slots: WriteSlots
    subdir: str
    host_budget_bytes: int
    """Memory that the rank may use in addition to the staged copy."""
    share: str = "auto"
    """`"auto"` lets the halves share disk blocks where the file system can; `"off"` does not."""
    half: Half = "both"
    """Which half to write."""
    previous: PreviousFiles | None = None
    """Files of an earlier checkpoint that may be used again; `None` for none."""
    block_nbytes: int | None = field(default=None, init=False)
    """Size of the disk blocks that the halves share; `None` if they share none."""
    blocks: BlockWriter = field(default_factory=BlockWriter, init=False)
    """Writes the blocks of this save; no other save uses it at the same time."""
    slabs: NeighbourSlabs = field(default_factory=NeighbourSlabs, init=False)
    """Slabs of other ranks of the host, mapped while this phase runs."""
    reuse: BlockReuse | None = field(default=None, init=False)
    """Compares blocks with those files."""

    def run(self) -> list[WriteResult]:
        """Write everything, make it durable, and report.

        Returns:
            The results of the DCP half, and one extra result that carries the rank's report.

        Raises:
            CheckpointError: If the DCP half failed, or the save was given up. The report carries
                errors of the export instead.
        """
        with contextlib.suppress(IndexError):
            self.blocks = _idle_blocks.pop()
        try:
            with ExitStack() as opened:
                return self._run(opened)
        finally:
            self.slabs.close()
            if self.reuse is not None:
                self.reuse.close()
            # Also after a failure, or the next save would have to fault in a new buffer.
            _idle_blocks[:] = [self.blocks]

    def _run(self, opened: ExitStack) -> list[WriteResult]:
        attempt = self.attempt
        report = begun_report(attempt)
        files = attempt.open_files()
        source = TensorSource(self.planner)
        results: list[WriteResult] = []
        tensors = [i for i in self.plan.items if i.type != WriteItemType.BYTE_IO]
        work = regions_by_file(tensors, {} if self.half == "dcp" else self.own.targets)
        left_out = stored_once_results(self.own, tensors, subdir=self.subdir)
        if left_out:
            self.plan = without_results(self.plan, left_out)
        attempt.byte_count.plan(self._planned_nbytes(work))
        self.block_nbytes = self._shared_block_nbytes()
        # The DCP half shares the blocks of files that are not written, and these have digests too.
        of_export = dict(work)
        self._reuse_files(work, source, report)
        rows = self._take_rows(work, source)
        shares = self.slots.is_shared_by_halves()
        digests = self._begin_digests(opened, of_export, rows, report)
        reach("before slot")
        if attempt.cell_nbytes and self.half != "dcp":
            self._exchange(work, files, source, report, half="dcp" if shares else "hf")
            work = {}
        with ExitStack() as held:
            if shares:
                self._hold(held, "dcp")
            jobs = self._jobs(sorted({*work, *rows}), is_dcp_last=self.block_nbytes is not None)
            exports = [job for job in jobs if job is not None]
            settled = set(exports[len(exports) - len(exports) // max(self.own.host_size, 1) :])
            for job in jobs:
                with ExitStack() as held_by_half:
                    if not shares:
                        self._hold(held_by_half, "dcp" if job is None else "hf")
                    if job is None:
                        results = self._write_dcp(files, source, report, of_export)
                    elif report.export_error is None:
                        # Defer the fsync of a file whose pages other ranks fill too: otherwise the
                        # device writes such a page once for each rank. The other ranks have already
                        # written the last files of this rank's rotation, so these need no deferral.
                        blocks = work.get(job, ())
                        defer = job not in settled and is_interleaved(blocks)
                        part = blocks, rows.get(job, ())
                        self._write_export(job, part, files, source, report, defer=defer)
                    if not shares:
                        files.sync_kept()
                        self._join(files, report)
            self._end_digests(digests, files, report)
            reach("before fsync")
            files.sync_kept()
            with attempt.timed("sync"):
                self._join(files, report)
        reach("after fsync")
        attempt.close_files()
        self._sum_up(report, results)
        return [*results, *left_out, report_result(report)]

    def _sum_up(self, report: RankReport, results: Iterable[WriteResult]) -> None:
        report.seconds = dict(self.attempt.seconds)
        dcp_nbytes = sum(result.size_in_bytes for result in results)
        report.nbytes = {"hf": 0, "shared": 0, **report.nbytes, "dcp": dcp_nbytes}
        if self.reuse is not None:
            report.nbytes["reused"] = self.reuse.nbytes

    def _reuse_files(
        self,
        work: dict[int, list[tuple[WriteItem, Region]]],
        source: TensorSource,
        report: RankReport,
    ) -> None:
        """Take the output files out of `work` that an earlier checkpoint holds with equal bytes."""
        attempt, previous = self.attempt, self.previous
        if previous is None:
            return
        self.blocks.bounce.resize(bounce_nbytes_of(self.host_budget_bytes))
        self.reuse = reuse = BlockReuse(
            previous,
            source,
            self.blocks.bounce,
            block_nbytes=PROBE.block_nbytes(self.directory.path),
            check=attempt.check,
        )
        if not previous.numbers:
            return
        reach("before comparison")
        with attempt.timed("reuse"):
            equal = reuse.equal_files(work)
            linked = agree_on_links(
                attempt, self.directory.save_id, equal.keys(), self._put_links_in_place
            )
        for number in linked:
            nbytes = nbytes_of_blocks(work.pop(number, ()))
            report.blocks += equal[number]
            report.nbytes["hf"] = report.nbytes.get("hf", 0) + nbytes
            reuse.nbytes += nbytes
            attempt.byte_count.add(nbytes)

    def _put_links_in_place(self, numbers: frozenset[int]) -> frozenset[int]:
        plan = self.attempt.global_plan
        if self.previous is None or plan is None or plan.layout is None:
            return frozenset()
        files = self.attempt.open_files()
        return self.previous.take(numbers, plan.layout, files, subdir=self.subdir)

    def _exchange(
        self,
        work: Mapping[int, Blocks],
        files: OpenFiles,
        source: TensorSource,
        report: RankReport,
        *,
        half: Literal["dcp", "hf"],
    ) -> None:
        """Write the export cell by cell; without a slot whenever this rank waits for others."""
        ExchangedHalf(
            self.attempt,
            self.directory,
            self.own,
            self.slots,
            half,
            self.subdir,
            self.host_budget_bytes,
        ).write(work, files, source, report)
        if half == "hf":
            with ExitStack() as held:
                self._hold(held, half)
                files.sync_kept()
                self._join(files, report)

    def _take_rows(
        self, work: dict[int, list[tuple[WriteItem, Region]]], source: TensorSource
    ) -> dict[int, list[RowShare]]:
        """Take out of `work` what the ranks of this host write as whole rows.

        Without a slot: this rank waits for the others.
        """
        attempt, own = self.attempt, self.own
        is_meant = attempt.gathers_rows and own.shares_rows and self.half != "dcp"
        if attempt.member.rendezvous is None or not is_meant:
            return {}
        before = sum(map(nbytes_of_blocks, work.values()))
        bounce_nbytes = bounce_nbytes_of(self.host_budget_bytes)
        with (
            attempt.timed("row wait"),
            HostMeeting.of(attempt, own, self.directory.save_id) as meeting,
        ):
            rows = take_rows(meeting, self.slabs, work, source, bounce_nbytes=bounce_nbytes)
        after = sum(map(nbytes_of_blocks, work.values())) + nbytes_of_shares(rows.values())
        attempt.byte_count.plan(after - before)
        return rows

    def _planned_nbytes(self, work: Mapping[int, Blocks]) -> int:
        """Return the bytes of tensors that this rank will write to both halves."""
        dcp_nbytes = 0 if self.half == "hf" else nbytes_of_items(self.plan.items)
        return dcp_nbytes + sum(map(nbytes_of_blocks, work.values()))

    def _begin_digests(
        self,
        opened: ExitStack,
        work: Mapping[int, Blocks],
        rows: Mapping[int, Sequence[RowShare]],
        report: RankReport,
    ) -> DigestsOutput | None:
        """Make this rank's digests file, with room for all digests.

        Returns:
            `None` if it cannot be made in the place of the export alone: the report then says why.

        Raises:
            StorageError: If there is no space.
        """
        loops = sum(len(one.copy.loops) for of_file in work.values() for _, one in of_file)
        blocks = sum(map(len, work.values()))
        for share in itertools.chain.from_iterable(rows.values()):
            blocks, loops = blocks + share.most_blocks, loops + share.most_loops
        nbytes = most_nbytes(blocks=blocks, loops=loops, ranges=len(self.plan.items))
        path = os.path.join(self.directory.path, digests_file_name(self.attempt.rank))
        try:
            return opened.enter_context(DigestsOutput(path, nbytes))
        except WriteError as error:
            self._note_lost_digests(error, report)
            return None

    def _end_digests(
        self, output: DigestsOutput | None, files: OpenFiles, report: RankReport
    ) -> None:
        """Write this rank's digests; the report keeps what the coordinator needs.

        Raises:
            StorageError: If the file cannot be written.
        """
        data = pack_report(report, self.own.targets)
        if output is not None:
            try:
                output.write(data, files)
            except WriteError as error:
                self._note_lost_digests(error, report)

    def _note_lost_digests(self, error: WriteError, report: RankReport) -> None:
        # An error in the place of the export alone must not cost the DCP half.
        if self.half != "hf":
            raise error
        report.export_error = report.export_error or self._export_error(error, error.path or "")

    def _jobs(self, files: Sequence[int], *, is_dcp_last: bool) -> list[int | None]:
        """Return this rank's files in rotated order; `None` stands for its DCP file."""
        own_dcp: list[int | None] = [] if self.half == "hf" else [None]
        jobs: list[int | None] = [*files] if is_dcp_last else [*own_dcp, *files]
        start = self.own.host_rank * len(jobs) // max(self.own.host_size, 1)
        rotated = jobs[start:] + jobs[:start]
        return [*rotated, *own_dcp] if is_dcp_last else rotated

    def _shared_block_nbytes(self) -> int | None:
        """Return the size of the disk blocks that the halves share; `None` if they share none."""
        if (
            self.share == "off"
            or self.half != "both"
            or self.attempt.cell_nbytes
            or self.dcp_writer is not None
            or not self.own.targets
        ):
            return None
        return PROBE.block_nbytes(self.directory.path)

    def _sharing(self, work: Mapping[int, Blocks], report: RankReport) -> BlockSharing | None:
        # After an error of the export, its files may lack bytes.
        if self.block_nbytes is None or report.export_error is not None:
            return None
        paths = [os.path.join(self.directory.path, self.subdir, n) for n, _ in self.own.files]
        return BlockSharing(work, CloneSource(paths, block_nbytes=self.block_nbytes))

    def _hold(self, held: ExitStack, half: str) -> None:
        with self.attempt.timed("slot wait"):
            held.enter_context(
                self.slots.hold(
                    self.directory.path,
                    "dcp" if half == "dcp" else "hf",
                    deadline=self.attempt.context.deadline,
                )
            )

    def _join(self, files: OpenFiles, report: RankReport) -> None:
        export = os.path.join(self.directory.path, self.subdir, "")
        try:
            for path, error in files.join(deadline=self.attempt.context.deadline):
                if not path.startswith(export) or not isinstance(error, Exception):
                    raise error
                if report.export_error is None:
                    report.export_error = self._export_error(error, path)
        except CheckpointError as error:
            error.rank = self.attempt.rank
            raise

    def _write_dcp(
        self,
        files: OpenFiles,
        source: TensorSource,
        report: RankReport,
        work: Mapping[int, Blocks],
    ) -> list[WriteResult]:
        attempt = self.attempt
        with attempt.timed("write dcp"):
            try:
                results = (
                    self._write_own_dcp(files, source, report, self._sharing(work, report))
                    if self.dcp_writer is None
                    else run_given_writer(
                        self.dcp_writer,
                        self.plan,
                        self.planner,
                        path=self.directory.path,
                        is_coordinator=attempt.member.is_coordinator,
                        rank=attempt.rank,
                    )
                )
            except CheckpointError as error:
                error.rank = attempt.rank
                raise
            check_results(self.plan.items, results, attempt.rank)
            if self.dcp_writer is not None:
                attempt.byte_count.add(sum(result.size_in_bytes for result in results))
        return results

    def _write_own_dcp(
        self,
        files: OpenFiles,
        source: TensorSource,
        report: RankReport,
        sharing: BlockSharing | None,
    ) -> list[WriteResult]:
        writer = SlabFileSystemWriter(self.directory.path, checkpoint_id=self.directory.target)
        writer.set_up_storage_writer(
            self.attempt.member.is_coordinator, rank=self.attempt.rank, use_collectives=True
        )
        writer.source = source
        writer.finish_file = files.sync
        writer.check = self.attempt.check
        writer.count = self.attempt.byte_count.add
        writer.sharing, writer.reuse = sharing, self.reuse
        writer.copied_nbytes = bounce_nbytes_of(self.host_budget_bytes)
        try:
            future = writer.write_data(self.plan, self.planner)
        finally:
            if sharing is not None:
                sharing.close()
                report.nbytes["shared"] = sharing.nbytes
        report.dcp_files = writer.files
        results: list[WriteResult] = future.value()
        return results

    def _write_export(
        self,
        job: int,
        part: tuple[Blocks, Sequence[RowShare]],
        files: OpenFiles,
        source: TensorSource,
        report: RankReport,
        *,
        defer: bool,
    ) -> None:
        (name, _), (blocks, shares) = self.own.files[job], part
        path = os.path.join(self.directory.path, self.subdir, name)
        with self.attempt.timed("write hf"):
            try:
                file = files.take(path) or OutputFile(path, create=False)
                file.count = self.attempt.byte_count.add
                try:
                    written = self.blocks.write_file(
                        file,
                        blocks,
                        source,
                        check=self.attempt.check,
                        bounce_nbytes=bounce_nbytes_of(self.host_budget_bytes),
                        reuse=None if self.reuse is None else partial(self.reuse.block, job, file),
                    )
                    # The buffer has the size of this save by now.
                    written += write_rows(
                        file, shares, self.slabs, self.blocks.bounce, self.attempt.check
                    )
                except BaseException:
                    file.discard()
                    raise
                if defer:
                    files.keep(file)
                else:
                    files.sync(file)
            except FATAL:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
                _log.warning("rank %d could not write %s: %s", self.attempt.rank, path, error)
                report.export_error = self._export_error(error, path)
                return
        report.blocks += written
        nbytes = nbytes_of_blocks(blocks) + nbytes_of_shares([shares])
        report.nbytes["hf"] = report.nbytes.get("hf", 0) + nbytes

    def _export_error(self, error: Exception, path: str) -> ExportError:
        nbytes = sum(size for _, size in self.own.files)
        return export_error(error, rank=self.attempt.rank, path=path, nbytes=nbytes)
