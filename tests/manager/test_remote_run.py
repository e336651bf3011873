"""The steps of a run on a store: whole are those with a manifest whose files are whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fsspec
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.manager.remote_run import RemoteRun
from dcp_hf_writer.manager.step_names import StepNames

if TYPE_CHECKING:
    from pathlib import Path


def save(url: str) -> None:
    dcp.save({"model": {"w": torch.ones(4)}}, storage_writer=HFDualWriter(url), no_dist=True)


def test_only_whole_checkpoints_are_found(tmp_path: Path) -> None:
    run = f"memory://run{tmp_path}"
    fs = fsspec.filesystem("memory")
    for step in (10, 9, 11, 12, 13):
        save(f"{run}/step-{step}")
    # As a coordinator leaves it that is killed just before the manifest.
    fs.rm_file(f"{run}/step-11/dcp-hf.json")
    fs.pipe_file(f"{run}/step-11/.dcp-hf-save.json", b"{}")
    fs.pipe_file(f"{run}/step-12/__0_0.distcp", b"short")
    fs.pipe_file(f"{run}/step-13/dcp-hf.json", b"{}")
    fs.pipe_file(f"{run}/notes.txt", b"x")
    found = {stored.step: stored for stored in RemoteRun(run, StepNames()).listing()}
    assert [step for step, stored in found.items() if stored.facts is not None] == [9, 10]
    assert "the record of a save that did not publish it" in str(found[11].problem)
    assert "__0_0.distcp has 5 bytes" in str(found[12].problem)
    assert "dcp-hf.json" in str(found[13].problem)
