"""The contract between a save and the place that it writes to: a local directory or a store.

The steps of a save call these methods in this order. So only the targets differ: no step asks
whether it writes files or objects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.save.progress_heartbeat import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import Literal

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.storage import WriteResult

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.encode_manifest import OtherHalf, WholeFile
    from dcp_hf_writer.plan.global_plan import GlobalPlan, RankPlan
    from dcp_hf_writer.plan.layout import Layout
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.export_assets import Assets

    Half = Literal["both", "dcp", "hf"]


@dataclass(frozen=True, slots=True)
class RankWrites:
    """What one rank is to write."""

    plan: SavePlan
    """The final plan; its `storage_data` comes from the DCP writer."""
    own: RankPlan
    """This rank's part of the global plan."""
    planner: SavePlanner
    """torch's planner, which resolves the items of the plan."""
    subdir: str
    """Directory of the export within its place; empty if the halves lie apart."""
    host_budget_bytes: int
    """Memory that the rank may use in addition to the staged copy."""
    half: Half = "both"
    """Which half to write here."""


@dataclass(frozen=True, slots=True)
class Publication:
    """What the coordinator publishes."""

    plan: GlobalPlan
    reports: Sequence[RankReport]
    subdir: str
    """Directory of the export within the checkpoint."""
    overwrite: bool
    error: ExportError | None
    """Why the checkpoint has no export."""
    seconds: Mapping[str, Any]
    """Seconds of phases that the attempt does not count."""
    half: Half = "both"
    """Which half this place gets. Only the place of the DCP half commits."""
    other_half: OtherHalf | None = None
    """Where the other half lies, if the halves lie apart."""

    @property
    def layout(self) -> Layout | None:
        """The export, as planned; `None` without one."""
        return self.plan.layout if self.error is None and self.half != "dcp" else None

    def whole_files(self, attempt: Attempt) -> tuple[WholeFile, ...]:
        """Return the files of the export that the coordinator wrote whole."""
        return attempt.whole_files if self.error is None and self.half != "dcp" else ()


class SaveTarget(ABC):
    """Where one save writes. Each rank makes its own; equal ones mean the same place."""

    target: str
    """The checkpoint: an absolute path, or a URL without credentials."""
    save_id: str
    """Id of the save."""
    part_of: SaveTarget | None = None
    """The target that this one is a half of, if the halves lie apart."""

    def register(self, attempt: Attempt) -> None:
        """Let the attempt clean up here when it ends (coordinator)."""
        whole = self.part_of or self
        if attempt.directory is not whole:
            attempt.work_in(whole)

    @property
    @abstractmethod
    def path(self) -> str:
        """Where the save writes until it publishes, for messages."""

    @property
    def pace(self) -> Pace:
        """How often a rank writes its heartbeat here."""
        return Pace()

    @abstractmethod
    def heartbeat_of(self, rank: int) -> Callable[[bytes], None] | None:
        """Return the function that replaces the heartbeat of a rank; it may raise `OSError`.

        `None` if the place keeps no heartbeats.
        """

    def end_news(self, attempt: Attempt) -> None:
        """End the heartbeats of a rank that has written its part, where they must not be late."""
        if self.pace.end_s:
            attempt.end_heartbeats()

    @abstractmethod
    def make(self, attempt: Attempt, *, overwrite: bool, new_files: Collection[str]) -> None:
        """Take the target for this save (coordinator). If this raises, it leaves nothing behind.

        First removes what dead saves left there.

        Args:
            attempt: The save.
            overwrite: Whether the save may replace a checkpoint.
            new_files: Files of the export, by path within the checkpoint.

        Raises:
            StorageError: If the target may not be taken, or the storage refuses.
        """

    @abstractmethod
    def make_export(
        self, plan: GlobalPlan, assets: Assets | None, attempt: Attempt, *, subdir: str
    ) -> bool:
        """Prepare the files of the export, so that the ranks may write them (coordinator).

        Returns:
            `False` if they cannot be made: the checkpoint then has no export. `True` if they were
            made, or if no export was planned.
        """

    def told(self) -> Mapping[str, Any]:
        """Return what the other ranks need in order to write, as JSON values (coordinator)."""
        return {}

    @abstractmethod
    def check_visible(self, attempt: Attempt) -> None:
        """Check on any rank that it reaches the place that the coordinator took.

        Raises:
            NodeLocalPathError: If this rank sees another place.
        """

    @abstractmethod
    def write(self, attempt: Attempt, writes: RankWrites) -> list[WriteResult]:
        """Write this rank's part of both halves; durable on return.

        Returns:
            The results of the DCP half, and one extra result that carries the rank's report.

        Raises:
            CheckpointError: If the DCP half failed, or the save was given up. The report carries
                errors of the export instead.
        """

    @abstractmethod
    def drop_export(self, subdir: str, attempt: Attempt) -> None:
        """Remove the failed export, so that the DCP half can be published alone (coordinator).

        Raises:
            CommitError: If it cannot be removed; then nothing may be published.
        """

    @abstractmethod
    def add_checksums(self, export: HFExport, attempt: Attempt, *, subdir: str) -> None:
        """Add the checksum file of a complete export, if `export` asks for one (coordinator).

        Raises:
            OSError: If a file cannot be read or written.
        """

    def export_path(self, subdir: str) -> str:
        """Return where readers find the export, for messages."""
        return f"{self.target}/{subdir}"

    def publish_export(self, attempt: Attempt, what: Publication) -> ExportError | None:
        """Publish the export first, if it lies apart from the DCP half (coordinator).

        Returns:
            Why the checkpoint has no export: an error of this step, or the one in `what`.

        Raises:
            SaveAbortedError: If the save was given up.
            SaveTimeoutError: If the deadline has passed.
        """
        del attempt
        return what.error

    @abstractmethod
    def finish_dcp(
        self,
        metadata: Metadata,
        results: list[list[WriteResult]],
        attempt: Attempt,
        *,
        save_id: str,
    ) -> None:
        """Make `.metadata` (coordinator).

        Args:
            metadata: The planner's metadata.
            results: Results of the DCP half, by rank.
            attempt: The save.
            save_id: Id that the metadata names.
        """

    @abstractmethod
    def publish(self, attempt: Attempt, what: Publication) -> None:
        """Prove that everything is there, and make the checkpoint visible (coordinator).

        Raises:
            CoverageError: If the reported blocks do not cover each file exactly once, or a file is
                missing or has the wrong size.
            StorageError: If the storage refuses an operation.
            SaveAbortedError: If the save was given up.
            SaveTimeoutError: If the deadline has passed.
        """

    @abstractmethod
    def is_committed(self) -> bool:
        """Whether this save's checkpoint is visible."""

    @abstractmethod
    def remove(self) -> None:
        """Remove what an unpublished save wrote (coordinator); safe to call twice."""
