"""How the ranks of a save share the writing of one file: each directly, or cell by cell.

Pure: the choice follows from the option, the file system, and the hosts that write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dcp_hf_writer.errors import IncoherentStorageError
from dcp_hf_writer.storage.posix_outputs import COHERENT

if TYPE_CHECKING:
    from collections.abc import Sequence

Strategy = Literal["auto", "direct", "exchange"]

# Clients of network file systems write back whole pages and folios: 4 KiB to 64 KiB on common
# machines, 2 MiB at most.
_SMALLEST_CELL = 64 << 10
_USUAL_CELL = 2 << 20
_LARGEST_CELL = 64 << 20

# More cells than this would make the plan of the exchange slow.
_MOST_CELLS = 1 << 16

CELLS_IN_BUDGET = 4
"""A cell takes at most this part of a rank's budget: the rank puts one cell together while another
one is written, and needs room for what travels."""

ONE_WRITER_A_FILE = frozenset(
    f"fuse.{name}" for name in ("gcsfuse", "goofys", "mountpoint-s3", "rclone", "s3fs")
)
"""Object stores behind FUSE: they take the writes of one client per file, in order."""


@dataclass(frozen=True, slots=True)
class WriteStrategy:
    """How the ranks write the files of an export."""

    cell_nbytes: int
    """Size of the cells that ranks write for each other; 0 if each rank writes its own bytes."""
    why: str
    """Why, for the log."""

    @property
    def name(self) -> Literal["direct", "exchange"]:
        """Name of the strategy."""
        return "exchange" if self.cell_nbytes else "direct"


def choose_strategy(
    *,
    hosts: Sequence[str],
    fs_type: str,
    strategy: Strategy,
    path: str,
    nbytes: int,
    host_budget_bytes: int,
) -> WriteStrategy:
    """Choose how the ranks write an export.

    Args:
        hosts: Page cache of each rank (`page_cache_id`); equal values mean one page cache.
        fs_type: Type of the file system; empty if unknown. A node-local file system passes here;
            `StagingDirectory.check_visible` finds it on the ranks.
        strategy: What the user asked for.
        path: Path of the checkpoint, for the message.
        nbytes: Size of all files of the export.
        host_budget_bytes: Memory that a rank may use in addition to the staged copy.

    Raises:
        IncoherentStorageError: If the file system takes the writes of one host per file.
    """
    count, shown = len(set(hosts)), fs_type or "an unknown file system"
    if strategy == "direct":
        return WriteStrategy(0, 'strategy="direct" asks for it')
    if strategy == "exchange":
        cell = cell_nbytes_for(nbytes, host_budget_bytes)
        return WriteStrategy(cell, 'strategy="exchange" asks for it')
    if count <= 1:
        return WriteStrategy(0, "all ranks write through one page cache")
    if fs_type in COHERENT:
        return WriteStrategy(0, f"{fs_type} keeps the page caches of {count} hosts coherent")
    if fs_type in ONE_WRITER_A_FILE:
        raise _one_writer_error(fs_type, count, path)
    why = f"{shown} is not known to keep the page caches of {count} hosts coherent"
    return WriteStrategy(cell_nbytes_for(nbytes, host_budget_bytes), why)


def cell_nbytes_for(nbytes: int, host_budget_bytes: int) -> int:
    """Return the size of the cells for files that several hosts write through page caches.

    Args:
        nbytes: Size of all files of the export.
        host_budget_bytes: Memory that a rank may use in addition to the staged copy.
    """
    cell = _USUAL_CELL
    while cell * _MOST_CELLS < nbytes and cell < _LARGEST_CELL:
        cell *= 2
    while cell * CELLS_IN_BUDGET > host_budget_bytes and cell > _SMALLEST_CELL:
        cell //= 2
    return cell


def _one_writer_error(fs_type: str, count: int, path: str) -> IncoherentStorageError:
    msg = "several hosts may not write parts of one file on this file system"
    return IncoherentStorageError(
        msg,
        phase="plan",
        path=path,
        expected="a file system that takes writes of several hosts to one file",
        found=f"{fs_type}, written from {count} hosts",
        hint="save to the object store by its URL, such as s3://bucket/run/step-100, or pass "
        'strategy="direct" if you know that this mount allows it, or export=None',
    )
