"""`doctor`: probe a place for checkpoints, and tell how a save would work there."""

from __future__ import annotations

import os
import time
import uuid
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.cli import exit_codes
from dcp_hf_writer.cli.byte_progress import ByteProgress
from dcp_hf_writer.cli.plain_text import rate, size
from dcp_hf_writer.cli.run_command import Outcome, line
from dcp_hf_writer.formats.names_on_disk import INCOMPLETE
from dcp_hf_writer.preflight import check_options
from dcp_hf_writer.save.write_strategy import ONE_WRITER_A_FILE
from dcp_hf_writer.storage.block_clones import PROBE
from dcp_hf_writer.storage.output_place import check_output_place, existing_parent
from dcp_hf_writer.storage.posix_outputs import (
    COHERENT,
    OutputFile,
    file_system_type,
    free_bytes,
    sync_directory,
    write_errors,
)
from dcp_hf_writer.storage.posix_trees import remove_tree

if TYPE_CHECKING:
    from rich.console import Console

_PART_NBYTES = 8 << 20


def doctor(path: str, *, nbytes: int) -> Outcome:
    """Probe the place where a checkpoint would be made; leaves nothing behind.

    `PROBLEM` if a save could not be published there.

    Raises:
        ConfigError: If `path` is no local path.
        StorageError: If nothing can be written there.
    """
    target = check_options.local_path(path)
    check_output_place(target)
    place = existing_parent(target)
    kind, free = file_system_type(place), free_bytes(place)
    probe = os.path.join(place, f"{INCOMPLETE}doctor-{uuid.uuid4().hex}")
    with write_errors(probe):
        os.mkdir(probe)
    try:
        renames = _renames(probe)
        clone = PROBE.block_nbytes(probe)
        most = nbytes if free is None else min(nbytes, free // 2)
        seconds = _write(os.path.join(probe, "speed"), most)
    finally:
        remove_tree(probe)
    value = {
        "path": target,
        "probed": place,
        "file_system": kind or None,
        "is_coherent": kind in COHERENT,
        "renames": renames,
        "clone_block_nbytes": clone,
        "free_nbytes": free,
        "written_nbytes": most,
        "write_seconds": round(seconds, 6),
        "advice": _advice(kind, clone, free, renames=renames),
    }
    return Outcome(value, exit_codes.OK if renames else exit_codes.PROBLEM)


def _renames(probe: str) -> bool:
    """Whether a directory can be renamed, and the rename made durable, as the commit does."""
    before, after = os.path.join(probe, "a"), os.path.join(probe, "b")
    os.mkdir(before)
    try:
        os.rename(before, after)
    except OSError:
        return False
    sync_directory(probe)
    return True


def _write(path: str, nbytes: int) -> float:
    """Return the seconds that a write of random bytes takes, with its fsync."""
    part = memoryview(os.urandom(_PART_NBYTES))
    began = time.monotonic()
    with OutputFile(path, create=True) as output, ByteProgress("doctor: write") as progress:
        for start in range(0, nbytes, _PART_NBYTES):
            output.write(part[: min(_PART_NBYTES, nbytes - start)], start)
            progress(start, nbytes)
        output.sync()
    return time.monotonic() - began


def _advice(kind: str, clone: int | None, free: int | None, *, renames: bool) -> list[str]:
    found = []
    if not renames:
        found.append("a directory cannot be renamed here, so no save can be published")
    if kind in COHERENT:
        found.append("direct: all ranks that see this directory write their parts of one file")
    elif kind in ONE_WRITER_A_FILE:
        found.append(
            f"direct on one host; {kind} takes the writes of one host per file, so a save of "
            "several hosts with an export is refused"
        )
    else:
        found.append(
            f"direct on one host; {kind or 'this file system'} is not known to be coherent, so the "
            "ranks of several hosts send each other bytes: each part of a file has one writer"
        )
    if clone is not None:
        found.append(f"both halves share disk blocks of {clone} bytes: weights take space once")
    else:
        found.append('both halves take their own space; weights="once" stores weights once')
    if kind == "tmpfs":
        found.append("tmpfs is memory: nothing here survives a restart of the machine")
    if free is None:
        found.append("the file system does not tell its free space")
    return found


def show_doctor(value: dict[str, Any], console: Console) -> None:
    """Print one line for each probe."""
    clone, free = value["clone_block_nbytes"], value["free_nbytes"]
    speed = rate(value["written_nbytes"], value["write_seconds"])
    answers = {
        "probed": value["probed"],
        "file system": value["file_system"] or "unknown",
        "coherent": "yes" if value["is_coherent"] else "not known",
        "rename of a directory": "yes" if value["renames"] else "no",
        "clone of blocks": "no" if clone is None else f"yes, {clone} bytes",
        "free space": "unknown" if free is None else size(free),
        "write speed": f"{speed} ({size(value['written_nbytes'])} with fsync, one process)",
    }
    line(console, value["path"], "bold")
    for name, text in answers.items():
        line(console, f"  {name:<22} {text}")
    for text in value["advice"]:
        line(console, f"- {text}")
