"""Runs of a `CheckpointManager` on stores: a small state whose values tell the step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer import CheckpointManager, HFExport
from dcp_hf_writer.manager.run_on_store import RunOnStore
from dcp_hf_writer.manager.step_names import StepNames
from support import shared_store
from support.store_saves import CONFIG, Store

if TYPE_CHECKING:
    from pathlib import Path

    from support.s3_servers import S3Server

SINGLE_KINDS = ("memory", "shareddir", "moto", "rclone")


class Counter:
    """An object of a rank, such as a dataloader."""

    def __init__(self, count: int = 0) -> None:
        """Begin at a number."""
        self.count = count

    def state_dict(self) -> dict[str, int]:
        """Return the number."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the number of a saved state."""
        self.count = state["count"]


def store_of(kind: str, path: Path, s3: S3Server | None) -> Store:
    """Return an empty store of a kind."""
    if kind == "memory":
        return Store(f"memory://run{path}")
    if kind == "shareddir":
        return Store.shared(path / "store")
    assert s3 is not None
    return Store.of_bucket(s3.new_bucket())


def storage_of(store: Store, **options: Any) -> RunOnStore:
    """Return the storage of the run."""
    shared_store.register()
    return RunOnStore(store.url, StepNames(), store.storage_options, **options)


def manager_on(store: Store, **options: Any) -> CheckpointManager:
    """Make a manager; all ranks call it."""
    shared_store.register()
    given: dict[str, Any] = {
        "export": HFExport(assets={"config.json": CONFIG}),
        "storage_options": dict(store.storage_options) or None,
        "timeout_s": 60,
        "host_budget_bytes": 1 << 20,
        "save_rng": False,
    }
    return CheckpointManager(store.url, **{**given, **options})


def small_state(step: float) -> dict[str, Any]:
    """Return a state dict that names a step."""
    return {
        "model": {"w": torch.full((64, 3), float(step))},
        "optim": {"m": torch.full((64, 3), -float(step))},
    }


def step_held(state: dict[str, Any]) -> float:
    """Return the step that all of a state dict names."""
    values = {float(x) for x in state["model"]["w"].flatten()}
    values |= {-float(x) for x in state["optim"]["m"].flatten()}
    (step,) = values
    return step


def pointer(store: Store, name: str) -> dict[str, Any]:
    """Return what `latest` or `hf-latest` holds."""
    found = json.loads(store.files("")[name])
    assert isinstance(found, dict)
    return found


def steps_with_objects(store: Store) -> dict[str, set[str]]:
    """Return the objects of each step and snapshot, past the code under test."""
    found: dict[str, set[str]] = {}
    for key in store.files(""):
        name, _, within = key.partition("/")
        if within and name != ".dcp-hf-manager":
            found.setdefault(name, set()).add(within)
    return found
