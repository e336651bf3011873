"""`CheckpointManager(page_cache=)`: older steps of a run leave the page cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pytest
import torch

from dcp_hf_writer import CheckpointManager, HFExport
from dcp_hf_writer.errors import ConfigError
from support.cached_pages import cached_nbytes, require_page_cache, wait_until_dropped
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(180)


def weight_files(root: Path, step: int) -> list[Path]:
    found = [path for path in (root / f"step-{step}").rglob("*.distcp") if path.stat().st_size]
    found += (root / f"step-{step}").rglob("*.safetensors")
    assert len(found) > 1
    return found


def run_three_steps(root: Path, *, checkpointer: Literal["thread", "process"]) -> None:
    with CheckpointManager(
        root, save_every=1, export=HFExport(), checkpointer=checkpointer
    ) as manager:
        for step in (1, 2, 3):
            manager.step(step, {"model": {"a": torch.full((60000,), float(step))}})
            manager.wait()


def in_a_checkpointer_process(rank: int, world_size: int, root: Path) -> None:
    run_three_steps(root, checkpointer="process")


def test_only_the_newest_step_stays(tmp_path: Path) -> None:
    require_page_cache(tmp_path)
    run_three_steps(tmp_path, checkpointer="thread")
    wait_until_dropped(weight_files(tmp_path, 1))
    assert all(cached_nbytes(path) for path in weight_files(tmp_path, 2))


def test_a_checkpointer_process_drops_older_steps_too(tmp_path: Path) -> None:
    require_page_cache(tmp_path)
    run_ranks(in_a_checkpointer_process, 2, tmp_path, timeout_s=150)
    wait_until_dropped(weight_files(tmp_path, 1))


def test_the_option_goes_to_the_writers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="page_cache"):
        CheckpointManager(tmp_path, page_cache="none")  # type: ignore[arg-type]
