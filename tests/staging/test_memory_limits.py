"""A staged copy that exceeds the memory of a container: an error, and no killed process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.errors import StagingError
from support.memory_limits import join_cgroup, memory_cgroup, needs_memory_cgroups
from support.processes import in_fresh_process

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


def state_of(mib: int) -> dict[str, Any]:
    # One row, expanded: the state dict itself takes no memory, its copy does.
    return {"model": {"w": torch.zeros(1, 1024, dtype=torch.int8).expand(mib * 1024, 1024)}}


def save_more_than_fits(root: Path, cgroup: Path) -> str:
    """Save 4 MiB, then 4 GiB, then 8 MiB; return the error of the second save."""
    join_cgroup(cgroup)
    message = "no error"
    for step, mib in enumerate((4, 4096, 8)):
        writer = HFDualWriter(root / f"step-{step}", export=None)
        try:
            dcp.async_save(state_of(mib), storage_writer=writer, no_dist=True).result()
        except StagingError as error:
            message = str(error)
    return message


@needs_memory_cgroups
def test_copy_that_exceeds_the_memory_of_the_container_is_refused_with_numbers(
    tmp_path: Path,
) -> None:
    with memory_cgroup(1024 * MIB) as cgroup:
        message = in_fresh_process(save_more_than_fits, tmp_path, cgroup)
        needed = 4096 * MIB + 4096 * MIB // 64
        assert f"not enough free memory for the staged copy; expected {needed} bytes" in message
        assert f"by {cgroup}" in message
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-0", "step-2"]
