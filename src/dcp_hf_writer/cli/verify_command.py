"""`verify`: check a checkpoint, or every step of a run."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.check.verify import VerifyReport, verify
from dcp_hf_writer.cli import exit_codes
from dcp_hf_writer.cli.byte_progress import ByteProgress
from dcp_hf_writer.cli.plain_text import count, duration, rate, size
from dcp_hf_writer.cli.run_command import Outcome, line
from dcp_hf_writer.cli.run_listing import read_run
from dcp_hf_writer.errors import ReadError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME, is_hf_directory
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 20
"""Problems of one checkpoint that a terminal shows; `--json` lists all."""


def verify_all(path: str, *, prefix: str, threads: int | None) -> Outcome:
    """Check the checkpoint at `path`, or each step if `path` is the directory of a run.

    Raises:
        ConfigError: If an argument cannot be used as given.
        ReadError: If the directory of a run cannot be listed.
    """
    reports = []
    for one in _checkpoints(path, prefix):
        with ByteProgress(f"verify {os.path.basename(one.rstrip('/'))}") as progress:
            reports.append(verify(one, progress=progress, threads=threads))
    is_ok = all(report.ok for report in reports)
    value = {"ok": is_ok, "checkpoints": [_as_json(report) for report in reports]}
    return Outcome(value, exit_codes.OK if is_ok else exit_codes.PROBLEM)


def show_reports(value: dict[str, Any], console: Console) -> None:
    """Print one line for each checkpoint, and its problems."""
    for report in value["checkpoints"]:
        is_ok = report["ok"]
        text = "ok" if is_ok else count(len(report["problems"]), "problem")
        line(console, f"{report['path']}: {text}", "green" if is_ok else "red")
        line(console, f"  {_extent(report)}")
        for kind, style in (("problems", "red"), ("warnings", "yellow")):
            for one in report[kind][:_SHOWN]:
                line(console, f"  {kind[:-1]}: {one['text']}", style)
            if len(report[kind]) > _SHOWN:
                line(console, f"  ... and {len(report[kind]) - _SHOWN} more {kind}", style)


def _extent(report: dict[str, Any]) -> str:
    text = f"{count(report['file_count'], 'file')}, {duration(report['seconds'])}"
    if report["checked"] == "digests":
        nbytes = report["nbytes"]
        compared = f"{count(report['digest_count'], 'digest')} of {size(nbytes)} compared"
        return f"{compared} ({rate(nbytes, report['seconds'])}), {text}"
    if report["checked"] == "structure":
        return f"structure only, because there is no manifest with digests; {text}"
    return f"nothing to check; {text}"


def _checkpoints(path: str, prefix: str) -> list[str]:
    """Return the path itself, or the steps below it if only they are checkpoints."""
    text = plain_path(path)
    is_remote = is_url(text)
    if not is_remote and not os.path.isdir(text):
        return [text]
    try:
        names = open_directory(text).names()
        if MANIFEST_NAME in names or METADATA_NAME in names or is_hf_directory(names):
            return [text]
        steps = read_run(text, prefix).listing()
    except ReadError:
        # `verify` says what is wrong with the place.
        return [text]
    return [step.path for step in steps] or [text]


def _as_json(report: VerifyReport) -> dict[str, Any]:
    value = asdict(report)
    for kind in ("problems", "warnings"):
        found = getattr(report, kind)
        value[kind] = [{**asdict(problem), "text": str(problem)} for problem in found]
    value["seconds"] = round(report.seconds, 6)
    return {"ok": report.ok, **value}
