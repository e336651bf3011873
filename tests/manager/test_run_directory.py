"""The directory of a run: what counts as a checkpoint, and deletions that a crash interrupts."""

from __future__ import annotations

import json
import logging
import os
import shutil
from typing import TYPE_CHECKING

import pytest
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, verify
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.manager import run_directory
from dcp_hf_writer.manager.keep_house import Housekeeper
from dcp_hf_writer.manager.retention import Retention
from dcp_hf_writer.manager.run_directory import RunDirectory
from dcp_hf_writer.manager.step_names import DELETED_PREFIX, StepNames
from support.named_bytes import EXPORT, save_held_by, sharded_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dcp_hf_writer.manager.run_storage import StoredStep

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with the steps 1, 2 and 3, exports of 1 and 3."""
    root = tmp_path_factory.mktemp("three")
    for step in (1, 2, 3):
        writer = HFDualWriter(root / f"step-{step}", export=EXPORT if step != 2 else None)
        dcp.save(sharded_state(step), storage_writer=writer, no_dist=True)
    return root


@pytest.fixture
def root(three: Path, tmp_path: Path) -> Path:
    return shutil.copytree(three, tmp_path / "run")


def directory_of(root: Path) -> RunDirectory:
    directory = RunDirectory(str(root), StepNames())
    directory.prepare()
    return directory


def damage_nothing(step: Path) -> None:
    del step


def remove_manifest(step: Path) -> None:
    (step / "dcp-hf.json").unlink()


def cut_manifest(step: Path) -> None:
    os.truncate(step / "dcp-hf.json", 300)


def cut_data(step: Path) -> None:
    os.truncate(step / "__0_0.distcp", 100)


def remove_weights(step: Path) -> None:
    next((step / "hf").glob("*.safetensors")).unlink()


def damage_metadata(step: Path) -> None:
    data = (step / ".metadata").read_bytes()
    (step / ".metadata").write_bytes(b"x" * len(data))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (cut_manifest, "manifest"),
        (cut_data, "__0_0.distcp has 100 bytes"),
        (remove_weights, "is missing"),
        (damage_metadata, ".metadata"),
    ],
)
def test_damaged_newest_does_not_count(
    root: Path, damage: Callable[[Path], None], word: str
) -> None:
    damage(root / "step-3")
    directory = directory_of(root)
    assert (directory.latest(), directory.steps()) == (2, [1, 2])
    assert word in str(directory.look_at(3).problem)


def test_checkpoint_of_stock_torch_counts(root: Path) -> None:
    remove_manifest(root / "step-3")
    found = directory_of(root).look_at(3)
    assert found.facts is not None
    assert found.facts.kind == "dcp"


def test_answer_is_fresh_when_another_process_changes_the_run(root: Path) -> None:
    directory = directory_of(root)
    assert directory.latest() == 3
    os.truncate(root / "step-3" / "__0_0.distcp", 100)
    assert directory.latest() == 2
    shutil.rmtree(root / "step-2")
    shutil.copytree(root / "step-1", root / "step-7")
    assert directory.steps() == [1, 7]


@pytest.mark.parametrize("name", ["step-9", "step-010", "step-9.tmp", ".incomplete-x", "notes"])
def test_directory_without_a_checkpoint_does_not_count(root: Path, name: str) -> None:
    (root / name).mkdir()
    (root / name / "readme.txt").write_text("mine")
    assert directory_of(root).steps() == [1, 2, 3]
    Housekeeper(directory_of(root), Retention(keep_last=1)).run()
    assert (root / name / "readme.txt").exists()
    assert directory_of(root).steps() == [3]


def test_deletion_leaves_exactly_what_retention_keeps(root: Path) -> None:
    directory = directory_of(root)
    Housekeeper(directory, Retention(keep_last=2, export_keep_last=1)).run()
    assert directory.steps() == [2, 3]
    assert not [name for name in os.listdir(root) if name.startswith(DELETED_PREFIX)]
    for step in (2, 3):
        assert verify(root / f"step-{step}").ok


def test_removed_export_leaves_a_whole_half(root: Path) -> None:
    directory = directory_of(root)
    assert directory.remove_export(directory.look_at(1))
    assert not (root / "step-1" / "hf").exists()
    report = verify(root / "step-1")
    assert report.ok, report
    assert not report.warnings
    assert save_held_by(root / "step-1", has_export=False) == 1


class CrashError(BaseException):
    """Stands for the end of the process."""


def crash_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> list[str]:
    """Make the nth change of a name end the process; return the changes seen."""
    seen: list[str] = []

    def wrapped(name: str) -> Callable[..., object]:
        real: Callable[..., object] = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            if len(seen) == nth:
                raise CrashError
            seen.append(name)
            return real(*args, **kwargs)

        return call

    for name in ("rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, wrapped(name))
    return seen


@pytest.mark.parametrize("what", ["remove", "remove_export"])
def test_crash_at_any_change_of_a_deletion_leaves_whole_checkpoints(
    three: Path, tmp_path: Path, what: str
) -> None:
    ended = False
    for nth in range(40):
        root = shutil.copytree(three, tmp_path / f"{what}-{nth}")
        directory = directory_of(root)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, nth)
            try:
                act = getattr(directory, what)
                assert act(directory.look_at(1))
                ended = True
            except CrashError:
                pass
        after = directory_of(root)
        assert after.latest() == 3
        if 1 in after.steps():
            # Between two changes, the export may stand beside a manifest without it.
            bad = verify(root / "step-1").problems
            assert [one for one in bad if not one.file.startswith("hf/")] == []
        after.finish_deletions()
        assert not [name for name in os.listdir(root) if name.startswith(DELETED_PREFIX)]
        for step in after.steps():
            assert verify(root / f"step-{step}").ok, f"crash at change {nth}"
            assert save_of(root / f"step-{step}") == step
        if ended:
            break
    assert ended, "the deletion has more changes than the test tries"
    assert nth > 2


def save_of(step: Path) -> int:
    """Return the save that a checkpoint holds, with or without an export."""
    has_export = json.loads((step / "dcp-hf.json").read_text())["hf"] is not None
    return save_held_by(step, has_export=has_export)


def test_deletion_that_cannot_be_renamed_leaves_the_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = directory_of(root)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(run_directory.os, "rename", refuse)
        assert not directory.remove(directory.look_at(1))
    assert "tries again" in caplog.text
    assert directory.steps() == [1, 2, 3]
    assert directory.remove(directory.look_at(1))
    assert directory.steps() == [2, 3]


def test_deletion_that_stops_half_way_is_ended_by_the_next(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(root)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        assert not directory.remove(directory.look_at(1))
    assert directory.steps() == [2, 3]
    assert [name for name in os.listdir(root) if name.startswith(DELETED_PREFIX)]
    directory.finish_deletions()
    assert not [name for name in os.listdir(root) if name.startswith(DELETED_PREFIX)]


def test_pin_and_metrics_stay_until_the_step_goes(root: Path) -> None:
    directory = directory_of(root)
    stored = directory.look_at(1)
    directory.note(stored, metrics={"loss": 0.5})
    directory.pin(1, is_pinned=True, may_write=True)
    Housekeeper(directory, Retention(keep_last=1)).run()
    assert directory.steps() == [1, 3]
    notes = directory_of(root).notes_of(stored)
    assert (notes.is_pinned, notes.metrics) == (True, {"loss": 0.5})
    directory.pin(1, is_pinned=False, may_write=True)
    Housekeeper(directory, Retention(keep_last=1)).run()
    assert directory.steps() == [3]
    assert os.listdir(root / ".dcp-hf-manager") == []


def test_metrics_of_another_save_do_not_count(root: Path) -> None:
    directory = directory_of(root)
    directory.note(directory.look_at(1), metrics={"loss": 0.1})
    shutil.rmtree(root / "step-1")
    shutil.copytree(root / "step-2", root / "step-1")
    assert directory.notes_of(directory.look_at(1)).metrics == {}


def test_step_that_is_not_there_cannot_be_pinned(root: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint of this step"):
        directory_of(root).pin(9, is_pinned=True, may_write=True)


def test_links_lead_to_the_newest_checkpoint_and_export(root: Path) -> None:
    directory = directory_of(root)
    for step in (1, 2):
        directory.point_latest_to(directory.look_at(step))
    assert os.readlink(root / "latest") == "step-2"
    assert os.readlink(root / "hf-latest") == "step-1/hf"


def test_directory_named_latest_is_not_replaced(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "latest").mkdir()
    directory = directory_of(root)
    directory.point_latest_to(directory.look_at(3))
    assert (root / "latest").is_dir()
    assert "is not a link" in caplog.text


def test_snapshot_goes_when_a_newer_checkpoint_is_there(root: Path) -> None:
    for step in (2, 3, 4, 5):
        shutil.copytree(root / "step-2", root / f"snapshot-{step}")
    directory = directory_of(root)
    assert (directory.latest(), directory.steps()) == (5, [1, 2, 3, 4, 5])
    Housekeeper(directory, Retention()).run()
    assert sorted(p.name for p in root.glob("snapshot-*")) == ["snapshot-5"]
    assert directory.find(5) == str(root / "snapshot-5")
    assert directory.find(3) == str(root / "step-3")


def test_listing_of_a_run_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "none"), StepNames())
    listing: list[StoredStep] = directory.listing()
    assert (listing, directory.latest()) == ([], None)
