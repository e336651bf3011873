"""A run looks at the limits of its processes at the start and before each save."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest

from dcp_hf_writer import CheckpointManager
from dcp_hf_writer.errors import StagingError
from dcp_hf_writer.preflight.process_limits import BASE_FILES
from support.managed_runs import Seen, managed, report_steps
from support.mounts import mount_tmpfs, needs_mounts
from support.open_files import free_files
from support.rank_process import Raised
from support.ranks import run_ranks

SHM = Path("/dev/shm")


NEEDED = BASE_FILES + 3
"""The export of the test's state has three files."""


def few_files(are_few: bool) -> contextlib.AbstractContextManager[object]:  # noqa: FBT001
    return free_files(20) if are_few else contextlib.nullcontext()


def start_with_files(rank: int, world_size: int, root: Path) -> Raised | None:
    with few_files(rank == world_size - 1):
        try:
            CheckpointManager(root, timeout_s=30).close()
        except StagingError as error:
            return Raised.of(error)
    return None


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_learns_at_the_start_that_one_may_open_too_few_files(
    tmp_path: Path, world_size: int
) -> None:
    needed = BASE_FILES + (0 if world_size == 1 else world_size)
    for raised in run_ranks(start_with_files, world_size, tmp_path / "run"):
        assert raised is not None
        assert f"rank {world_size - 1} stage: this process may open too few" in raised.text
        assert f"expected {needed} free file descriptors for saves" in raised.text
        # A rank that is not alone has one more connection to the store by then.
        assert re.search(r"found (19|20): ", raised.text)


def save_with_files(rank: int, world_size: int, root: Path) -> tuple[Seen, str]:
    """Save with enough descriptors, with too few on the last rank, and with enough again."""
    seen = Seen()
    with managed(root, seen, save_every=1) as manager:
        report_steps(manager, seen, [1])
        with few_files(rank == world_size - 1):
            report_steps(manager, seen, [2])
        report_steps(manager, seen, [3])
    return seen, str(seen.raised[2].error)


@pytest.mark.parametrize("world_size", [1, 2])
def test_save_is_refused_on_every_rank_while_one_may_open_too_few_files(
    tmp_path: Path, world_size: int
) -> None:
    for seen, text in run_ranks(save_with_files, world_size, tmp_path / "run"):
        assert seen.errors() == {2: StagingError}
        assert f"rank {world_size - 1} stage: this process may open too few files" in text
        assert f"expected {NEEDED} free file descriptors for a save with 3 files" in text
        assert (seen.saved, seen.steps) == ([1, 3], [1, 3])


def save_with_just_enough_files(
    rank: int, world_size: int, root: Path, checkpointer: str
) -> tuple[Seen, int]:
    seen = Seen()
    options: dict[str, Any] = {"checkpointer": checkpointer, "timeout_s": 150.0}
    with managed(root, seen, save_every=1, **options) as manager, free_files(NEEDED) as limit:
        report_steps(manager, seen, [1])
    return seen, limit


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "checkpointer", ["thread", pytest.param("process", marks=pytest.mark.slow)]
)
def test_save_needs_no_more_files_than_are_asked_for(tmp_path: Path, checkpointer: str) -> None:
    root = tmp_path / "run"
    for seen, _ in run_ranks(save_with_just_enough_files, 2, root, checkpointer, timeout_s=200):
        assert (seen.errors(), seen.steps) == ({}, [1])


def start_with_shared_memory(
    rank: int, world_size: int, root: Path, size: str, checkpointer: str
) -> Any:
    mount_tmpfs(SHM, size)
    seen = Seen()
    options: dict[str, Any] = {"checkpointer": checkpointer, "save_every": 1, "timeout_s": 80.0}
    try:
        with managed(root, seen, **options) as manager:
            report_steps(manager, seen, [1])
    except StagingError as error:
        return str(error)
    assert seen.errors() == {}
    return seen.steps


@needs_mounts
@pytest.mark.parametrize(("size", "checkpointer"), [("size=64k", "thread"), ("size=1m", "process")])
def test_run_needs_no_more_shared_memory_than_is_asked_for(
    tmp_path: Path, size: str, checkpointer: str
) -> None:
    root = tmp_path / "run"
    assert run_ranks(start_with_shared_memory, 1, root, size, checkpointer) == [[1]]


@needs_mounts
def test_run_with_a_process_is_refused_without_shared_memory(tmp_path: Path) -> None:
    root = tmp_path / "run"
    (found,) = run_ranks(start_with_shared_memory, 1, root, "size=64k", "process")
    assert "there is too little shared memory for torch's checkpointer process (/dev/shm)" in found
    assert 'pass checkpointer="thread"' in found
