"""The manager in one process: what it saves, what it refuses, and what it leaves behind."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dcp_hf_writer import CheckpointManager, FirstStep, HFExport, KeepBest, verify
from dcp_hf_writer.errors import (
    CheckpointError,
    ConfigError,
    SaveTimeoutError,
    StorageError,
    TargetExistsError,
)
from dcp_hf_writer.failpoints import set_hook
from dcp_hf_writer.manager.run_directory import RunDirectory
from support.processes import FreshProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((64, 3), value)}, "optim": {"m": torch.full((64, 3), -value)}}


def held(path: Path) -> float:
    found = state(0.0)
    with CheckpointManager(path.parent) as manager:
        assert manager.restore(found, step=int(path.name.partition("-")[2])) is not None
    return float(found["model"]["w"][0, 0])


@pytest.fixture
def slow_saves() -> Iterator[threading.Event]:
    """Hold every save before its manifest until the event is set."""
    go = threading.Event()
    set_hook(lambda point: go.wait(20) if point == "before manifest" else None)  # type: ignore[arg-type,func-returns-value]
    yield go
    go.set()
    set_hook(None)


def test_state_dict_is_made_only_when_a_save_is_due(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(len(made))
        return state(1.0)

    with CheckpointManager(tmp_path, save_every=5) as manager:
        begun = [manager.step(step, make) for step in range(1, 12)]
    assert [step for step, is_begun in enumerate(begun, 1) if is_begun] == [5, 10]
    assert len(made) == 2


def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, slow_saves: threading.Event
) -> None:
    with CheckpointManager(tmp_path, save_every=1) as manager:
        weights = state(1.0)
        manager.step(1, weights)
        weights["model"]["w"].fill_(99.0)
        assert manager.latest() is None
        slow_saves.set()
        manager.wait()
        assert manager.latest() == 1
    assert held(tmp_path / "step-1") == 1.0


def test_next_save_waits_and_says_how_long(tmp_path: Path, slow_saves: threading.Event) -> None:
    reports: list[Any] = []
    with CheckpointManager(
        tmp_path, save_every=1, on_saved=lambda _, __, report: reports.append(report)
    ) as manager:
        manager.step(1, state(1.0))
        threading.Timer(0.5, slow_saves.set).start()
        manager.step(2, state(2.0))
        manager.wait()
    first, second = reports
    assert (first.waited_s, first.step, second.step) == (0.0, 1, 2)
    assert second.waited_s > 0.2


def test_callback_sees_each_step_before_the_next_save_begins(tmp_path: Path) -> None:
    events: list[str] = []

    def make(step: int) -> dict[str, Any]:
        events.append(f"begin {step}")
        return state(float(step))

    with CheckpointManager(
        tmp_path,
        save_every=2,
        export=HFExport(),
        export_every=4,
        on_saved=lambda step, path, _: events.append(f"saved {step} {verify(path).ok}"),
        on_exported=lambda step, _, __: events.append(f"exported {step}"),
    ) as manager:
        for step in range(1, 9):
            manager.step(step, lambda: make(step))  # noqa: B023
    assert events == [
        *("begin 2", "saved 2 True", "begin 4", "saved 4 True", "exported 4"),
        *("begin 6", "saved 6 True", "begin 8", "saved 8 True", "exported 8"),
    ]


def test_wait_ends_at_its_limit_and_close_raises_too(
    tmp_path: Path, slow_saves: threading.Event
) -> None:
    manager = CheckpointManager(tmp_path, save_every=1)
    manager.step(1, state(1.0))
    with pytest.raises(SaveTimeoutError, match="step-1"):
        manager.wait(timeout_s=0.1)
    with pytest.raises(SaveTimeoutError):
        manager.close(timeout_s=0.1)
    slow_saves.set()


def test_snapshot_slot_holds_one_and_resumes(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=4, snapshot_every=1, export=HFExport()) as manager:
        for step in range(1, 8):
            manager.step(step, state(float(step)))
        manager.wait()
        assert sorted(p.name for p in tmp_path.glob("s*-*")) == ["snapshot-7", "step-4"]
        assert (manager.latest(), manager.steps()) == (7, [4, 7])
        assert not (tmp_path / "snapshot-7" / "hf").exists()
        assert manager.path_of(7) == str(tmp_path / "snapshot-7")
    with CheckpointManager(tmp_path, save_every=4, snapshot_every=1) as manager:
        found = state(0.0)
        assert manager.restore(found) == 7
        assert float(found["model"]["w"][0, 0]) == 7.0
        manager.step(8, state(8.0))
        manager.wait()
        assert sorted(p.name for p in tmp_path.glob("s*-*")) == ["step-4", "step-8"]


def test_best_step_by_a_metric_is_kept(tmp_path: Path) -> None:
    losses = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.4}
    with CheckpointManager(
        tmp_path, save_every=1, keep_last=1, keep_best=KeepBest("loss", "min")
    ) as manager:
        for step, loss in losses.items():
            manager.step(step, state(1.0), metrics={"loss": loss})
        manager.wait()
        assert manager.steps() == [2, 4]


def test_pinned_step_outlives_retention(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=1, keep_last=1) as manager:
        manager.step(1, state(1.0))
        manager.wait()
        manager.pin(1)
        for step in (2, 3):
            manager.step(step, state(1.0))
        manager.wait()
        assert manager.steps() == [1, 3]


def test_export_with_the_only_copy_of_weights_stays(tmp_path: Path) -> None:
    with CheckpointManager(
        tmp_path, save_every=1, export=HFExport(), weights="once", export_keep_last=1
    ) as manager:
        for step in (1, 2, 3):
            manager.step(step, state(float(step)))
        manager.wait()
        assert manager.steps() == [1, 2, 3]
    assert held(tmp_path / "step-1") == 1.0


def test_step_of_a_future_that_was_left_is_replaced(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=1) as manager:
        for step in (1, 2, 3):
            manager.step(step, state(float(step)))
    with CheckpointManager(tmp_path, save_every=1) as manager:
        assert manager.restore(state(0.0), step=1) == 1
        manager.step(2, state(20.0))
    assert held(tmp_path / "step-2") == 20.0


def test_step_of_another_run_is_not_replaced(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=1) as manager:
        manager.step(1, state(1.0))
    manager = CheckpointManager(tmp_path, save_every=1)
    manager.step(1, state(5.0))
    with pytest.raises(TargetExistsError):
        manager.close()
    assert held(tmp_path / "step-1") == 1.0


def test_save_by_hand_waits_and_reports(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, export=HFExport(), export_every=10) as manager:
        report = manager.save(3, state(3.0), export=True, wait=True)
        assert report is not None
        assert (report.step, report.has_export, report.attempts) == (3, True, 1)
        assert report.nbytes > 1000
        assert manager.save(4, state(4.0)) is None
    assert (tmp_path / "step-3" / "hf").exists()
    assert not (tmp_path / "step-4" / "hf").exists()


def test_export_that_nobody_described_is_refused(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager, pytest.raises(ConfigError, match="no export"):
        manager.save(1, state(1.0), export=True)


def test_error_in_the_state_dict_is_told_as_a_failed_save(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        msg = "no such shard"
        raise KeyError(msg)

    manager = CheckpointManager(tmp_path, save_every=1)
    manager.step(1, broken)
    with pytest.raises(CheckpointError, match="no such shard"):
        manager.wait()
    manager.step(2, state(2.0))
    manager.wait()
    assert manager.steps() == [2]
    manager.close()


def test_save_that_cannot_fit_is_refused_with_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path, save_every=1)
    monkeypatch.setattr(RunDirectory, "free_nbytes", lambda _: 100)
    with pytest.raises(StorageError, match=r"1536 bytes free .* found 100 bytes"):
        manager.step(1, state(1.0))
    monkeypatch.undo()
    manager.step(2, state(2.0))
    manager.wait()
    assert manager.steps() == [2]
    manager.close()


def test_first_step_of_a_run_is_the_first_that_it_reports(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=FirstStep()) as manager:
        begun = [manager.step(step, state(1.0)) for step in (0, 1, 2)]
    assert begun == [True, False, False]


def test_closed_manager_is_refused_and_close_is_safe_twice(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.close()
    manager.close()
    with pytest.raises(ConfigError, match="closed"):
        manager.step(1, state(1.0))


def fail_in_training(root: Path) -> None:
    with CheckpointManager(root, save_every=1) as manager:
        manager.step(1, state(1.0))
        _ = 1 / 0


def test_error_of_the_training_is_not_hidden_by_the_manager(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_in_training(tmp_path)
    assert CheckpointManager(tmp_path).latest() == 1


def test_overlapped_copies_hold_back_the_optimizer(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(1 << 19))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with CheckpointManager(
        tmp_path, save_every=1, staging="overlap", optimizers=[optimizer]
    ) as manager:
        for step in (1, 2, 3):
            parameter.grad = torch.ones_like(parameter)
            manager.step(step, {"model": {"w": parameter}})
            optimizer.step()
    for step in (1, 2, 3):
        found = {"model": {"w": torch.zeros(1 << 19)}}
        with CheckpointManager(tmp_path) as manager:
            manager.restore(found, step=step)
        assert found["model"]["w"].unique().tolist() == [2.0 - step]


def test_overlap_without_optimizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="optimizers"):
        CheckpointManager(tmp_path, staging="overlap")


def test_save_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with CheckpointManager(tmp_path, save_every=1, keep_last=1) as manager:
        for step in range(1, 4):
            manager.step(step, state(1.0))
    until = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < until:
        time.sleep(0.05)
    assert not {thread.name for thread in left}


@pytest.mark.parametrize("step", [-1, True, 1.5])
def test_step_that_is_no_number_is_refused(tmp_path: Path, step: Any) -> None:
    with CheckpointManager(tmp_path) as manager, pytest.raises(ConfigError, match="step"):
        manager.save(step, state(1.0))


def run_a_job(root: Path, value: float) -> list[int]:
    """Save three steps as a job that does not know of the other."""
    saved: list[int] = []
    with CheckpointManager(
        root, save_every=1, on_failure="warn", on_saved=lambda step, *_: saved.append(step)
    ) as manager:
        for step in (1, 2, 3):
            manager.step(step, state(value))
            manager.wait()
    return saved


def test_two_jobs_in_one_directory_never_mix_their_steps(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with FreshProcess(run_a_job, root, 1.0) as one, FreshProcess(run_a_job, root, 2.0) as other:
        first, second = one.result(), other.result()
    assert sorted(first + second) == [1, 2, 3], "each step belongs to one job"
    for step in (1, 2, 3):
        assert verify(root / f"step-{step}").ok
        assert held(root / f"step-{step}") == (1.0 if step in first else 2.0)
