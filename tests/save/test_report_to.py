"""`report_to=`: rank 0 gets one report of each save, and an error there costs nothing."""

from __future__ import annotations

import logging
import multiprocessing
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import CheckpointManager, FinishedSave, HFDualWriter, HFExport, failpoints
from dcp_hf_writer.errors import ConfigError, ExportError
from support.log_lines import log_lines
from support.named_bytes import EXPORT, sharded_state
from support.ranks import run_ranks
from support.small_states import state_of
from support.store_saves import Store

if TYPE_CHECKING:
    from pathlib import Path

    from support.s3_servers import S3Server

ALONE = {"no_dist": True}
LIMIT_S = 60.0


def save(path: Path, reports: list[FinishedSave], how: str, **options: Any) -> None:
    writer = HFDualWriter(path, report_to=reports.append, **options)
    if how == "sync":
        dcp.save(state_of(1), storage_writer=writer, **ALONE)
    else:
        dcp.async_save(state_of(1), storage_writer=writer, **ALONE).result(LIMIT_S)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_published_save_is_reported_once_with_bytes_and_phases(how: str, tmp_path: Path) -> None:
    reports: list[FinishedSave] = []
    save(tmp_path / "step-70", reports, how)
    (one,) = reports
    assert (one.path, one.step) == (str(tmp_path / "step-70"), 70)
    assert (one.outcome, one.error) == ("published", None)
    dcp_nbytes = sum(p.stat().st_size for p in (tmp_path / "step-70").glob("*.distcp"))
    assert 0 < one.dcp_nbytes <= dcp_nbytes
    assert 0 < one.hf_nbytes < one.nbytes
    assert (one.stall_s is None) == (how == "sync")
    assert {"plan", "prepare", "write dcp", "write hf", "metadata"} <= one.seconds.keys()
    assert 0 < max(one.seconds.values()) <= one.total_s


@pytest.mark.parametrize("how", ["sync", "async"])
def test_failed_save_is_reported_with_its_error(how: str, tmp_path: Path) -> None:
    reports: list[FinishedSave] = []
    save(tmp_path / "step-1", [], how)
    with pytest.raises(BaseException, match="step-1"):
        save(tmp_path / "step-1", reports, how)
    (one,) = reports
    assert (one.outcome, one.nbytes) == ("failed", 0)
    assert one.error is not None
    assert one.error.startswith("TargetExistsError: ")


def test_save_without_its_export_is_one_report(tmp_path: Path) -> None:
    reports: list[FinishedSave] = []
    export = HFExport(assets={"config.json": b"{"}, dtype="bfloat16")
    with pytest.raises(ExportError):
        save(tmp_path / "step-1", reports, "async", export=export)
    (one,) = reports
    assert one.outcome == "without export"
    assert one.dcp_nbytes > 0 == one.hf_nbytes
    assert one.error is not None
    assert one.error.startswith("ExportError: ")


def test_error_of_a_function_is_logged_and_the_others_are_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reports: list[FinishedSave] = []

    def broken(_: FinishedSave) -> None:
        raise RuntimeError("no dashboard today")

    writer = HFDualWriter(tmp_path / "step-1", report_to=[broken, reports.append])
    with caplog.at_level(logging.ERROR, logger="dcp_hf_writer"):
        dcp.async_save(state_of(1), storage_writer=writer, **ALONE).result(LIMIT_S)
    assert [one.outcome for one in reports] == ["published"]
    assert "no dashboard today" in caplog.text
    assert (tmp_path / "step-1" / "dcp-hf.json").exists()


@pytest.mark.parametrize("wrong", [7, "x.prom", [print, None], {"a": print}])
def test_what_is_no_function_is_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="report_to must be a function"):
        HFDualWriter(tmp_path / "step-1", report_to=wrong)


def save_and_fail_on_rank_1(
    rank: int, world_size: int, root: Path, how: str
) -> list[tuple[str, str | None]]:
    """Save twice; the second save fails on rank 1 before its fsync."""
    reports: list[FinishedSave] = []
    for number in (1, 2):
        if number == 2 and rank == 1:
            failpoints.set_hook(fail)
        path = root / f"step-{number}"
        writer = HFDualWriter(path, export=EXPORT, report_to=reports.append)
        try:
            if how == "sync":
                dcp.save(sharded_state(number), storage_writer=writer)
            else:
                dcp.async_save(sharded_state(number), storage_writer=writer).result(LIMIT_S)
        except BaseException:  # noqa: BLE001 - the report tells which
            assert number == 2
    return [(one.outcome, one.error) for one in reports]


def fail(point: str) -> None:
    if point == "before fsync":
        raise OSError(5, "the disk of rank 1")


@pytest.mark.parametrize("how", ["sync", "async"])
def test_only_rank_0_reports_also_when_another_rank_fails(how: str, tmp_path: Path) -> None:
    on_0, on_1 = run_ranks(save_and_fail_on_rank_1, 2, tmp_path, how)
    assert on_1 == []
    (first, _), (second, error) = on_0
    assert (first, second) == ("published", "failed")
    assert error is not None
    if how == "async":
        assert "the disk of rank 1" in error
    else:
        assert "the log of another rank tells why" in error


def test_save_of_a_checkpointer_process_is_reported_by_its_parent(tmp_path: Path) -> None:
    reports = run_ranks(save_in_process, 1, tmp_path)[0]
    (one,) = reports
    assert (one.outcome, one.step) == ("published", 3)
    assert one.dcp_nbytes > 0 < one.hf_nbytes
    assert {"stage", "plan", "total"} <= one.seconds.keys()


def test_save_of_a_checkpointer_process_to_a_store_is_reported_with_its_size(
    moto: S3Server,
) -> None:
    store = Store.of_bucket(moto.new_bucket())
    (reports, text) = run_ranks(save_in_process_to, 1, store)[0]
    (one,) = reports
    files = store.files("step-3")
    assert one.outcome == "published"
    assert one.dcp_nbytes == len(files["__0_0.distcp"])
    assert one.hf_nbytes == len(files["hf/model.safetensors"])
    assert {"stage", "plan", "total"} <= one.seconds.keys()
    assert "0 bytes" not in text
    assert "published" in text


def save_in_process_to(_rank: int, _world: int, store: Store) -> tuple[list[FinishedSave], str]:
    lines = log_lines()
    options = dict(store.storage_options)
    return save_in_process(0, 1, store.at("step-3"), options), "\n".join(lines)


def save_in_process(
    rank: int, world_size: int, root: Path | str, options: Any = None
) -> list[FinishedSave]:
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    reports: list[FinishedSave] = []
    path = root if isinstance(root, str) else root / "step-3"
    writer = HFDualWriter(path, export=EXPORT, report_to=reports.append, storage_options=options)
    kind = AsyncCheckpointerType.PROCESS
    future = dcp.async_save(
        {"model": {"w": torch.ones(9)}}, storage_writer=writer, async_checkpointer_type=kind
    )
    future.result(LIMIT_S)
    for child in multiprocessing.active_children():
        child.kill()
    return reports


def test_manager_passes_the_reports_of_its_saves_on(tmp_path: Path) -> None:
    reports: list[FinishedSave] = []
    with CheckpointManager(
        tmp_path, save_every=2, export=HFExport(), report_to=reports.append
    ) as manager:
        for step in (1, 2, 3, 4):
            manager.step(step, state_of(step))
    assert [(one.step, one.outcome) for one in reports] == [(2, "published"), (4, "published")]
