"""What the write phase keeps from save to save."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.save import write_phase
from support.faults import Strike

if TYPE_CHECKING:
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
