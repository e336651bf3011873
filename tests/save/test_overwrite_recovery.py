"""Overwriting where names cannot be exchanged: what a crash between two renames leaves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer.errors import TargetExistsError
from dcp_hf_writer.save import commit, recover_targets
from support.faults import BadCall, check_outcomes, check_storage, hits, note_hit, save
from support.processes import FreshProcess

if TYPE_CHECKING:
    from pathlib import Path


def save_and_die_between_renames(root: Path, number: int) -> None:
    no_exchange = BadCall(rank=0, name="renameat2", errno=errno.EINVAL, times=10**6)
    real = os.rename

    def rename_and_die(source: str, target: str, **kwargs: Any) -> None:
        real(source, target, **kwargs)
        if ".replaced-" in os.fspath(target):
            note_hit(root, "died between the renames")
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = rename_and_die
    with no_exchange.installed(0, root):
        save(root, "step-1", number, overwrite=True)


def die_between_renames(root: Path) -> None:
    check_outcomes([save(root, "step-1", 1)], None)
    with FreshProcess(save_and_die_between_renames, root, 2) as process:
        assert process.exitcode() == -signal.SIGKILL
    assert "died between the renames" in hits(root)
    assert not (root / "step-1").exists()


def test_next_save_completes_an_overwrite_that_died_between_its_renames(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    die_between_renames(root)
    # The new one was whole when its process died, so it is what the next save finds.
    check_outcomes([save(root, "step-1", 3)], TargetExistsError)
    check_storage(root, {"step-1": 2})
    check_outcomes([save(root, "step-1", 3, overwrite=True)], None)
    check_storage(root, {"step-1": 3})


def test_next_save_undoes_an_overwrite_whose_new_half_is_lost(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    die_between_renames(root)
    # Heartbeats that were taken out of it may lie beside it.
    (staging,) = [one for one in root.glob(".incomplete-*") if (one / ".metadata").exists()]
    shutil.rmtree(staging)
    check_outcomes([save(root, "step-1", 3)], TargetExistsError)
    check_storage(root, {"step-1": 1})


def test_save_of_another_step_completes_a_torn_overwrite_too(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    die_between_renames(root)
    check_outcomes([save(root, "step-2", 3)], None)
    check_storage(root, {"step-1": 2, "step-2": 3})


def test_recovery_is_what_brings_a_torn_overwrite_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with the rule switched off, what the dead save left stays."""
    root = tmp_path / "run"
    root.mkdir()
    die_between_renames(root)
    monkeypatch.setattr(commit, "recover_parent", lambda *_: None)
    check_outcomes([save(root, "step-1", 3)], None)
    with pytest.raises(AssertionError, match="left behind"):
        check_storage(root, {"step-1": 3})


def test_listing_of_a_live_neighbour_that_just_commits_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    real = os.listdir

    def listdir(path: str) -> list[str]:
        # Another job's directories are listed, and gone when they are looked into.
        others = [".incomplete-of-another-job", ".replaced-of-another-job"]
        if path != str(root):
            return real(path)
        note_hit(root, "listed")
        return [*others, others[0] + ".json", others[0] + ".old", *real(path)]

    monkeypatch.setattr(recover_targets.os, "listdir", listdir)
    check_outcomes([save(root, "step-1", 1)], None)
    monkeypatch.undo()
    assert hits(root) == ["listed"]
    check_storage(root, {"step-1": 1})
