"""A save to a directory of a file system: written aside, published by one rename."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.formats.names_on_disk import DIGESTS_DIRECTORY
from dcp_hf_writer.save import coordinator
from dcp_hf_writer.save.cached_steps import CACHED_STEPS
from dcp_hf_writer.save.checksums import add_checksums
from dcp_hf_writer.save.dcp_half import metadata_writer
from dcp_hf_writer.save.given_writer import finish_given_writer
from dcp_hf_writer.save.low_priority import run_at_low_priority
from dcp_hf_writer.save.mirror_jobs import note_mirror
from dcp_hf_writer.save.previous_files import PreviousFiles, link_previous
from dcp_hf_writer.save.replace_target import saved_id
from dcp_hf_writer.save.save_target import SaveTarget
from dcp_hf_writer.save.write_phase import WritePhase
from dcp_hf_writer.storage.posix_outputs import write_errors
from dcp_hf_writer.storage.write_slots import WriteSlots

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.plan.layout import Layout
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.commit import StagingDirectory
    from dcp_hf_writer.save.export_assets import Assets
    from dcp_hf_writer.save.mirror_to import MirrorTo
    from dcp_hf_writer.save.save_target import Publication, RankWrites
    from dcp_hf_writer.save.write_strategy import Strategy

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """Options that only saves to a file system have."""

    dcp_writer: StorageWriter | None = None
    """The user's writer for the DCP half; `None` for ours."""
    slots: WriteSlots = field(default_factory=WriteSlots)
    """How many processes of a node write at the same time, and at which priority."""
    share: Literal["auto", "off"] = "auto"
    """Whether the halves may share disk blocks."""
    strategy: Strategy = "auto"
    """How the ranks write files that they share."""
    mirror: MirrorTo | None = None
    """Where the checkpoint is uploaded once it is committed."""
    page_cache: Literal["newest", "all"] = "newest"
    """Whether older checkpoints of this process leave the page cache."""
    reuse: str | None = None
    """Path of an earlier checkpoint whose files may be used again."""

    @classmethod
    def of(cls, writer: Any, mirror: MirrorTo | None) -> LocalOptions:
        """Take the options from a writer.

        Args:
            writer: An `HFDualWriter`; only its options are read.
            mirror: The mirror of this save.
        """
        return cls(
            dcp_writer=writer.dcp_writer,
            slots=writer.slots,
            share=writer.share,
            strategy=writer.strategy,
            mirror=mirror,
            page_cache=writer.page_cache,
            reuse=writer.reuse,
        )


class PosixTarget(SaveTarget):
    """A directory of a file system."""

    def __init__(
        self,
        directory: StagingDirectory,
        options: LocalOptions,
        *,
        host_budget_bytes: int = 256 << 20,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the target on one rank, with what the coordinator told; touches nothing."""
        self.directory, self.options = directory, options
        self._host_budget_bytes, self._cell_nbytes = host_budget_bytes, 0
        self._gathers_rows = False
        self._previous = PreviousFiles.told(told, directory.path)
        self.target, self.save_id = directory.target, directory.save_id

    @property
    def path(self) -> str:
        """The directory that the save writes into."""
        return self.directory.path

    def heartbeat_of(self, rank: int) -> Callable[[bytes], None]:
        """Return what replaces a small file in the directory; see `SaveTarget.heartbeat_of`."""
        return self.directory.write_heartbeat_of(rank)

    def make(self, attempt: Attempt, *, overwrite: bool, new_files: Collection[str]) -> None:
        """Make the directory; see `SaveTarget.make`."""
        files = attempt.open_files()
        record = files.keep(
            self.directory.create(
                overwrite=overwrite, new_files=new_files, world_size=attempt.member.world_size
            )
        )
        self.register(attempt)
        # A rank must not make it: it would bring back the directory of a save that was given up.
        digests = os.path.join(self.path, DIGESTS_DIRECTORY)
        with write_errors(digests):
            os.mkdir(digests)
        reach("directory made")
        files.sync(files.take(record.path) or record)

    def make_export(
        self, plan: GlobalPlan, assets: Assets | None, attempt: Attempt, *, subdir: str
    ) -> bool:
        """Make the files with headers, sizes and assets; see `SaveTarget.make_export`."""
        is_made = coordinator.make_export(
            self.directory,
            plan,
            assets,
            attempt,
            strategy=self.options.strategy,
            subdir=subdir,
            host_budget_bytes=self._host_budget_bytes,
        )
        self._cell_nbytes = attempt.cell_nbytes
        self._gathers_rows = self.options.strategy == "auto" and not attempt.cell_nbytes
        attempt.gather_rows(self._gathers_rows)
        if self.options.reuse is not None:
            layout = plan.layout if is_made else None
            self._previous = self._link_previous(self.options.reuse, layout, subdir)
        return is_made

    def _link_previous(
        self, earlier: str, layout: Layout | None, subdir: str
    ) -> PreviousFiles | None:
        if self._cell_nbytes:
            _log.warning(
                "%s is not reused: the ranks of several hosts write the files of %s for each other",
                earlier,
                self.target,
            )
            return None
        return link_previous(earlier, self.path, layout, subdir=subdir)

    def told(self) -> Mapping[str, Any]:
        """Return how the ranks write the export; see `SaveTarget.told`."""
        previous = self._previous
        told: dict[str, Any] = {} if previous is None else {"previous": previous.to_tell()}
        return {"cell_nbytes": self._cell_nbytes, "gathers_rows": self._gathers_rows, **told}

    def check_visible(self, attempt: Attempt) -> None:
        """Look for the coordinator's directory; see `SaveTarget.check_visible`."""
        self.directory.check_visible(rank=attempt.rank)

    def write(self, attempt: Attempt, writes: RankWrites) -> list[WriteResult]:
        """Write into the files, under slots; see `SaveTarget.write`."""
        phase = WritePhase(
            attempt=attempt,
            directory=self.directory,
            plan=writes.plan,
            own=writes.own,
            planner=writes.planner,
            dcp_writer=self.options.dcp_writer,
            slots=self.options.slots,
            subdir=writes.subdir,
            host_budget_bytes=writes.host_budget_bytes,
            share=self.options.share,
            half=writes.half,
            previous=self._previous,
        )
        nice, files = self._nice(attempt), attempt.open_files()
        is_export = writes.half == "hf"

        def write() -> list[WriteResult]:
            if nice:
                files.renew_threads()
            if self.options.page_cache == "newest":
                CACHED_STEPS.drop_outdated(self.target, is_export=is_export)
            return phase.run()

        results = run_at_low_priority(write, nice=nice, stop=attempt.give_up)
        own = os.path.join(self.path, "")
        names = (path.removeprefix(own) for path in files.paths if path.startswith(own))
        CACHED_STEPS.note(self.target, names, is_export=is_export)
        return results

    def _nice(self, attempt: Attempt) -> int:
        """Return by how much to lower the priority of the thread that writes; 0 for not at all."""
        # The caller of a synchronous save waits for it. The user's writer and the connections of an
        # exchange may start threads that outlive the save, and these would inherit the priority.
        starts_others = self.options.dcp_writer is not None or attempt.cell_nbytes > 0
        is_free = attempt.context.is_background and not starts_others
        return self.options.slots.nice if is_free else 0

    def drop_export(self, subdir: str, attempt: Attempt) -> None:
        """Remove the directory of the export; see `SaveTarget.drop_export`."""
        del attempt
        coordinator.drop_export(self.directory, subdir)

    def add_checksums(self, export: HFExport, attempt: Attempt, *, subdir: str) -> None:
        """Read the files once more; see `SaveTarget.add_checksums`."""
        if export.checksums is not None:
            with attempt.timed("checksums"):
                file = add_checksums(self.path, subdir, check=attempt.check)
            attempt.add_whole_files(file)

    def finish_dcp(
        self,
        metadata: Metadata,
        results: list[list[WriteResult]],
        attempt: Attempt,
        *,
        save_id: str,
    ) -> None:
        """Let torch's or the user's writer make it; see `SaveTarget.finish_dcp`."""
        given, target = self.options.dcp_writer, self.target
        with write_errors(self.path):
            if given is None:
                writer = metadata_writer(self.path, target, rank=attempt.rank, save_id=save_id)
                writer.finish(metadata, results)
            else:
                finish_given_writer(given, metadata, results, target=target, save_id=save_id)

    def publish(self, attempt: Attempt, what: Publication) -> None:
        """Write the manifest, fsync, rename; see `SaveTarget.publish`."""
        if self._previous is not None:
            self._previous.remove()
        if self.options.mirror is not None:
            note_mirror(self.target, self.save_id, self.options.mirror)
        coordinator.publish(self.directory, attempt, what)

    def is_committed(self) -> bool:
        """Whether the manifest at the target is this save's; see `SaveTarget.is_committed`."""
        return saved_id(self.target) == self.save_id

    def remove(self) -> None:
        """Remove what is left of the directory; see `SaveTarget.remove`."""
        self.directory.remove()
