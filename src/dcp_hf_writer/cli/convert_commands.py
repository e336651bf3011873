"""`export`, `import` and `materialize`: write a checkpoint in another form."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.check.materialize import materialize
from dcp_hf_writer.cli import exit_codes
from dcp_hf_writer.cli.byte_progress import ByteProgress
from dcp_hf_writer.cli.plain_text import count, duration, rate, size
from dcp_hf_writer.cli.run_command import Outcome, line
from dcp_hf_writer.convert.export_checkpoint import export_checkpoint
from dcp_hf_writer.convert.export_options import export_of_options
from dcp_hf_writer.convert.import_directory import import_directory
from dcp_hf_writer.preflight import check_options
from dcp_hf_writer.tensors.dtypes import export_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

_MAX_WORKERS = 4


def export(
    path: str,
    target: str,
    *,
    config: str | None,
    specs: str | None,
    like: str | None,
    workers: int | None,
    options: Mapping[str, Any],
) -> Outcome:
    """Export a DCP checkpoint to a HuggingFace directory.

    Raises:
        CheckpointError: As `export_of_options` and `export_checkpoint`.
    """
    made = export_of_options(path, config=config, specs=specs, like=like, options=options)
    began = time.monotonic()
    with ByteProgress("export") as progress:
        found = export_checkpoint(
            path,
            target,
            made,
            workers=workers or min(os.cpu_count() or 1, _MAX_WORKERS),
            progress=progress,
        )
    return Outcome(
        {
            "source": path,
            "path": found.path,
            "files": list(found.files),
            "tensors": found.tensors,
            "nbytes": found.nbytes,
            "seconds": round(time.monotonic() - began, 6),
            "left_out": list(found.left_out),
            "tied": dict(found.tied),
        }
    )


def show_export(value: dict[str, Any], console: Console) -> None:
    """Print what was written, and what was left out."""
    line(console, value["path"], "bold")
    files = count(len(value["files"]), "file")
    line(
        console,
        f"{count(value['tensors'], 'tensor')} in {files}, {size(value['nbytes'])}, "
        f"{duration(value['seconds'])} ({rate(value['nbytes'], value['seconds'])})",
    )
    for dropped, kept in value["tied"].items():
        line(console, f"tied: {dropped} = {kept}")
    for one in value["left_out"]:
        line(console, f"not part of the model: {one}")


def materialize_checkpoint(path: str, target: str, *, overwrite: bool) -> Outcome:
    """Rewrite a checkpoint whose weights are stored once as a plain DCP checkpoint.

    Raises:
        CheckpointError: As `materialize`.
    """
    began = time.monotonic()
    materialize(path, target, overwrite=overwrite)
    made = check_options.local_path(target)
    with os.scandir(made) as entries:
        nbytes = sum(entry.stat().st_size for entry in entries if entry.is_file())
    seconds = round(time.monotonic() - began, 6)
    return Outcome({"source": path, "path": made, "nbytes": nbytes, "seconds": seconds})


def show_materialized(value: dict[str, Any], console: Console) -> None:
    """Print what was written."""
    line(console, value["path"], "bold")
    line(console, f"{size(value['nbytes'])} in {duration(value['seconds'])}; dcp.load reads it")


def import_hf(
    path: str,
    target: str,
    *,
    config: str | None,
    specs: str | None,
    dtype: str | None,
    entry: str,
) -> Outcome:
    """Import a HuggingFace directory as a DCP checkpoint.

    Raises:
        CheckpointError: As `export_of_options` and `import_directory`.
    """
    made = export_of_options(None, config=config, specs=specs, like=None, options={"dtype": dtype})
    began = time.monotonic()
    with ByteProgress("import") as progress:
        found = import_directory(
            path,
            target,
            made.spec_by_fqn,
            entry=entry,
            dtype=export_dtype(made.dtype),
            progress=progress,
        )
    return Outcome(
        {
            "source": path,
            "path": found.path,
            "tensors": found.tensors,
            "nbytes": found.nbytes,
            "seconds": round(time.monotonic() - began, 6),
            "missing": list(found.missing),
        },
        exit_codes.PROBLEM if found.missing else exit_codes.OK,
    )


def show_import(value: dict[str, Any], console: Console) -> None:
    """Print what was written, and what the directory lacks."""
    line(console, value["path"], "bold")
    line(
        console,
        f"{count(value['tensors'], 'tensor')}, {size(value['nbytes'])}, "
        f"{duration(value['seconds'])} ({rate(value['nbytes'], value['seconds'])})",
    )
    for name in value["missing"]:
        line(console, f"missing in the directory: {name}", "yellow")
