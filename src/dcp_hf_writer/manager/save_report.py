"""What the manager reports of a committed save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dcp_hf_writer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A committed save, as its callbacks see it."""

    step: int
    """Step of the save."""
    path: str
    """Path of the checkpoint."""
    save_id: str
    """Id of the save."""
    nbytes: int
    """Size of all files of the checkpoint, in bytes."""
    has_export: bool
    """Whether the HuggingFace half is there."""
    export_error: BaseException | None
    """Why a requested export is missing."""
    attempts: int
    """How many times the save was tried."""
    waited_s: float
    """Seconds that training waited for the save before."""
    stall_s: float
    """Seconds that training waited for this save: until everything was staged."""
    seconds: float
    """Seconds from the call to the commit."""


Callback = Callable[[int, str, SaveReport], Any]
"""Called with the step, the path and the report, on every rank, after the commit."""


def as_callbacks(name: str, value: Any) -> tuple[Callback, ...]:
    """Return the callbacks that an option stands for: none, one function, or several.

    Raises:
        ConfigError: If one is no function.
    """
    if value is None:
        return ()
    several: Sequence[Any] = (value,) if callable(value) else tuple(value)
    for one in several:
        if not callable(one):
            raise ConfigError(
                f"{name} must be a function or a list of functions",
                expected="function(step, path, report)",
                found=repr(one),
            )
    return tuple(several)
