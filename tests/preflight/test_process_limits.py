"""The limits of a process are looked at with real limits: open files, and a small `/dev/shm`."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dcp_hf_writer.errors import StagingError
from dcp_hf_writer.preflight.process_limits import (
    SEMAPHORES_NBYTES,
    check_descriptors,
    check_semaphores,
)
from support.mounts import mount_tmpfs, needs_mounts
from support.open_files import free_files
from support.processes import in_fresh_process

SHM = Path("/dev/shm")


def errors_with(count: int) -> list[str]:
    found = []
    with free_files(count) as limit:
        for needed in (count, count + 1):
            try:
                check_descriptors(needed, what="a save", rank=3)
            except StagingError as error:
                text = str(error).replace(f"{limit - count} of {limit}", "USED of LIMIT")
                found.append(f"{errno.errorcode[error.errno or 0]} {text}")
    return found


@pytest.mark.parametrize("count", [5, 1])
def test_free_descriptors_are_counted(count: int) -> None:
    (found,) = in_fresh_process(errors_with, count)
    assert found == (
        "EMFILE rank 3 stage: this process may open too few files; expected "
        f"{count + 1} free file descriptors for a save; found {count}: USED of LIMIT are open; "
        "raise the limit on open files (ulimit -n), or close files"
    )


def error_without_descriptors() -> str:
    with free_files(0), pytest.raises(StagingError) as caught:
        check_descriptors(1, what="a save")
    return str(caught.value)


def test_process_that_can_open_nothing_is_told_so() -> None:
    assert "found 0: " in in_fresh_process(error_without_descriptors)


def errors_of_sizes(sizes: list[str]) -> list[str]:
    found = []
    for size in sizes:
        mount_tmpfs(SHM, size)
        try:
            check_semaphores(rank=1)
            found.append("enough")
        except StagingError as error:
            found.append(str(error))
    return found


@needs_mounts
def test_shared_memory_of_semaphores_is_measured() -> None:
    sizes = [f"size={SEMAPHORES_NBYTES}", "size=64k", "size=16m,nr_inodes=1"]
    enough, *errors = in_fresh_process(errors_of_sizes, sizes)
    assert enough == "enough"
    for error, found in zip(errors, ("65536 bytes and", "and 0 files free"), strict=True):
        assert "rank 1 stage: there is too little shared memory for torch's checkpointer" in error
        assert found in error


def test_directory_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(StagingError, match="No such file or directory"):
        check_semaphores(str(tmp_path / "none"))
