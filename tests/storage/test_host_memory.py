"""The memory that is left for a process, by the host and by its cgroups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.storage.host_memory import FreeMemory, free_memory
from support.memory_limits import join_cgroup, memory_cgroup, needs_memory_cgroups
from support.processes import in_fresh_process

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
LIMIT = 256 * MIB


def test_free_memory_of_the_host_is_found_without_limits() -> None:
    found = free_memory()
    assert found is not None
    assert 0 < found.nbytes < 1 << 60


def memory_before_and_after(cgroup: Path) -> tuple[FreeMemory | None, FreeMemory | None]:
    """Return the free memory in a cgroup, and what is left after filling 64 MiB."""
    join_cgroup(cgroup)
    before = free_memory()
    filled = bytearray(b"x") * (64 * MIB)
    after = free_memory()
    assert filled
    return before, after


@needs_memory_cgroups
def test_free_memory_is_that_of_the_tightest_cgroup() -> None:
    with memory_cgroup(LIMIT) as cgroup:
        before, after = in_fresh_process(memory_before_and_after, cgroup)
        assert before is not None
        assert after is not None
        assert before.limit == str(cgroup)
        assert LIMIT - 32 * MIB < before.nbytes <= LIMIT
        assert 56 * MIB < before.nbytes - after.nbytes < 80 * MIB
