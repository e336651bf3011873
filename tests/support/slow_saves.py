"""Saves that stop at a point until the test lets them go on, to be looked at from outside."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, failpoints
from dcp_hf_writer.manager.saves_in_flight import SaveInFlight, saves_in_flight
from support.named_bytes import EXPORT, sharded_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcp_hf_writer.save.progress_heartbeat import Heartbeat

LIMIT_S = 60.0
_POLL_S = 0.02


@dataclass(frozen=True)
class Gate:
    """A file that other processes wait for; its place must not exist yet."""

    path: Path
    point: str
    """Point of a save at which it stands."""
    only: int = -1
    """The rank that waits; `-1` for all."""

    def open(self, *, once: bool = False) -> None:
        """Let the processes through, or with `once`, let one through one time."""
        (self.path.with_suffix(".once") if once else self.path).touch()

    def wait(self) -> None:
        """Wait until the gate is open."""
        until = time.monotonic() + LIMIT_S
        while not self.path.exists():
            try:
                os.unlink(self.path.with_suffix(".once"))
            except FileNotFoundError:
                assert time.monotonic() < until, "the test never opened the gate"
                time.sleep(_POLL_S)
            else:
                return


def save_through_gate(rank: int, world_size: int, target: Path, gate: Gate) -> None:
    """Save a small state; wait where the gate stands, at each passage."""

    def wait(reached: str) -> None:
        if reached == gate.point and gate.only in {-1, rank}:
            gate.wait()

    failpoints.set_hook(wait)
    dcp.save(sharded_state(1), storage_writer=HFDualWriter(target, export=EXPORT))


def wait_for_heartbeats(
    root: Path, is_enough: Callable[[tuple[Heartbeat, ...]], bool]
) -> SaveInFlight:
    """Wait until the only save in flight has told enough."""
    until = time.monotonic() + LIMIT_S
    while True:
        for save in saves_in_flight(str(root)):
            if is_enough(save.heartbeats):
                return save
        assert time.monotonic() < until, "no such heartbeats came"
        time.sleep(_POLL_S)
