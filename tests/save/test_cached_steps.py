"""`page_cache=`: only the newest checkpoint, and the one being written, stay in the page cache."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer import HFDualWriter, failpoints
from dcp_hf_writer.errors import CheckpointError, ConfigError
from dcp_hf_writer.save.cached_steps import CachedSteps
from dcp_hf_writer.storage.output_fsync import OpenFiles
from support.cached_pages import cached_nbytes, require_page_cache, wait_until_dropped
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(120)

STATE = {"model": {"a": torch.arange(65536.0), "b": torch.ones(300, 300)}, "step": 1}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Directory of a run, on a file system that has a device."""
    require_page_cache(tmp_path)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _no_hook() -> Iterator[None]:
    yield
    failpoints.set_hook(None)


def save(path: Path, **options: Any) -> None:
    dcp.async_save(STATE, storage_writer=HFDualWriter(path, **options)).result()


def weight_files(step: Path) -> list[Path]:
    found = [*step.rglob("*.distcp"), *step.rglob("*.safetensors")]
    assert len(found) > 1
    return found


def assert_cached(step: Path) -> None:
    for path in weight_files(step):
        assert cached_nbytes(path) >= path.stat().st_size, path


def is_cached(step: Path) -> bool:
    return any(cached_nbytes(path) for path in weight_files(step))


def test_the_checkpoint_before_the_newest_leaves_when_the_next_save_writes(run: Path) -> None:
    for number in (1, 2):
        save(run / f"step-{number}")
    assert_cached(run / "step-1")
    save(run / "step-3")
    wait_until_dropped(weight_files(run / "step-1"))
    assert_cached(run / "step-2")
    assert_cached(run / "step-3")
    loaded = {"model": {name: torch.zeros_like(t) for name, t in STATE["model"].items()}}
    dcp.load(loaded, checkpoint_id=run / "step-1")
    for name, tensor in STATE["model"].items():
        assert torch.equal(loaded["model"][name], tensor)


def test_one_writer_for_all_steps_does_the_same(run: Path) -> None:
    writer = HFDualWriter(run / "unused")
    for number in (1, 2, 3):
        dcp.save(STATE, checkpoint_id=run / f"step-{number}", storage_writer=writer)
    wait_until_dropped(weight_files(run / "step-1"))
    assert_cached(run / "step-2")


def test_all_leaves_the_page_cache_to_the_kernel(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(OpenFiles, "drop_from_page_cache", lambda _, path: dropped.append(path))
    for number in (1, 2, 3):
        save(run / f"step-{number}", page_cache="all")
    assert dropped == []
    save(run / "step-4")
    assert {Path(path).parts[len(run.parts)] for path in dropped} == {"step-1", "step-2"}


def test_a_failed_save_does_not_make_the_newest_checkpoint_leave(run: Path) -> None:
    save(run / "step-1")

    def fail(point: str) -> None:
        if point == "before rename":
            msg = "injected"
            raise CheckpointError(msg)

    for number in (2, 3):
        failpoints.set_hook(fail)
        with pytest.raises(CheckpointException, match="injected"):
            dcp.save(STATE, storage_writer=HFDualWriter(run / f"step-{number}"))
    failpoints.set_hook(None)
    save(run / "step-4")
    assert_cached(run / "step-1")
    save(run / "step-5")
    wait_until_dropped(weight_files(run / "step-1"))
    assert_cached(run / "step-4")


def test_a_deleted_checkpoint_is_no_error(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2):
        save(run / f"step-{number}")
    shutil.rmtree(run / "step-1")
    with caplog.at_level(logging.INFO, "dcp_hf_writer"):
        save(run / "step-3")
    assert "page cache" not in caplog.text


def test_a_reused_file_stays_for_the_checkpoint_that_links_to_it(run: Path) -> None:
    frozen = {"model": {"a": torch.ones(200000)}}
    writer = HFDualWriter(run / "step-1")
    dcp.save(frozen, storage_writer=writer)
    for number in (2, 3):
        before = run / f"step-{number - 1}"
        writer = HFDualWriter(run / f"step-{number}", reuse=before, share="off")
        dcp.save(frozen, storage_writer=writer)
    names = [path for path in (run / "step-3").rglob("*.safetensors") if path.stat().st_nlink > 1]
    if not names:
        pytest.skip("the file system clones blocks, so no file was linked")
    for path in names:
        assert cached_nbytes(path) >= path.stat().st_size


def test_runs_in_different_directories_do_not_disturb_each_other(run: Path) -> None:
    save(run / "one" / "step-1")
    for number in (1, 2, 3):
        save(run / "other" / f"step-{number}")
    assert_cached(run / "one" / "step-1")


def save_thrice(rank: int, world_size: int, root: Path) -> None:
    for number in (1, 2, 3):
        writer = HFDualWriter(root / f"step-{number}")
        dcp.async_save(STATE, storage_writer=writer).result()


def test_each_rank_drops_what_it_wrote(run: Path) -> None:
    run_ranks(save_thrice, 2, run)
    wait_until_dropped(weight_files(run / "step-1"))
    assert is_cached(run / "step-2")


def test_unknown_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="page_cache"):
        HFDualWriter(tmp_path / "step-1", page_cache="none")  # type: ignore[arg-type]


def test_memory_of_what_was_written_is_bounded(tmp_path: Path) -> None:
    steps = CachedSteps()
    for number in range(100):
        steps.note(str(tmp_path / f"run-{number}" / "step"), ["a"])
        steps.note(str(tmp_path / "run" / f"step-{number}"), ["a"])
    os.mkdir(tmp_path / "run")
    os.mkdir(tmp_path / "run" / "step-99")
    outdated = steps.take_outdated(str(tmp_path / "run" / "step-100"))
    assert outdated == [str(tmp_path / "run" / f"step-{n}" / "a") for n in range(92, 99)]
    assert steps.take_outdated(str(tmp_path / "run" / "step-101")) == []
    os.makedirs(tmp_path / "run-0" / "step")
    assert steps.take_outdated(str(tmp_path / "run-0" / "next")) == []


def test_a_checkpoint_that_is_replaced_counts_once(tmp_path: Path) -> None:
    steps = CachedSteps()
    os.mkdir(tmp_path / "latest")
    for _ in range(3):
        assert steps.take_outdated(str(tmp_path / "latest")) == []
        steps.note(str(tmp_path / "latest"), ["a"])
