"""`CheckpointManager(reuse="auto")`: a save links what the newest step of the run holds too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from dcp_hf_writer import CheckpointManager, verify
from dcp_hf_writer.errors import ConfigError
from support.ranks import run_ranks
from support.reused_steps import EXPORT, is_linked, reused_nbytes, run_state, sharded_run_state

if TYPE_CHECKING:
    from pathlib import Path


def linked(run: Path, step: int, earlier: int) -> list[bool]:
    return is_linked(run / f"step-{step}", run / f"step-{earlier}")


def test_a_run_keeps_its_frozen_files_while_retention_deletes_old_steps(tmp_path: Path) -> None:
    with CheckpointManager(
        tmp_path, save_every=1, export=EXPORT, keep_last=2, reuse="auto"
    ) as manager:
        for step in range(1, 5):
            manager.step(step, run_state(step))
            manager.wait()
        assert manager.steps() == [3, 4]
    assert linked(tmp_path, 4, 3) == [True, True, False]
    assert verify(tmp_path / "step-3").ok
    assert verify(tmp_path / "step-4").ok
    # A run that begins anew goes on with the files of the run before.
    with CheckpointManager(tmp_path, export=EXPORT, reuse="auto") as manager:
        state = run_state(0)
        assert manager.restore(state) == 4
        manager.save(5, run_state(5), wait=True)
    assert linked(tmp_path, 5, 4) == [True, True, False]


def test_a_save_with_an_export_reuses_the_newest_export(tmp_path: Path) -> None:
    with CheckpointManager(
        tmp_path, save_every=1, export_every=2, export=EXPORT, reuse="auto"
    ) as manager:
        for step in range(2, 5):
            manager.step(step, run_state(step))
            manager.wait()
    assert not (tmp_path / "step-3" / "hf").exists()
    assert linked(tmp_path, 4, 2) == [True, True, False]


def save_a_run(rank: int, world_size: int, root: Path) -> None:
    with CheckpointManager(
        root, save_every=1, export=EXPORT, reuse="auto", checkpointer="process"
    ) as manager:
        for step in (1, 2):
            manager.step(step, sharded_run_state(step))
            manager.wait()
    dist.barrier()


def test_a_checkpointer_process_reuses_too(tmp_path: Path) -> None:
    run_ranks(save_a_run, 2, tmp_path)
    assert linked(tmp_path, 2, 1) == [True, True, False]
    assert verify(tmp_path / "step-2").ok


def test_a_run_reuses_nothing_unless_asked_to(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=1, export=EXPORT) as manager:
        for step in (1, 2):
            manager.step(step, run_state(step))
            manager.wait()
    assert linked(tmp_path, 2, 1) == [False, False, False]
    assert reused_nbytes(tmp_path / "step-2") is None


@pytest.mark.parametrize(
    ("root", "reuse", "words"),
    [("run", "step-1", '"auto" or None'), ("memory://run", "auto", "object stores")],
)
def test_what_a_run_cannot_reuse_is_refused_at_once(
    tmp_path: Path, root: str, reuse: Any, words: str
) -> None:
    place = root if "://" in root else tmp_path / root
    with pytest.raises(ConfigError, match=words):
        CheckpointManager(place, export=EXPORT, reuse=reuse)
