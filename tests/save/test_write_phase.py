"""What the write phase keeps from save to save."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.save import write_phase
from dcp_hf_writer.storage.posix_outputs import OutputFile
from support.faults import Strike

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def test_bounce_buffer_is_kept_when_a_save_fails(tmp_path: Path) -> None:
    export = HFExport(dtype=torch.bfloat16)  # a cast needs the buffer
    state = {"model": {"w": torch.ones(64, 64)}}

    def save(name: str) -> None:
        writer = HFDualWriter(tmp_path / name, export=export)
        dcp.save(state, storage_writer=writer, no_dist=True)

    save("step-1")
    (before,) = write_phase._idle_blocks
    strike = Strike(rank=0, point="before fsync", action="raise")
    with strike.installed(0, tmp_path), pytest.raises(BaseException, match="injected"):
        save("step-2")
    (after,) = write_phase._idle_blocks
    assert after is before
    save("step-3")
    assert write_phase._idle_blocks == [before]


def test_copies_that_wait_for_a_write_fit_in_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[int] = []
    write_many = OutputFile.write_many

    def watched(file: OutputFile, buffers: Sequence[memoryview], offset: int) -> int:
        waiting.append(sum(buffer.nbytes for buffer in buffers))
        return write_many(file, buffers, offset)

    monkeypatch.setattr(OutputFile, "write_many", watched)
    budget, weight = 1 << 20, torch.arange(1 << 20, dtype=torch.int64).view(1 << 10, 1 << 10).t()
    writer = HFDualWriter(tmp_path / "step-1", host_budget_bytes=budget)
    dcp.save({"w": weight}, storage_writer=writer, no_dist=True)
    assert sum(waiting) > weight.nbytes
    assert max(waiting) < budget
    loaded = {"w": torch.zeros_like(weight)}
    dcp.load(loaded, checkpoint_id=tmp_path / "step-1", no_dist=True)
    assert torch.equal(loaded["w"], weight)
