"""`page_cache=`: only the newest checkpoint, and the one being written, stay in the page cache."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer import HFDualWriter, HFExport, failpoints
from dcp_hf_writer.errors import CheckpointError, ConfigError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.save import cached_steps
from dcp_hf_writer.save.cached_steps import CACHED_STEPS, CachedSteps, Series
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


def publish(step: Path) -> None:
    step.mkdir(parents=True)
    (step / MANIFEST_NAME).touch()


def wait_for_drops(steps: CachedSteps = CACHED_STEPS) -> None:
    if steps._dropping is not None:
        steps._dropping.join(30)
        assert not steps._dropping.is_alive()


def test_all_leaves_the_page_cache_to_the_kernel(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[str] = []
    wait_for_drops()
    monkeypatch.setattr(cached_steps, "drop_from_page_cache", dropped.append)
    for number in (1, 2, 3):
        save(run / f"step-{number}", page_cache="all")
    wait_for_drops()
    assert dropped == []
    save(run / "step-4")
    wait_for_drops()
    assert {Path(path).parts[len(run.parts)] for path in dropped} == {"step-1", "step-2"}


def test_a_file_system_that_does_not_answer_keeps_no_save_waiting(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers, asked = threading.Event(), []

    def hang(path: str) -> None:
        asked.append(path)
        assert answers.wait(60)
        raise OSError(path)

    wait_for_drops()
    monkeypatch.setattr(cached_steps, "drop_from_page_cache", hang)
    caplog.set_level(logging.INFO, "dcp_hf_writer")
    try:
        for number in range(1, 7):
            save(run / f"step-{number}", timeout_s=50)
        assert not answers.is_set()
        drops = [one for one in threading.enumerate() if one.name == "dcp-hf-drop"]
        assert len(drops) == len(asked) == 1
    finally:
        answers.set()
        wait_for_drops()
    assert "stays in the page cache" in caplog.text
    save(run / "step-7")
    wait_for_drops()
    assert {Path(path).parts[len(run.parts)] for path in asked} == {
        f"step-{number}" for number in range(1, 6)
    }


def test_a_directory_whose_state_nobody_tells_keeps_no_other_save_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, asked, answers = CachedSteps(), threading.Event(), threading.Event()

    def hang(path: str) -> bool:
        asked.set()
        assert answers.wait(60)
        return False

    monkeypatch.setattr(cached_steps, "_is_published", hang)
    for number in (1, 2):
        steps.note(str(tmp_path / "dead" / f"step-{number}"), ["a"])
    steps.drop_outdated(str(tmp_path / "dead" / "step-3"))
    try:
        assert asked.wait(60)
        for number in (1, 2, 3):
            steps.drop_outdated(str(tmp_path / "run" / f"step-{number}"))
            steps.note(str(tmp_path / "run" / f"step-{number}"), ["a"])
    finally:
        answers.set()
    wait_for_drops(steps)


def test_an_interpreter_that_starts_no_threads_drops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = CachedSteps()
    for number in (1, 2):
        steps.note(str(tmp_path / f"step-{number}"), ["a"])

    def refuse(_: threading.Thread) -> None:
        msg = "can't start new thread at interpreter shutdown"
        raise RuntimeError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        steps.drop_outdated(str(tmp_path / "step-3"))
    assert steps._dropping is None
    steps.drop_outdated(str(tmp_path / "step-3"))
    wait_for_drops(steps)
    assert steps._dropping is not None


def test_a_forked_child_may_save_too(tmp_path: Path) -> None:
    with CACHED_STEPS._lock:
        child = os.fork()
        if not child:
            # A child that waits for the lock of its parent ends by SIGALRM.
            signal.alarm(20)
            CACHED_STEPS.note(str(tmp_path / "step-1"), ["a"])
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_exports_and_dcp_halves_in_one_directory_are_series_of_their_own(tmp_path: Path) -> None:
    steps = CachedSteps()
    for number in (1, 2):
        for name in ("export", "step"):
            steps.note(str(tmp_path / f"{name}-{number}"), ["a"], is_export=name == "export")
            publish(tmp_path / f"{name}-{number}")
    for name in ("export", "step"):
        outdated = steps.take_outdated(Series(str(tmp_path), is_export=name == "export"))
        assert outdated == [str(tmp_path / f"{name}-1" / "a")]


def test_each_half_that_lies_apart_drops_its_own_files(run: Path) -> None:
    for number in (1, 2, 3):
        export = HFExport(path=str(run / "exports" / str(number)))
        save(run / "steps" / str(number), export=export)
        wait_for_drops()
    for halves in ("steps/{}/*.distcp", "exports/{}/*.safetensors"):
        wait_until_dropped(run.glob(halves.format(1)))
        newest = list(run.glob(halves.format(2)))
        assert newest
        for path in newest:
            assert cached_nbytes(path) >= path.stat().st_size, path


def test_a_directory_that_was_there_before_a_failed_save_is_no_checkpoint(run: Path) -> None:
    def fail(point: str) -> None:
        if point == "before rename":
            msg = "injected"
            raise CheckpointError(msg)

    for number in (1, 2):
        save(run / f"step-{number}")
    (run / "step-3").mkdir()
    failpoints.set_hook(fail)
    with pytest.raises(CheckpointException, match="injected"):
        dcp.save(STATE, storage_writer=HFDualWriter(run / "step-3"))
    failpoints.set_hook(None)
    save(run / "step-4")
    wait_for_drops()
    assert_cached(run / "step-2")


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
        wait_for_drops()
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
    publish(tmp_path / "run" / "step-99")
    series = Series(str(tmp_path / "run"), is_export=False)
    outdated = steps.take_outdated(series)
    assert outdated == [str(tmp_path / "run" / f"step-{n}" / "a") for n in range(92, 99)]
    assert steps.take_outdated(series) == []
    publish(tmp_path / "run-0" / "step")
    assert steps.take_outdated(Series(str(tmp_path / "run-0"), is_export=False)) == []


def test_a_checkpoint_that_is_replaced_counts_once(tmp_path: Path) -> None:
    steps = CachedSteps()
    publish(tmp_path / "latest")
    for _ in range(3):
        assert steps.take_outdated(Series(str(tmp_path), is_export=False)) == []
        steps.note(str(tmp_path / "latest"), ["a"])
