"""The errors that say why a checkpoint has no export, and what is published all the same."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import (
    CheckpointError,
    ExportError,
    SaveAbortedError,
    SaveTimeoutError,
    SlotTimeoutError,
)
from dcp_hf_writer.storage.posix_outputs import advice_for, free_bytes

if TYPE_CHECKING:
    from dcp_hf_writer.plan.layout import Layout

FATAL = (SaveAbortedError, SaveTimeoutError, SlotTimeoutError)
"""Errors that end the save in either half. After any other error in the export, the DCP half goes
on."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def export_error(error: Exception, *, rank: int, path: str, nbytes: int) -> ExportError:
    """Make the error that tells all ranks why the export failed.

    Args:
        error: What went wrong.
        rank: Rank on which it went wrong.
        path: File or directory of the export, within the directory of the save.
        nbytes: Size of the whole export.
    """
    number = getattr(error, "errno", None)
    found = cause_of(error)
    if number in _NO_SPACE:
        free = free_bytes(os.path.dirname(path))
        found += "" if free is None else f"; {free} bytes are free"
    msg = "the HuggingFace export could not be written"
    expected = f"room for {nbytes} bytes"
    return ExportError(
        msg,
        rank=rank,
        phase="write",
        path=path,
        expected=expected,
        found=found,
        errno=number,
        hint=advice_for(number),
    )


def nbytes_of(layout: Layout) -> int:
    """Return the size of all files of weights of an export, in bytes."""
    return sum(file.nbytes for file in layout.files)


def cause_of(error: Exception) -> str:
    """Return the type and text of an error, without the rank and the advice of one of ours."""
    text = str(error)
    if isinstance(error, CheckpointError):
        shown = CheckpointError(
            error.problem,
            path=error.path,
            fqn=error.fqn,
            key=error.key,
            expected=error.expected,
            found=error.found,
        )
        text = str(shown)
    return f"{type(error).__name__}: {text}"


def published_without_export(
    error: ExportError, *, staging: str, target: str, place: str
) -> ExportError:
    """Make the error that callers get: it says what is published, what is missing, and why.

    Args:
        error: Why there is no export.
        staging: Directory of the save until it was published. Paths in it are shown relative to it.
        target: Path of the published checkpoint.
        place: Where the export would be.
    """
    is_ours = error.problem == "the HuggingFace export could not be written"
    needed = f", {error.expected}" if is_ours and error.expected else ""
    found = f"{error.found}" if is_ours else cause_of(error)
    if is_ours and error.path:
        found = f"{error.path}: {found}"
    told = ExportError(
        "the DCP half is published, the HuggingFace half is missing",
        rank=error.rank,
        phase=error.phase,
        path=target,
        fqn=error.fqn,
        key=error.key,
        expected=f"{place}/{needed}",
        found=found.replace(f"{staging}/", "").replace(staging, "."),
        hint="; ".join(filter(None, (error.hint, "dcp.load reads what is published"))),
        errno=error.errno,
    )
    told.__cause__ = error.__cause__
    return told
