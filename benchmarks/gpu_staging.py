"""Measure the copies of one process from its GPU to the host, and what a running step notices."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpu_device import Device, Reporter, allow_many_files, lacks_shared_memory
from gpu_stagers import (
    BareEach,
    BareOne,
    Copier,
    Ours,
    OursOverlap,
    TorchDefault,
    TorchKept,
    on_device,
    reuse_problem,
)
from gpu_step import measure_step
from llama import build_on, tensors_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama import Llama
    from ranks import Rank

_RESERVE_S = 5.0
"""Time to keep for what ends a section."""
_PEER_ROUNDS = 3
"""A copy into new memory takes torch 9 s for 12 GB, the same within 1 % each time."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What one process measures."""

    model: Llama
    """Shapes of the state dict."""
    adam: bool
    """Whether Adam's moments are in it."""
    device: str
    """`cuda` or `cpu`."""
    rounds: int
    """Most rounds."""
    deadline: float
    """`time.monotonic()` after which nothing new begins."""


def measure_staging(rank: Rank, setting: Setting) -> None:
    """Body of the process: what matters most comes first, since time may run out."""
    device, report = Device(setting.device), Reporter(rank, setting.deadline)
    allow_many_files()
    device.select()
    report.fact(device=device.facts())
    state_dict = build_on(setting.device, setting.model, adam=setting.adam)
    device.synchronize()
    nbytes = sum(tensor.nbytes for tensor in on_device(state_dict, device))
    report.fact(nbytes=nbytes, tensors=len(list(tensors_of(state_dict))))
    # A collection before each copy would look at all of torch's objects again, for 0.1 s.
    gc.collect()
    gc.freeze()
    ours, overlap = Ours(state_dict, device), OursOverlap(state_dict, device)
    one = BareOne(state_dict, device)
    close: list[Copier] = [ours, overlap, one, BareEach(one)]
    ready: list[Copier] = []
    first_s = 0.0
    for copier in close:
        with report.part(f"first copy: {copier.name}"):
            first_s = max(first_s, _first(copier, report))
            ready.append(copier)
    with report.part("rounds without torch's stagers"):
        _rounds(ready, setting.rounds, report)
    for copier in (ours, overlap):
        with report.part(f"device memory: {copier.name}"):
            _measure_memory(copier, device, report)
    with report.part("beside a running step"):
        copy_s = statistics.median(copier.timed().total_s for copier in [ours] * 3)
        measure_step(state_dict, device, report, copy_s=copy_s, rounds=setting.rounds)
    with report.part("rounds with torch's stagers"):
        # Their first copies also make memory of that size, one of them piece by piece.
        reserve_s = 1.5 * first_s + _RESERVE_S
        _measure_peers(ours, report, rounds=min(setting.rounds, _PEER_ROUNDS), reserve_s=reserve_s)


def _measure_peers(ours: Copier, report: Reporter, *, rounds: int, reserve_s: float) -> None:
    """Copy in turns with each of torch's stagers, as far as time and memory allow."""
    nbytes = sum(tensor.nbytes for tensor in tensors_of(ours.state_dict))
    if reuse_problem() is not None:
        report.fact(reuse_problem=reuse_problem())
    for kind in (TorchKept, TorchDefault):
        lacking = lacks_shared_memory(nbytes) if kind is TorchKept else None
        if lacking is not None or report.left_s < reserve_s:
            report.skip(kind.name, lacking or "no time was left")
            continue
        with report.peer(kind.name):
            peer = kind(ours.state_dict, ours.device)
            if peer.keeps_memory:
                _first(peer, report)
            _rounds([ours, peer], rounds, report, prefix="in turns: ")


def _first(copier: Copier, report: Reporter) -> float:
    start = time.perf_counter()
    copier.timed()
    seconds = time.perf_counter() - start
    report.sample(f"first: {copier.name}", seconds=seconds)
    return seconds


def _rounds(copiers: Sequence[Copier], rounds: int, report: Reporter, prefix: str = "") -> None:
    """Copy in turns, in an order that rotates; at least one round, then while there is time."""
    took_s = 0.0
    for number in range(rounds):
        if number and report.left_s < took_s + _RESERVE_S:
            what = f"{prefix}{copiers[-1].name}, rounds from {number + 1} on"
            report.skip(what, "no time was left")
            return
        start = time.monotonic()
        turn = number % len(copiers)
        for copier in [*copiers[turn:], *copiers[:turn]]:
            gc.collect()
            copied = copier.timed()
            report.sample(prefix + copier.name, stall_s=copied.stall_s, total_s=copied.total_s)
        took_s = time.monotonic() - start


def _measure_memory(copier: Copier, device: Device, report: Reporter) -> None:
    gc.collect()
    device.synchronize()
    before = device.memory()
    device.reset_peak()
    copier.timed()
    gc.collect()
    report.sample(
        f"memory: {copier.name}", peak=device.peak() - before, after=device.memory() - before
    )
