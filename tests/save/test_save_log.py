"""What a save says in the log, also to a trainer that never looks at the future."""

from __future__ import annotations

import gc
import logging
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.errors import ExportError
from dcp_hf_writer.staging.slab import Slab, SlabPool
from support.small_states import state_of

if TYPE_CHECKING:
    from pathlib import Path

LIMIT_S = 60.0
ALONE = {"no_dist": True}


@pytest.fixture(autouse=True)
def all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="dcp_hf_writer")


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level and "dcp_hf" in r.name]


def wait_for_save_to_end() -> None:
    """Wait for the thread of a save whose future nobody holds."""
    until = time.monotonic() + LIMIT_S
    while any("AsyncCheckpointExecutor" in t.name for t in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_one_line_tells_of_a_published_save(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "step-70"
    state = {"model": {"w": torch.ones(250, 1000)}}
    if how == "sync":
        dcp.save(state, storage_writer=HFDualWriter(path), **ALONE)
    else:
        dcp.async_save(state, storage_writer=HFDualWriter(path), **ALONE)
        wait_for_save_to_end()
    (line,) = lines(caplog, logging.INFO)
    stall = r"stall \d+\.\d{3} s" if how == "async" else "no staging"
    shown = rf"published {re.escape(str(path))} \(step 70\): 0\.001 GB DCP \+ 0\.001 GB HuggingFace"
    assert re.fullmatch(rf"{shown}, {stall}, total \d+\.\d{{3}} s, \d+\.\d\d GB/s", line)
    assert lines(caplog, logging.ERROR) == []


@pytest.mark.parametrize("how", ["sync", "async"])
def test_one_line_tells_of_a_failed_save_when_nobody_holds_the_future(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "step-1"
    dcp.save(state_of(1), storage_writer=HFDualWriter(path), **ALONE)
    caplog.clear()
    if how == "sync":
        with pytest.raises(BaseException, match="step-1"):
            dcp.save(state_of(2), storage_writer=HFDualWriter(path), **ALONE)
    else:
        dcp.async_save(state_of(2), storage_writer=HFDualWriter(path), **ALONE)
        wait_for_save_to_end()
    gc.collect()
    (line,) = lines(caplog, logging.ERROR)
    assert line.startswith(f"the save of {path} failed on rank 0: TargetExistsError: ")
    assert lines(caplog, logging.INFO) == []


def test_save_without_its_export_is_published_and_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "step-1"
    writer = HFDualWriter(path, export=HFExport(assets={"config.json": b"{"}, dtype="bfloat16"))
    with pytest.raises(ExportError):
        dcp.async_save(state_of(1), storage_writer=writer, **ALONE).result(LIMIT_S)
    (published,), (missed,) = lines(caplog, logging.INFO), lines(caplog, logging.ERROR)
    assert "+ 0.000 GB HuggingFace" in published
    assert missed.startswith(f"the save of {path} has no export on rank 0: ExportError: ")


def test_each_phase_has_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "step-1"
    dcp.async_save(state_of(1), storage_writer=HFDualWriter(path), **ALONE).result(LIMIT_S)
    shown = re.compile(rf"save of {re.escape(str(path))}, rank 0: (.+) took \d+\.\d{{3}} s")
    found = [match[1] for line in lines(caplog, logging.DEBUG) if (match := shown.match(line))]
    assert found == ["stage", "plan", "write", "waiting for the other ranks", "finish"]


def test_allocating_the_slab_is_not_called_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = SlabPool()
    monkeypatch.setattr(Slab, "_fault_in", lambda _: time.sleep(1.2))
    options: dict[str, Any] = {"deadline": time.monotonic() + 30, "before_growth": lambda: None}
    lease, waited_s = pool.acquire(100, what="first", **options)
    assert waited_s < 1
    assert lines(caplog, logging.INFO) == []
    threading.Timer(1.3, lease.release).start()
    _, waited_s = pool.acquire(100, what="second", **options)
    assert waited_s > 1
    said = lines(caplog, logging.INFO)
    assert said[0] == "save of second waits for the save of first"
    assert re.fullmatch(r"save of second waited \d\.\d s for staging memory", said[1])
