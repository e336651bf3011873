"""The checkpointer process of a run is killed or stopped (P10): the run goes on without it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer.errors import SaveAbortedError, SaveTimeoutError
from support.faults import hits
from support.managed_runs import Seen, managed, report_steps
from support.ranks import run_ranks
from support.struck_process import StruckPlanner

if TYPE_CHECKING:
    from dcp_hf_writer import SaveFailure


class PlannerOnce(StruckPlanner):
    """Strikes once, when a file asks for it."""

    def resolve_data(self, write_item: Any) -> Any:
        """Strike at the first tensor of the optimizer, if the file is there."""
        is_meant = self.sig is not None and write_item.index.fqn == "optim.embed"
        self.until = 0.0
        if is_meant and armed(self.root).exists():
            armed(self.root).unlink()
            self.until = float("inf")
        return super().resolve_data(write_item)


def armed(root: Path) -> Path:
    return Path(f"{root}.armed")


def run_and_lose_the_process(
    rank: int, world_size: int, root: Path, sig: signal.Signals, timeout_s: float
) -> Seen:
    """Save step 1; lose the process of the last rank in step 2; save step 3."""
    seen = Seen()
    told: list[tuple[int, str]] = []

    def on_failure(failure: SaveFailure) -> None:
        told.append((failure.step, type(failure.error).__name__))
        raise failure.error

    planner = PlannerOnce(root, sig if rank == world_size - 1 else None)
    with managed(
        root,
        seen,
        save_every=1,
        checkpointer="process",
        planner=planner,
        timeout_s=timeout_s,
        on_failure=on_failure,
    ) as manager:
        report_steps(manager, seen, [1])
        if rank == world_size - 1:
            armed(root).touch()
        report_steps(manager, seen, [2, 3])
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        seen.values = {"told": told, "children": [int(pid) for pid in children]}
    return seen


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("sig", "world_size"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 2, marks=pytest.mark.slow),
    ],
)
def test_next_save_starts_another_process_when_the_checkpointer_process_is(
    tmp_path: Path, sig: signal.Signals, world_size: int
) -> None:
    root = tmp_path / "run"
    kind = SaveAbortedError if sig == signal.SIGKILL else SaveTimeoutError
    # The deadline includes the start of the process, which takes long on a busy machine.
    timeout_s = 90.0 if sig == signal.SIGKILL else 45.0
    found = run_ranks(run_and_lose_the_process, world_size, root, sig, timeout_s, timeout_s=380)
    (struck,) = hits(root)
    for seen in found:
        assert list(seen.raised) == [2]
        assert isinstance(seen.raised[2].error, kind)
        assert seen.values["told"] == [(2, type(seen.raised[2].error).__name__)]
        assert (seen.saved, seen.steps) == ([1, 3], [1, 3])
        assert int(struck) not in seen.values["children"]
    assert not list(root.glob(".incomplete*"))
