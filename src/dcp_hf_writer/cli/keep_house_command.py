"""`gc`, `pin` and `unpin`: what a run keeps."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.cli.plain_text import count, size
from dcp_hf_writer.cli.run_command import Outcome, line
from dcp_hf_writer.cli.run_listing import leftovers, open_run
from dcp_hf_writer.formats.names_on_disk import INCOMPLETE, RECORD_NAME
from dcp_hf_writer.manager.keep_house import Housekeeper
from dcp_hf_writer.manager.step_names import DELETED_PREFIX
from dcp_hf_writer.save.owner_process import Owner, is_abandoned
from dcp_hf_writer.save.recover_targets import recover_parent
from dcp_hf_writer.save.replace_target import read_json
from dcp_hf_writer.storage.open_directory import open_directory

if TYPE_CHECKING:
    from rich.console import Console

    from dcp_hf_writer.manager.retention import Retention
    from dcp_hf_writer.manager.run_directory import StoredStep


def collect_garbage(root: str, prefix: str, retention: Retention, *, is_dry: bool) -> Outcome:
    """Delete what dead saves left, replaced snapshots, and what the retention gives up.

    Raises:
        ConfigError: As `open_run`.
        StorageError: If the directory cannot be listed.
    """
    run = open_run(root, prefix)
    house = Housekeeper(run, retention)
    plan = house.plan()
    before = [_leftover(run.root, name) for name in leftovers(run.root)]
    nbytes = sum(_nbytes(one.path) for one in (*plan.snapshots, *plan.steps))
    nbytes += sum(_export_nbytes(one) for one in plan.exports)
    nbytes += sum(one["nbytes"] for one in before if one["state"] == "dead")
    if not is_dry:
        recover_parent(run.root, "")
        house.run()
    value = {
        "root": run.root,
        "dry_run": is_dry,
        "steps": [one.step for one in plan.steps],
        "exports": [one.step for one in plan.exports],
        "snapshots": [one.step for one in plan.snapshots],
        "leftovers": before,
        "remaining": [] if is_dry else leftovers(run.root),
        "nbytes": nbytes,
    }
    return Outcome(value)


def _leftover(root: str, name: str) -> dict[str, Any]:
    return {"name": name, "state": _state(root, name), "nbytes": _nbytes(os.path.join(root, name))}


def _state(root: str, name: str) -> str:
    """Tell whether a process still works on a leftover: `dead`, `alive` or `unknown`."""
    if name.startswith(DELETED_PREFIX):
        return "dead"
    record = read_json(os.path.join(root, name, RECORD_NAME)) or {}
    owner = Owner.from_json(record.get("owner"))
    if owner is None:
        return "unknown"
    abandoned = is_abandoned(name.removeprefix(INCOMPLETE), owner)
    return "unknown" if abandoned is None else "dead" if abandoned else "alive"


def _nbytes(path: str) -> int:
    return sum(open_directory(path).tree().values()) if os.path.isdir(path) else 0


def _export_nbytes(stored: StoredStep) -> int:
    subdir = None if stored.facts is None else stored.facts.export_subdir
    return 0 if not subdir else _nbytes(os.path.join(stored.path, subdir))


def show_garbage(value: dict[str, Any], console: Console) -> None:
    """Print what was deleted, or would be."""
    verb = "would delete" if value["dry_run"] else "deleted"
    kinds = {"steps": "step", "exports": "the export of step", "snapshots": "the snapshot of step"}
    for kind, what in kinds.items():
        for step in value[kind]:
            line(console, f"{verb} {what} {step}")
    for one in value["leftovers"]:
        what = f"{one['name']} ({size(one['nbytes'])})"
        if one["name"] in value["remaining"] or one["state"] != "dead":
            line(console, f"kept {what}: its save is {one['state']}", "yellow")
        else:
            line(console, f"{verb} {what}, left by a dead save or deletion")
    number = sum(len(value[kind]) for kind in kinds)
    dead = sum(one["state"] == "dead" for one in value["leftovers"])
    if not number + dead:
        line(console, "there is nothing to delete")
    else:
        line(console, f"{verb} {count(number + dead, 'item')}, {size(value['nbytes'])}", "bold")


def pin(root: str, prefix: str, step: int, *, is_pinned: bool) -> Outcome:
    """Pin a step, or undo it.

    Raises:
        ConfigError: If there is no whole checkpoint of the step.
        StorageError: If the note cannot be written.
    """
    run = open_run(root, prefix)
    run.prepare()
    run.pin(step, is_pinned=is_pinned, may_write=True)
    return Outcome({"root": run.root, "step": step, "is_pinned": is_pinned})


def show_pin(value: dict[str, Any], console: Console) -> None:
    """Print whether the step is pinned now."""
    state = "pinned: retention keeps it" if value["is_pinned"] else "not pinned"
    line(console, f"step {value['step']} is {state}")
