"""What a save says in the log: a line when it is published or failed, and one for each phase.

The logger is `dcp_hf_writer.save.save_log`. Published saves are logged at INFO, by the coordinator.
Failed saves are logged at ERROR by each rank, because nobody may look at the future. Phases are
logged at DEBUG.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

_log = logging.getLogger(__name__)

_GB = 10**9

# `step-100`, also after other numbers, or a name with one number at its end. The 6 of `2024-05-06`
# is no step.
_STEP = re.compile(
    r".*?(?:step|checkpoint|ckpt|iteration|iter)[-_=]?(\d+)|\D*(\d+)", re.IGNORECASE | re.DOTALL
)

_WORDS: Mapping[str, str] = {"written": "waiting for the other ranks"}
"""What a phase is called in the log, where its own name does not say it."""


@dataclass(frozen=True, slots=True)
class Published:
    """The facts of a published save."""

    target: str
    """Path of the checkpoint."""
    step: int | None
    """The training step, if the path tells it."""
    nbytes: tuple[int, int]
    """Bytes of the DCP half and of the export, of all ranks; 0 without an export."""
    stall_s: float | None
    """Seconds for which staging held training up on the coordinator; `None` without staging."""
    total_s: float
    """Seconds from the beginning of staging to the commit."""


def step_of(target: str) -> int | None:
    """Return the training step in a path such as `run/step-100`; for the manifest and the log."""
    found = _STEP.fullmatch(os.path.basename(target))
    return int(found[1] or found[2]) if found else None


def log_published(save: Published) -> None:
    """Log a published save."""
    step = "" if save.step is None else f" (step {save.step})"
    stall = "no staging" if save.stall_s is None else f"stall {save.stall_s:.3f} s"
    dcp_nbytes, hf_nbytes = save.nbytes
    _log.info(
        "published %s%s: %.3f GB DCP + %.3f GB HuggingFace, %s, total %.3f s, %.2f GB/s",
        save.target,
        step,
        dcp_nbytes / _GB,
        hf_nbytes / _GB,
        stall,
        save.total_s,
        (dcp_nbytes + hf_nbytes) / _GB / max(save.total_s, 1e-9),
    )


def log_failed(target: str, rank: int, error: BaseException) -> None:
    """Log a failed save; an `ExportError` says that the DCP half is there."""
    what = "has no export" if isinstance(error, ExportError) else "failed"
    _log.error(
        "the save of %s %s on rank %d: %s: %s", target, what, rank, type(error).__name__, error
    )


def log_phase(target: str, rank: int, phase: str, seconds: float) -> None:
    """Log that a phase of a save is over on a rank."""
    _log.debug(
        "save of %s, rank %d: %s took %.3f s", target, rank, _WORDS.get(phase, phase), seconds
    )
