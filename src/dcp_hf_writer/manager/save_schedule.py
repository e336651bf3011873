"""What is saved at a step: the cadences of a run, joined into one answer. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.manager.cadence import as_cadence

if TYPE_CHECKING:
    from dcp_hf_writer.manager.cadence import Cadence


@dataclass(frozen=True, slots=True)
class DueSave:
    """A save that is due."""

    has_export: bool = False
    """Whether it writes a HuggingFace half."""
    is_snapshot: bool = False
    """Whether it goes into the snapshot slot."""


@dataclass(frozen=True, slots=True)
class SaveSchedule:
    """The cadences of a run."""

    save_every: Cadence
    """When to save."""
    export_every: Cadence | None
    """When a save writes a HuggingFace half too; `None` means at every save."""
    snapshot_every: Cadence
    """When to save into the snapshot slot."""
    has_export: bool
    """Whether the run writes exports at all."""

    def due_at(self, step: int, *, is_first: bool, is_called: bool) -> DueSave | None:
        """Return what is due at a step; `None` if nothing is.

        A step that is due for an export is saved in any case. A snapshot is taken only if the step
        is not saved otherwise.

        Args:
            step: Number of the step that has just ended.
            is_first: Whether this is the first step that the run reports.
            is_called: Whether the clock or a signal calls for a save.
        """
        is_export_due = self._is_export_due_at(step, is_first=is_first)
        if is_called or is_export_due or self.save_every.is_due_at(step, is_first=is_first):
            return DueSave(has_export=is_export_due or self.exports_always)
        if self.snapshot_every.is_due_at(step, is_first=is_first):
            return DueSave(is_snapshot=True)
        return None

    def by_hand(self, step: int, *, export: bool | None) -> DueSave:
        """Return what a save by hand writes; `export=None` asks the cadence."""
        if export is None:
            export = self.exports_always or self._is_export_due_at(step, is_first=False)
        return DueSave(has_export=export and self.has_export)

    @property
    def exports_always(self) -> bool:
        """Whether every save writes a HuggingFace half."""
        return self.has_export and self.export_every is None

    def _is_export_due_at(self, step: int, *, is_first: bool) -> bool:
        if not self.has_export or self.export_every is None:
            return False
        return self.export_every.is_due_at(step, is_first=is_first)


def schedule_of(
    save_every: Any, export_every: Any, snapshot_every: Any, *, has_export: bool
) -> SaveSchedule:
    """Make the schedule that the options of a manager stand for.

    Raises:
        ConfigError: If an option is no cadence, or depends on the clock and must not.
    """
    exports = None
    if export_every is not None:
        exports = as_cadence("export_every", export_every, may_use_clock=False)
    return SaveSchedule(
        as_cadence("save_every", save_every),
        exports,
        as_cadence("snapshot_every", snapshot_every, may_use_clock=False),
        has_export,
    )
