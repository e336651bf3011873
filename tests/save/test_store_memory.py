"""Memory of a rank that sends a large model to S3: its snapshot and its budget, no more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport
from support.processes import in_fresh_process
from support.s3_servers import serving
from support.store_saves import Store

# 3 GB of bfloat16: one tensor, so one file of the export and one rank's DCP file.
ROWS, COLUMNS = 1500, 1_000_000
BUDGET = 256 << 20
# Python's objects, the client, and what the allocator keeps.
SLACK = 64 << 20


def peak_nbytes() -> int:
    """Return the most memory that this process held since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def reset_peak() -> None:
    """Forget earlier peaks."""
    Path("/proc/self/clear_refs").write_text("5")


def save_large(store: Store) -> tuple[int, int]:
    """Save in the background; return snapshot and peak above the model itself, in bytes."""
    model = {"w": torch.ones(ROWS, COLUMNS, dtype=torch.bfloat16)}
    # The client and what a first save imports.
    writer = HFDualWriter(store.at("small"), storage_options=dict(store.storage_options))
    dcp.async_save({"model": {"w": torch.ones(3)}}, storage_writer=writer).result()
    reset_peak()
    base = peak_nbytes()
    writer = HFDualWriter(
        store.at("large"),
        export=HFExport(assets={"config.json": b"{}"}),
        storage_options=dict(store.storage_options),
        host_budget_bytes=BUDGET,
    )
    dcp.async_save({"model": model}, storage_writer=writer).result()
    return model["w"].nbytes, peak_nbytes() - base


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_peak_of_a_rank_is_its_snapshot_and_its_budget_when_3_gb_go_to_s3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = ("--multipart-streaming-buffer-limit", "128M")
    with serving("rclone", *limit, root=str(tmp_path)) as server:
        bucket = server.new_bucket()
        store = Store.of_bucket(bucket)
        snapshot, peak = in_fresh_process(save_large, store, timeout_s=850)
        head = bucket.client().head_object(Bucket=bucket.name, Key="run/large/hf/model.safetensors")
        assert head["ContentLength"] > 3_000_000_000
    extra = (peak - snapshot) / (1 << 20)
    with capsys.disabled():
        text = f"snapshot {snapshot / 1e9:.2f} GB, {extra:.0f} MiB more, budget {BUDGET >> 20} MiB"
        print(text)  # noqa: T201 - the figure is for people
    assert peak <= snapshot + BUDGET + SLACK, f"{extra:.0f} MiB above the snapshot"
