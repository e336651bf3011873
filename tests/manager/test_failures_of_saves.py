"""A save of a run fails: every rank learns it, the policy acts, and what was there stays."""

from __future__ import annotations

import errno
import signal
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer import CheckpointManager, Retry
from dcp_hf_writer.errors import ExportError, WriteError
from support.faults import BadCall, Strike, check_storage, hits
from support.managed_runs import Seen, run_with_faults
from support.ranks import run_ranks, spawn_ranks

if TYPE_CHECKING:
    from pathlib import Path

    from support.faults import Fault

NO_SPACE = BadCall(rank=1, name="pwritev", errno=errno.ENOSPC, file="__1_0.distcp", times=99)
NO_SPACE_ONCE = BadCall(rank=1, name="pwritev", errno=errno.ENOSPC, file="__1_0.distcp")
NO_EXPORT = BadCall(rank=1, name="pwrite", errno=errno.EIO, file="model-*.safetensors", times=99)


def runs(root: Path, steps: list[int], faults: dict[int, Fault], **options: Any) -> list[Seen]:
    found = run_ranks(run_with_faults, 2, root, steps, faults, {"save_every": 1, **options})
    assert len(hits(root)) >= len(faults), "the fault did not strike"
    return found


def notes_aside(root: Path) -> None:
    """Move what the manager keeps beside the checkpoints, so that `check_storage` sees these."""
    (root / ".dcp-hf-manager").rename(root.parent / f"{root.name}.notes")
    for name in ("latest", "hf-latest"):
        (root / name).unlink(missing_ok=True)


def test_every_rank_gets_the_error_of_one_and_the_next_save_succeeds(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for seen in runs(root, [1, 2, 3], {2: NO_SPACE}):
        assert seen.errors() == {2: WriteError}
        assert "rank 1" in str(seen.raised[2].error)
        assert (seen.saved, seen.exported, seen.steps) == ([1, 3], [1, 3], [1, 3])
    notes_aside(root)
    check_storage(root, {"step-1": 1, "step-3": 3})


def test_save_is_tried_again_from_the_same_snapshot(tmp_path: Path) -> None:
    root = tmp_path / "run"
    policy = Retry(times=2, pause_s=0.05)
    for seen in runs(root, [1, 2], {2: NO_SPACE_ONCE}, on_failure=policy):
        assert seen.errors() == {}
        assert seen.attempts == {1: 1, 2: 2}
    notes_aside(root)
    check_storage(root, {"step-1": 1, "step-2": 2})


def test_error_comes_after_the_last_try(tmp_path: Path) -> None:
    root = tmp_path / "run"
    policy = Retry(times=1, pause_s=0.05)
    for seen in runs(root, [1, 2, 3], {2: NO_SPACE}, on_failure=policy):
        assert seen.errors() == {2: WriteError}
        assert seen.steps == [1, 3]
    assert len(hits(root)) == 2


def test_failure_that_is_only_warned_of_does_not_stop_the_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for seen in runs(root, [1, 2, 3], {2: NO_SPACE}, on_failure="warn"):
        assert seen.errors() == {}
        assert (seen.saved, seen.latest) == ([1, 3], 3)


def test_failed_export_leaves_the_resumable_half(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for seen in runs(root, [1, 2], {2: NO_EXPORT}):
        assert seen.errors() == {2: ExportError}
        assert (seen.saved, seen.exported, seen.steps) == ([1, 2], [1], [1, 2])
    assert (root / "hf-latest").resolve() == root / "step-1" / "hf"
    assert (root / "latest").resolve() == root / "step-2"
    notes_aside(root)
    check_storage(root, {"step-1": 1, "step-2": 2}, without_export=["step-2"])


@pytest.mark.parametrize("rank", [0, 1])
def test_error_outside_the_storage_is_known_on_all_ranks(tmp_path: Path, rank: int) -> None:
    root = tmp_path / "run"
    strike = Strike(rank=rank, point="local plan", action="raise")
    for seen in runs(root, [1, 2, 3], {2: strike}):
        assert list(seen.raised) == [2]
        assert "injected at local plan" in str(seen.raised[2].error)
        assert seen.steps == [1, 3]


def told(failure: Any) -> None:
    msg = f"told of step {failure.step} on rank {failure.rank} after {failure.attempts}"
    raise LookupError(msg)


def test_function_is_called_on_every_rank_and_its_error_comes_up(tmp_path: Path) -> None:
    root = tmp_path / "run"
    found = runs(root, [1, 2, 3], {2: NO_SPACE}, on_failure=told)
    texts = [str(seen.raised[2].error) for seen in found]
    assert texts == [f"told of step 2 on rank {rank} after 1" for rank in (0, 1)]


def test_stop_ends_every_rank_with_the_signal_of_an_orderly_end(tmp_path: Path) -> None:
    root = tmp_path / "run"
    options = {"save_every": 1, "on_failure": "stop"}
    with spawn_ranks(run_with_faults, 2, root, [1, 2, 3], {2: NO_SPACE}, options) as handle:
        codes = [outcome.exitcode for outcome in handle.outcomes()]
    assert codes == [-signal.SIGTERM, -signal.SIGTERM]
    assert len(hits(root)) == 1
    with CheckpointManager(root) as manager:
        assert manager.steps() == [1]
