"""`gc`, `pin` and `unpin`: what a run keeps."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.cli.plain_text import count, size
from dcp_hf_writer.cli.run_command import Outcome, line
from dcp_hf_writer.cli.run_listing import run_to_change
from dcp_hf_writer.manager.keep_house import Housekeeper

if TYPE_CHECKING:
    from rich.console import Console

    from dcp_hf_writer.manager.retention import Retention
    from dcp_hf_writer.manager.run_storage import RunStorage, StoredStep


def collect_garbage(root: str, prefix: str, retention: Retention, *, is_dry: bool) -> Outcome:
    """Delete what dead saves left, replaced snapshots, and what the retention gives up.

    Raises:
        ConfigError: As `run_to_change`.
        StorageError: If the directory cannot be listed.
    """
    run = run_to_change(root, prefix)
    house = Housekeeper(run, retention)
    plan = house.plan()
    before = run.leftovers()
    nbytes = sum(sum(run.sizes_of(one).values()) for one in (*plan.snapshots, *plan.steps))
    nbytes += sum(_export_nbytes(run, one) for one in plan.exports)
    nbytes += sum(one.nbytes for one in before if one.state == "dead")
    if not is_dry:
        run.remove_dead_saves()
        house.run()
    value = {
        "root": run.root,
        "dry_run": is_dry,
        "steps": [one.step for one in plan.steps],
        "exports": [one.step for one in plan.exports],
        "snapshots": [one.step for one in plan.snapshots],
        "leftovers": [asdict(one) for one in before],
        "remaining": [] if is_dry else [one.name for one in run.leftovers()],
        "nbytes": nbytes,
    }
    return Outcome(value)


def _export_nbytes(run: RunStorage, stored: StoredStep) -> int:
    subdir = None if stored.facts is None else stored.facts.export_subdir
    sizes = run.sizes_of(stored) if subdir else {}
    return sum(nbytes for name, nbytes in sizes.items() if name.startswith(f"{subdir}/"))


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
    run = run_to_change(root, prefix)
    run.prepare()
    run.pin(step, is_pinned=is_pinned, may_write=True)
    return Outcome({"root": run.root, "step": step, "is_pinned": is_pinned})


def show_pin(value: dict[str, Any], console: Console) -> None:
    """Print whether the step is pinned now."""
    state = "pinned: retention keeps it" if value["is_pinned"] else "not pinned"
    line(console, f"step {value['step']} is {state}")
