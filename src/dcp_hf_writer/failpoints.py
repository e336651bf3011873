"""Named points of a save at which a test may kill, stop, delay or fail a rank; free when unset."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

POINTS = (
    "staged",  # every rank: the copy is done, the save not yet begun
    "local plan",  # every rank: before its plan is sent
    "directory made",  # coordinator: the staging directory and its record are there
    "headers written",  # coordinator: output files have their size and headers
    "before slot",  # every rank: before it waits for a write slot
    "mid dcp",  # every rank: before each tensor of the DCP file
    "mid hf",  # every rank: before each block of an output file
    "before fsync",  # every rank: all is written, nothing waited for
    "after fsync",  # every rank: its bytes are durable
    "before report",  # every rank: before its results are sent
    "before manifest",  # coordinator: all ranks reported, the metadata is written
    "before rename",  # coordinator: the manifest is durable
    "after rename",  # coordinator: the checkpoint is visible
    "before reply",  # coordinator: before the other ranks learn of it
)

_hook: Callable[[str], None] | None = None


def set_hook(hook: Callable[[str], None] | None) -> None:
    """Call `hook` with the name of each point that this process reaches; `None` to stop."""
    global _hook  # noqa: PLW0603 - one hook a process
    _hook = hook


def reach(point: str) -> None:
    """Mark a point; does nothing unless a hook is set."""
    if _hook is not None:
        _hook(point)
