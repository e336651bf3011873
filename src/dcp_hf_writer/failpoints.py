"""Named points of a save at which a test can kill, stop, delay or fail a rank.

A point costs nothing while no hook is set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

POINTS = (
    "staged",  # every rank: the copy is done, the save has not begun
    "local plan",  # every rank: before it sends its plan
    "directory made",  # coordinator: the staging directory and its record exist
    "headers written",  # coordinator: the output files have their sizes and headers
    "before comparison",  # every rank: before it compares its bytes with an earlier checkpoint
    "before link",  # coordinator: before an earlier file takes the place of an output file
    "before slot",  # every rank: before it waits for a write slot
    "mid dcp",  # every rank: before each tensor of the DCP file
    "mid hf",  # every rank: before each block of an output file
    "mid exchange",  # every rank: before each round in which ranks send each other bytes
    "before clone",  # every rank: before a part of its DCP file shares disk blocks of the export
    "before reuse",  # every rank: before a part of a file shares disk blocks of an earlier one
    "before fsync",  # every rank: all writes are done, no fsync yet
    "after fsync",  # every rank: its bytes are durable
    "before report",  # every rank: before it sends its results
    "before manifest",  # coordinator: all ranks have reported, the metadata is written
    "export published",  # coordinator: the export, apart from the DCP half, is visible alone
    "before rename",  # coordinator: the manifest is durable
    "files carried",  # coordinator: files of others are linked into the new directory, by record
    "names exchanged",  # coordinator: the checkpoint is visible in the place of another directory
    "files linked back",  # coordinator: the old directory holds the new checkpoint too
    "place given back",  # coordinator: the old directory has its name again
    "after rename",  # coordinator: the checkpoint is visible
    "before reply",  # coordinator: before it tells the other ranks
)

TARGET_POINTS = ("files carried", "names exchanged", "files linked back", "place given back")
"""Those that only a save into a directory with files of others reaches."""

APART_POINTS = ("export published",)
"""Those that only a save whose halves lie apart reaches."""

EXCHANGE_POINTS = ("mid exchange",)
"""Those that only a save whose ranks write cells for each other reaches."""

SHARING_POINTS = ("before clone",)
"""Those that only a save on a file system that can clone reaches."""

REUSE_POINTS = ("before comparison", "before link", "before reuse")
"""Those that only a save reaches that uses an earlier checkpoint again."""

MIRROR_POINTS = (
    "mirror begun",  # each rank that uploads: rank 0 has taken the prefix
    "mirror part sent",  # each rank: a file is read and maybe sent, its object is not visible
    "mirror object sent",  # each rank: an object is visible
    "before mirror manifest",  # rank 0: all objects are there
    "after mirror manifest",  # rank 0: the mirror is published, its records are still there
)
"""Those of the upload of a mirror, after the save."""

_hook: Callable[[str], None] | None = None


def set_hook(hook: Callable[[str], None] | None) -> None:
    """Call `hook` with the name of each point that this process reaches; `None` removes it."""
    global _hook  # noqa: PLW0603 - one hook per process
    _hook = hook


def reach(point: str) -> None:
    """Call the hook, if one is set, with the name of a point."""
    if _hook is not None:
        _hook(point)
