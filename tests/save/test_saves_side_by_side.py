"""Saves of one process that meet: each file holds its own save, and no error is lost."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from dcp_hf_writer import HFDualWriter, HFExport, failpoints
from dcp_hf_writer.errors import CommitError, ConfigError, StagingError, WriteError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.save import commit
from dcp_hf_writer.save.commit import StagingDirectory
from support.taken_targets import small_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TIMEOUT_S = 20
ELEMENTS = 1_000_000

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def no_hook() -> Iterator[None]:
    yield
    failpoints.set_hook(None)


def state_of(step: int, elements: int = 8) -> dict[str, Any]:
    return {"model": {name: torch.full((elements,), float(step)) for name in ("v", "w")}}


def check_step(path: Path, step: int, elements: int = 8) -> None:
    found = state_of(0, elements)
    dcp.load(found, checkpoint_id=path, no_dist=True)
    saved = load_file(path / "hf" / "model.safetensors")
    for name, expected in state_of(step, elements)["model"].items():
        assert torch.equal(found["model"][name], expected)
        assert torch.equal(saved[name].float(), expected)


def test_casts_do_not_mix_when_a_synchronous_save_runs_beside_another(tmp_path: Path) -> None:
    """Both saves are held in the midst of the export, so that they are sure to meet there."""
    export = HFExport(dtype=torch.bfloat16)
    meet = threading.Barrier(2, timeout=TIMEOUT_S)
    met = threading.local()

    def hook(point: str) -> None:
        if point == "mid hf" and not hasattr(met, "once"):
            met.once = meet.wait()

    failpoints.set_hook(hook)
    first = dcp.async_save(
        state_of(1, ELEMENTS), storage_writer=HFDualWriter(tmp_path / "s1", export=export)
    )
    dcp.save(state_of(2, ELEMENTS), storage_writer=HFDualWriter(tmp_path / "s2", export=export))
    first.result(TIMEOUT_S)
    assert not meet.broken
    check_step(tmp_path / "s1", 1, ELEMENTS)
    check_step(tmp_path / "s2", 2, ELEMENTS)


@pytest.mark.parametrize("point", ["local plan", "before slot", "before fsync", "before manifest"])
def test_writer_waits_for_its_own_save_in_flight(point: str, tmp_path: Path) -> None:
    reached, main = threading.Event(), threading.current_thread()

    def hook(name: str) -> None:
        if name == point and threading.current_thread() is not main:
            reached.set()
            time.sleep(0.3)

    failpoints.set_hook(hook)
    writer = HFDualWriter(tmp_path / "unused", timeout_s=TIMEOUT_S)
    first = dcp.async_save(state_of(1), storage_writer=writer, checkpoint_id=tmp_path / "s1")
    assert reached.wait(TIMEOUT_S)
    dcp.save(state_of(2), storage_writer=writer, checkpoint_id=tmp_path / "s2")
    first.result(TIMEOUT_S)
    check_step(tmp_path / "s1", 1)
    check_step(tmp_path / "s2", 2)


def test_failed_staging_does_not_reach_the_next_save(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "unused", timeout_s=TIMEOUT_S)
    bad = {"model": {"w": torch.eye(3).to_sparse()}}
    failing = dcp.async_save(bad, storage_writer=writer, checkpoint_id=tmp_path / "s1")
    good = dcp.async_save(state_of(2), storage_writer=writer, checkpoint_id=tmp_path / "s2")
    assert isinstance(failing.exception(TIMEOUT_S), StagingError)
    good.result(TIMEOUT_S)
    assert [path.name for path in tmp_path.iterdir()] == ["s2"]
    check_step(tmp_path / "s2", 2)


def test_saves_of_one_writer_in_two_threads_do_not_mix(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "unused")
    reset, begun = threading.Event(), threading.Event()
    targets: list[str] = []

    def first() -> None:
        writer.reset(str(tmp_path / "s1"))
        reset.set()
        assert begun.wait(TIMEOUT_S)
        targets.append(writer._saves.take_target("none"))
        assert writer._saves.current() is None

    thread = threading.Thread(target=first)
    thread.start()
    assert reset.wait(TIMEOUT_S)
    # Between the two calls of the other save, as when that one could not be staged.
    dcp.save(state_of(2), storage_writer=writer, checkpoint_id=tmp_path / "s2", no_dist=True)
    begun.set()
    thread.join(TIMEOUT_S)
    assert targets == [str(tmp_path / "s1")]
    check_step(tmp_path / "s2", 2)


def test_staged_copy_is_given_back_when_the_path_of_the_save_is_refused(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "unused", timeout_s=TIMEOUT_S)
    refused = dcp.async_save(
        state_of(1), storage_writer=writer, checkpoint_id="nowhere://bucket/s1"
    )
    assert isinstance(refused.exception(TIMEOUT_S), ConfigError)
    began = time.monotonic()
    dcp.async_save(
        state_of(2), storage_writer=HFDualWriter(tmp_path / "s2", timeout_s=TIMEOUT_S)
    ).result(TIMEOUT_S)
    assert time.monotonic() - began < TIMEOUT_S / 4
    check_step(tmp_path / "s2", 2)


def test_replaced_checkpoint_stays_until_the_exchange_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "step-1"
    target.mkdir()
    (target / ".metadata").write_bytes(small_metadata(["data"]))
    (target / "data").write_text("old")
    directory = StagingDirectory(str(target), "X-1")
    directory.create(overwrite=True).close()
    (tmp_path / ".incomplete-X-1" / MANIFEST_NAME).write_text('{"save_id": "X-1"}')
    sync, failed = commit.sync_directory, []

    def fail_for_the_parent(path: str) -> None:
        if path == str(tmp_path):
            failed.append(path)
            raise WriteError("fsync", phase="write", path=path, errno=5, found="EIO")
        sync(path)

    monkeypatch.setattr(commit, "sync_directory", fail_for_the_parent)
    with pytest.raises(CommitError, match="may not survive a power cut"):
        directory.publish(overwrite=True)
    directory.remove()
    assert failed
    assert (tmp_path / ".incomplete-X-1" / "data").read_text() == "old"
    monkeypatch.undo()
    dcp.save(state_of(2), storage_writer=HFDualWriter(target, overwrite=True))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    check_step(target, 2)
