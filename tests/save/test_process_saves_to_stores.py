"""Saves of torch's checkpointer process: to S3, with a mirror, and with halves apart."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from dcp_hf_writer import FinishedSave, HFDualWriter, HFExport, MirrorTo, verify
from support.ranks import run_ranks
from support.store_saves import CONFIG, Store, state_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.s3_servers import S3Server

LIMIT_S = 120


def save_by_process(
    rank: int, world_size: int, store: Store, root: Path
) -> list[tuple[str, int, int]]:
    """Save three steps, each in another way; return outcome and bytes of both halves of each."""
    reports: list[FinishedSave] = []
    options = dict(store.storage_options)
    assets = {"config.json": CONFIG}
    to = MirrorTo(store.at("step-2"), options)
    apart = HFExport(assets=assets, path=store.at("serve/step-3"))
    ways: list[tuple[str, dict[str, Any]]] = [
        (store.at("step-1"), {"export": HFExport(assets=assets), "storage_options": options}),
        (str(root / "step-2"), {"export": HFExport(assets=assets), "mirror": to}),
        (str(root / "step-3"), {"export": apart, "storage_options": options}),
    ]
    writers = [
        HFDualWriter(path, timeout_s=60, report_to=reports.append, **given) for path, given in ways
    ]
    try:
        for step, writer in enumerate(writers, 1):
            dcp.async_save(
                state_of(step, is_sharded=True),
                storage_writer=writer,
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            ).result(LIMIT_S)
            writer.wait_for_mirror(LIMIT_S)
        return [(one.outcome, one.dcp_nbytes, one.hf_nbytes) for one in reports]
    finally:
        for child in multiprocessing.active_children():
            child.kill()


@pytest.mark.timeout(200)
def test_checkpointer_process_saves_to_a_store_in_each_way(tmp_path: Path, moto: S3Server) -> None:
    bucket = moto.new_bucket()
    store = Store.of_bucket(bucket)
    told, others = run_ranks(save_by_process, 2, store, tmp_path, timeout_s=180)
    # The same state each time, so the reports of rank 0 agree, wherever the halves lie.
    assert len(told) == 3
    assert len(set(told)) == 1
    assert told[0][0] == "published"
    assert min(told[0][1:]) > 0
    assert others == []
    options = dict(store.storage_options)
    for path in (store.at("step-1"), store.at("step-2"), store.at("serve/step-3")):
        report = verify(path, storage_options=options)
        assert report.ok, str(report)
    assert verify(tmp_path / "step-2").ok
    report = verify(tmp_path / "step-3", storage_options=options)
    assert report.ok, str(report)
    assert report.tensor_count > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert bucket.open_uploads() == []
