"""The report of a finished save, and the functions of the user that get it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dcp_hf_writer.errors import ConfigError, ExportError
from dcp_hf_writer.mapping.option_values import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

_log = logging.getLogger(__name__)

SaveOutcome = Literal["published", "without export", "failed"]


@dataclass(frozen=True, slots=True)
class FinishedSave:
    """A save that is over, as rank 0 saw it; what `report_to=` functions get."""

    path: str
    """Path of the checkpoint."""
    step: int | None
    """The training step, if the path tells it."""
    outcome: SaveOutcome
    """`without export`: only the DCP half was published. `failed`: nothing was."""
    error: str | None
    """What went wrong, in one text; `None` if nothing did."""
    dcp_nbytes: int
    """Bytes of the DCP half, of all ranks; 0 if nothing was published."""
    hf_nbytes: int
    """Bytes of the HuggingFace half, of all ranks; 0 without one."""
    stall_s: float | None
    """Seconds for which staging held training up on rank 0; `None` without staging."""
    total_s: float
    """Seconds from the beginning of staging to the end of the save."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds that rank 0 spent in each phase."""
    ended: float = field(default_factory=time.time)
    """When the save ended, in seconds since 1970."""

    @property
    def nbytes(self) -> int:
        """Bytes of both halves."""
        return self.dcp_nbytes + self.hf_nbytes


ReportHook = Callable[[FinishedSave], Any]


def as_report_hooks(value: Any) -> tuple[ReportHook, ...]:
    """Return the functions that `report_to=` stands for: none, one, or several.

    Raises:
        ConfigError: If one is no function.
    """
    if value is None:
        return ()
    several: Sequence[Any] = (value,) if callable(value) else value
    is_several = isinstance(several, (list, tuple)) and all(map(callable, several))
    if not is_several:
        raise ConfigError(
            "report_to must be a function or a list of functions",
            expected="function(finished_save)",
            found=shown(value),
        )
    return tuple(several)


class SaveReports:
    """Gives the report of one save to the user's functions, once. Thread-safe."""

    def __init__(self, hooks: Sequence[ReportHook]) -> None:
        """Start before the end of the save."""
        self._hooks = tuple(hooks)
        self._lock = threading.Lock()
        self._noted: FinishedSave | None = None
        self._is_told = False

    @property
    def is_noted(self) -> bool:
        """Whether the report is known, or no function asks for it."""
        return self._noted is not None or not self._hooks

    def note(self, finished: FinishedSave) -> None:
        """Keep a report until `tell`; the first one counts."""
        with self._lock:
            self._noted = self._noted or finished

    def tell(self) -> None:
        """Call the functions with the report. An error of one is logged, and costs nothing else."""
        with self._lock:
            finished, is_told = self._noted, self._is_told
            self._is_told = is_told or finished is not None
        if finished is None or is_told:
            return
        for hook in self._hooks:
            try:
                hook(finished)
            except Exception:  # noqa: BLE001 - a dashboard must not cost a save
                _log.exception("report_to: %r raised an error for %s", hook, finished.path)


def outcome_of(error: BaseException | None) -> SaveOutcome:
    """Return the outcome of a save that raised `error`."""
    if error is None:
        return "published"
    return "without export" if isinstance(error, ExportError) else "failed"
