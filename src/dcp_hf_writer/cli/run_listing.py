"""`ls` and `latest`: the steps of a run, and the newest one."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.cli import exit_codes, plain_text
from dcp_hf_writer.cli.run_command import Outcome, line, print_table, row, table
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME
from dcp_hf_writer.manager.open_run import open_run
from dcp_hf_writer.manager.remote_run import RemoteRun
from dcp_hf_writer.manager.step_names import StepNames
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from dcp_hf_writer.manager.run_storage import RunStorage, StoredStep

_STYLES = {"committed": "", "unverified": "yellow", "incomplete": "red"}


def run_to_change(root: str, prefix: str) -> RunStorage:
    """Return the storage of a run, for commands that change it.

    Raises:
        ConfigError: If there is no such directory, if the URL cannot be opened, or if the prefix
            cannot be used.
    """
    run = open_run(root, StepNames(prefix))
    if not is_url(run.root) and not os.path.isdir(run.root):
        raise ConfigError(
            "there is no directory of a run here",
            path=run.root,
            expected=f"a directory with steps such as {StepNames(prefix).name_of(100)}",
            found="a file" if os.path.exists(run.root) else "nothing",
        )
    return run


def read_run(root: str, prefix: str) -> RunStorage | RemoteRun:
    """Return the directory of a run, local or behind a URL, for commands that only read.

    Raises:
        ConfigError: If there is no such directory, or the prefix cannot be used.
        ReadError: If the directory cannot be listed.
    """
    text = plain_path(root)
    return RemoteRun(text, StepNames(prefix)) if is_url(text) else run_to_change(root, prefix)


def list_steps(root: str, prefix: str) -> Outcome:
    """Find the steps of a run.

    Raises:
        ConfigError: As `read_run`.
        ReadError: If the directory cannot be listed.
    """
    run = read_run(root, prefix)
    listing = run.listing()
    latest = _newest_whole(listing)
    value = {
        "root": run.root,
        "latest": None if latest is None else latest.step,
        "steps": [_described(run, stored) for stored in listing],
        "leftovers": [one.name for one in run.leftovers()],
    }
    return Outcome(value)


def find_latest(root: str, prefix: str) -> Outcome:
    """Find the newest whole checkpoint of a run; `PROBLEM` if there is none.

    Raises:
        ConfigError: As `read_run`.
        ReadError: If the directory cannot be listed.
    """
    run = read_run(root, prefix)
    newest = _newest_whole(run.listing(newest_only=True))
    if newest is None or newest.facts is None:
        none = {"step": None, "path": None, "export": None}
        return Outcome({"root": run.root, **none}, exit_codes.PROBLEM)
    subdir = newest.facts.export_subdir
    export = None if subdir is None else os.path.join(newest.path, subdir).rstrip("/")
    if newest.facts.kind == "manifest" and newest.facts.other_half is not None:
        export = newest.facts.other_half
    value = {"root": run.root, "step": newest.step, "path": newest.path, "export": export}
    return Outcome(value)


def _newest_whole(listing: Sequence[StoredStep]) -> StoredStep | None:
    return next((one for one in reversed(listing) if one.facts is not None), None)


def show_latest(value: dict[str, Any], console: Console) -> None:
    """Print the path alone, so that `$(dcp-hf latest ROOT)` works."""
    if value["path"] is None:
        line(console, f"there is no whole checkpoint in {value['root']}", "yellow")
    else:
        console.out(value["path"], highlight=False)


def show_steps(value: dict[str, Any], console: Console) -> None:
    """Print a table of the steps, and why a step is not whole."""
    steps = value["steps"]
    if not steps:
        line(console, f"there are no steps in {value['root']}; --prefix names other directories")
    else:
        _show_table(steps, value["latest"], console)
    for step in steps:
        if step["problem"] is not None:
            line(console, f"{os.path.basename(step['path'])}: {step['problem']}", "red")
    if value["leftovers"]:
        what = plain_text.count(len(value["leftovers"]), "directory").replace("ys", "ies")
        line(
            console,
            f"{what} of saves that run or died, or of deletions; "
            "the next save or dcp-hf gc removes what is dead",
            "yellow",
        )


def _show_table(steps: list[dict[str, Any]], latest: int | None, console: Console) -> None:
    made = table(
        *("step", "state", "DCP", "HF", "ranks", "age", "notes"),
        numbers=("step", "DCP", "HF", "ranks", "age"),
    )
    for step in steps:
        marks = [
            *(["snapshot"] if step["is_snapshot"] else []),
            *(["pinned"] if step["is_pinned"] else []),
            *(["latest"] if step["step"] == latest and step["problem"] is None else []),
            *(["weights once"] if step["weights_once"] else []),
            *([f"other half: {step['other_half']}"] if step["other_half"] else []),
            *(f"{name} {value:g}" for name, value in step["metrics"].items()),
        ]
        row(
            made,
            step["step"],
            step["state"],
            plain_text.size(step["dcp_nbytes"]) if step["dcp_nbytes"] else "-",
            plain_text.size(step["hf_nbytes"]) if step["hf_nbytes"] else "-",
            step["world_size"] or "-",
            "-" if step["age_s"] is None else plain_text.age(step["age_s"]),
            ", ".join(marks),
            style=_STYLES[step["state"]],
        )
    print_table(console, made)


def _described(run: RunStorage | RemoteRun, stored: StoredStep) -> dict[str, Any]:
    facts, notes = stored.facts, run.notes_of(stored)
    sizes = run.sizes_of(stored)
    export, dcp = _nbytes_of_halves(stored, sizes)
    state = "incomplete"
    if facts is not None:
        state = "committed" if facts.kind == "manifest" else "unverified"
    return {
        "step": stored.step,
        "path": stored.path,
        "state": state,
        "problem": stored.problem,
        "kind": None if facts is None else facts.kind,
        "is_snapshot": stored.is_snapshot,
        "is_pinned": notes.is_pinned,
        "metrics": dict(notes.metrics),
        "dcp_nbytes": dcp,
        "hf_nbytes": export,
        "weights_once": facts is not None and facts.needs_export,
        "world_size": None if facts is None else facts.world_size,
        "save_id": None if facts is None else facts.save_id,
        "age_s": None if isinstance(run, RemoteRun) else round(_age_s(stored.path), 3),
        "other_half": None if facts is None else facts.other_half,
    }


def _nbytes_of_halves(stored: StoredStep, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the bytes of the HuggingFace half, and of all other files."""
    subdir = "hf" if stored.facts is None else stored.facts.export_subdir
    below = None if subdir is None else f"{subdir}/" if subdir else ""
    export = sum(n for name, n in sizes.items() if below is not None and name.startswith(below))
    return export, sum(sizes.values()) - export


def _age_s(path: str) -> float:
    """Return the seconds since the commit: the age of the file that commits."""
    for name in (MANIFEST_NAME, METADATA_NAME, ""):
        try:
            return time.time() - os.stat(os.path.join(path, name)).st_mtime
        except OSError:
            continue
    return 0.0
