"""Run one program with torch's writer and reader and with ours, and compare what is loaded.

A row is a function that saves a state dict and loads it into another one, through the `Calls` that
it is given. It runs once for each way of `WAYS`; every way must load what torch alone loads.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.tensor import DTensor

from dcp_hf_writer import HFDualReader, HFDualWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

WAYS: Mapping[str, tuple[str, str, bool]] = {
    "torch": ("torch", "torch", False),
    "save": ("ours", "torch", False),
    "async_save": ("ours", "ours", True),
    "load": ("torch", "ours", False),
}
"""Who writes, who reads, and whether the save is asynchronous."""


@dataclass(slots=True)
class Calls:
    """`dcp.save` and `dcp.load` of one way; every rank has its own."""

    root: Path
    """Directory of the checkpoints of this row and way."""
    way: str
    """One of `WAYS`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of every save and load, such as `no_dist`."""

    def path(self, name: str) -> Path:
        """Return the directory of a checkpoint."""
        return self.root / name

    def writer(self, name: str) -> Any:
        """Make the writer of a checkpoint."""
        is_ours = WAYS[self.way][0] == "ours"
        return HFDualWriter(self.path(name)) if is_ours else dcp.FileSystemWriter(self.path(name))

    def reader(self, name: str) -> Any:
        """Make the reader of a checkpoint."""
        is_ours = WAYS[self.way][1] == "ours"
        return HFDualReader(self.path(name)) if is_ours else dcp.FileSystemReader(self.path(name))

    def save(self, state: dict[str, Any], name: str = "step-1", **options: Any) -> None:
        """Save a state dict, and wait until it is saved."""
        given = {"storage_writer": self.writer(name), **self.options, **options}
        if WAYS[self.way][2]:
            given.pop("no_dist", None)
            dcp.async_save(state, **given).result()
        else:
            dcp.save(state, **given)

    def load(self, state: dict[str, Any], name: str = "step-1", **options: Any) -> dict[str, Any]:
        """Load into a state dict, and return it."""
        given = {"storage_reader": self.reader(name), **self.options, **options}
        dcp.load(state, **given)
        return state

    def load_keys(self, keys: set[str] | str, name: str = "step-1") -> dict[str, Any]:
        """Load by key."""
        return _load_state_dict_from_keys(keys, storage_reader=self.reader(name))


def outcomes_of(
    rows: Mapping[str, Callable[[Calls], Any]], root: Path
) -> dict[str, dict[str, str]]:
    """Run every row in every way on this rank.

    Args:
        rows: The rows, by name; every rank runs all of them, in this order.
        root: A directory that all ranks share.

    Returns:
        For each row, what each way came to: `equal`; else the name of the first value that differs,
        or the error. For `torch`: `ran`, if it loaded anything at all; else the error.
    """
    found: dict[str, dict[str, str]] = {}
    for number, (name, row) in enumerate(rows.items()):
        found[name] = {}
        expected: dict[str, str] = {}
        for way in WAYS:
            calls = Calls(root / f"{number}-{way}", way)
            values: dict[str, str] = {}
            try:
                values = flat(row(calls))
                said = "" if values else "nothing was loaded"
            except BaseException as error:  # noqa: BLE001 - torch's CheckpointException is one
                said = f"{type(error).__name__}: {_last_line(error)}"
            if way == "torch":
                expected = values
            differing = [
                key for key in {**expected, **values} if values.get(key) != expected.get(key)
            ]
            if not said and differing:
                said = f"differs: {differing[0]}"
            found[name][way] = said or ("ran" if way == "torch" else "equal")
            _settle()
    return found


def _settle() -> None:
    """Let every rank end a row before any rank begins the next: one may have failed early."""
    if dist.is_initialized():
        dist.barrier()


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Return a text for each value of a nested state dict that tells all of its bits."""
    if isinstance(value, dict):
        return {k: v for key, one in value.items() for k, v in flat(one, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        parts = (flat(one, f"{name}/{i}") for i, one in enumerate(value))
        return {k: v for part in parts for k, v in part.items()}
    if isinstance(value, (set, frozenset)):
        # Equal sets may list their members in another order.
        return {name: f"{type(value).__name__} {sorted(map(repr, value))}"}
    return {name: _text(value)}


def _text(value: Any) -> str:
    if isinstance(value, ShardedTensor):
        shards = [(one.metadata.shard_offsets, _text(one.tensor)) for one in value.local_shards()]
        return f"{tuple(value.size())} {shards}"
    if isinstance(value, DTensor):
        return f"{value.placements} of {tuple(value.shape)}: {_text(value.to_local())}"
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.tolist()}"
    if isinstance(value, io.BytesIO):
        return f"BytesIO {value.getvalue()!r}"
    return f"{type(value).__name__} {value!r}"
