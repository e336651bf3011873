"""The checkpoints of a run on a store: those with a manifest whose files are whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fsspec
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.load.committed_checkpoints import committed_checkpoints

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def save(url: str) -> None:
    dcp.save({"model": {"w": torch.ones(4)}}, storage_writer=HFDualWriter(url), no_dist=True)


def test_only_whole_checkpoints_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = f"memory://run{tmp_path}"
    fs = fsspec.filesystem("memory")
    assert committed_checkpoints(run) == []
    for name in ("step-10", "step-9", "step-11", "step-12", "step-13"):
        save(f"{run}/{name}")
    fs.rm_file(f"{run}/step-11/dcp-hf.json")
    fs.pipe_file(f"{run}/step-12/__0_0.distcp", b"short")
    fs.pipe_file(f"{run}/step-13/dcp-hf.json", b"{}")
    fs.pipe_file(f"{run}/notes.txt", b"x")
    assert committed_checkpoints(run) == ["step-9", "step-10"]
    assert "step-12 is left out: __0_0.distcp is not as listed" in caplog.text
    assert "step-13 is left out" in caplog.text
