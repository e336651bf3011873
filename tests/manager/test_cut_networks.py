"""The network between the ranks of a run is cut during a save (N2): both are told in time."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from dcp_hf_writer.errors import SaveTimeoutError
from support.faults import Strike, hits
from support.hosts import Host, two_hosts, why_no_hosts
from support.managed_runs import Seen, managed, report_steps
from support.processes import FreshProcess

if TYPE_CHECKING:
    from pathlib import Path

PORT = 29500
"""A port of the first host, whose network nobody else uses."""
TIMEOUT_S = 6.0
LATE_S = 20.0
"""The watchdog of the save, the wait for other ranks, and one request to a store that is gone."""


def run_until_cut(rank: int, hosts: tuple[Host, Host], root: Path) -> tuple[Seen, float]:
    """Save a step; the link goes down in the second; returns when that was told, in seconds."""
    hosts[rank].join()
    address = f"tcp://{hosts[0].address}:{PORT}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    seen = Seen()
    strike = Strike(rank=1, point="mid dcp", action="call", call=lambda _: hosts[1].cut_link())
    with managed(root, seen, save_every=1, timeout_s=TIMEOUT_S) as manager:
        report_steps(manager, seen, [1])
        began = time.monotonic()
        with strike.installed(rank, root):
            report_steps(manager, seen, [2])
        took_s = time.monotonic() - began
    return seen, took_s


def tell_and_leave(rank: int, hosts: tuple[Host, Host], root: Path, path: Path) -> None:
    """Write down what was seen, and end without waiting for threads that the network holds."""
    seen, took_s = run_until_cut(rank, hosts, root)
    error = seen.raised[2].error
    is_expected = isinstance(error, SaveTimeoutError)
    path.write_text(f"{is_expected} {took_s < TIMEOUT_S + LATE_S} {seen.steps} {error}")
    os._exit(0)


@pytest.mark.slow
def test_both_ranks_are_told_by_the_deadline_when_the_network_is_cut(tmp_path: Path) -> None:
    reason = why_no_hosts(tmp_path)
    if reason is not None:
        pytest.skip(reason)
    root = tmp_path / "run"
    paths = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
    with (
        two_hosts(tmp_path) as hosts,
        FreshProcess(tell_and_leave, 0, hosts, root, paths[0], timeout_s=100) as first,
        FreshProcess(tell_and_leave, 1, hosts, root, paths[1], timeout_s=100) as second,
    ):
        assert [process.exitcode() for process in (first, second)] == [0, 0]
    assert hits(root) == ["1 call mid dcp"]
    for path in paths:
        assert path.read_text().startswith("True True [1] "), path.read_text()
