"""`HFExport(path=...)`: the export in one place, the DCP half in another one, under one commit."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, failpoints, verify
from dcp_hf_writer.errors import ConfigError, CorruptCheckpointError, ReadError
from dcp_hf_writer.save.recover_targets import recover_parent
from support.fault_proxy import fault_proxy
from support.faults import Strike
from support.halves_apart import KINDS, Halves, save_apart
from support.rank_tensors import tensor
from support.ranks import run_ranks, spawn_ranks
from support.store_saves import MODEL, Store, save_step

if TYPE_CHECKING:
    from support.s3_servers import S3Server

MANIFEST, RECORD = "dcp-hf.json", ".dcp-hf-save.json"


def run_one(halves: Halves, *args: Any, **options: Any) -> str | None:
    """Save on the only rank."""
    return save_apart(0, 1, halves, *args, **options)


def save_local(rank: int, world_size: int, store: Store) -> str | None:
    return save_step(store, "step-1", 1, share="off")


def check_loaded(halves: Halves, name: str, step: int) -> None:
    """Load each half from the place of the DCP half, and verify both."""
    path = f"{halves.dcp}/{name}"
    options: dict[str, Any] = {"storage_options": dict(halves.storage_options)}
    report = verify(path, **options)
    assert report.ok, str(report)
    assert report.checked == "digests"
    for source in ("dcp", "hf"):
        model = {key: torch.zeros(shape) for key, (shape, _) in MODEL.items()}
        reader = HFDualReader(path, source=source, verify=True, **options)
        dcp.load({"model": model}, storage_reader=reader)
        for key, (shape, _) in MODEL.items():
            assert torch.equal(model[key], tensor(f"{key}@{step}", *shape)), (source, key)


def check_place_of_export(halves: Halves, name: str) -> None:
    """The export is a whole HuggingFace directory with a manifest of its own."""
    report = verify(f"{halves.hf}/{name}", storage_options=halves.options_of(halves.hf))
    assert report.ok, str(report)
    manifests = [json.loads(halves.files(at, name)[MANIFEST]) for at in (halves.dcp, halves.hf)]
    assert manifests[0]["other_half"] == {"holds": "hf", "path": f"{halves.hf}/{name}"}
    assert manifests[1]["other_half"] == {"holds": "dcp", "path": f"{halves.dcp}/{name}"}
    assert manifests[0]["save_id"] == manifests[1]["save_id"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("server", "world_size"), [("moto", 2), ("rclone", 1)])
def test_halves_apart_equal_those_of_a_local_save(
    tmp_path: Path, request: pytest.FixtureRequest, server: str, world_size: int
) -> None:
    s3_bucket = request.getfixturevalue(server).new_bucket()
    local = Store(str(tmp_path / "whole"))
    assert run_ranks(save_local, world_size, local) == [None] * world_size
    whole = Halves(local.url, "", {}, tmp_path).files(local.url, "step-1")
    for kind in KINDS:
        halves = Halves.of_kind(kind, tmp_path / kind, s3_bucket)
        name = f"step-1-{kind}"
        assert run_ranks(save_apart, world_size, halves, name, 1) == [None] * world_size
        found = halves.files(halves.dcp, name)
        found |= {f"hf/{key}": data for key, data in halves.files(halves.hf, name).items()}
        # Each place has the digests of its own half.
        digests = {f"dcp-hf/digests-{rank:05d}.safetensors" for rank in range(world_size)}
        of_export = {f"hf/{key}" for key in (MANIFEST, *digests)}
        assert found.keys() - of_export == whole.keys()
        assert of_export < found.keys()
        for key in whole.keys() - {".metadata", MANIFEST, *digests}:
            assert found[key] == whole[key], (kind, key)
        check_place_of_export(halves, name)
        check_loaded(halves, name, 1)
    assert s3_bucket.open_uploads() == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_kill_between_the_halves_leaves_the_checkpoint_before_and_the_next_save_succeeds(
    tmp_path: Path, moto: S3Server, rclone: S3Server, kind: str
) -> None:
    s3_bucket = (rclone if kind == "local-s3" else moto).new_bucket()
    halves = Halves.of_kind(kind, tmp_path / "run", s3_bucket)
    assert run_one(halves, "step-1", 1) is None
    kill = Strike(rank=0, point="export published", action="kill")
    with spawn_ranks(save_apart, 1, halves, "step-2", 2, kill, timeout_s=90) as handle:
        assert handle.outcomes()[0].exitcode == -9
    # The export is whole, and no checkpoint names it.
    assert MANIFEST in halves.files(halves.hf, "step-2")
    assert MANIFEST not in halves.files(halves.dcp, "step-2")
    check_loaded(halves, "step-1", 1)
    assert run_one(halves, "step-2", 3) is None
    check_loaded(halves, "step-2", 3)
    check_place_of_export(halves, "step-2")
    for place in (halves.dcp, halves.hf):
        assert RECORD not in halves.files(place, "step-2")
        if "://" not in place:
            assert sorted(os.listdir(place)) == ["step-1", "step-2"]
    assert s3_bucket.open_uploads() == []


@pytest.mark.parametrize("kind", KINDS)
def test_error_before_the_commit_removes_the_published_export(
    tmp_path: Path, moto: S3Server, kind: str
) -> None:
    bucket = moto.new_bucket()
    halves = Halves.of_kind(kind, tmp_path / "run", bucket)
    fault = Strike(rank=0, point="export published", action="raise")
    error = run_one(halves, "step-1", 1, fault)
    assert error is not None
    assert "InjectedFaultError" in error
    assert halves.files(halves.dcp, "step-1") == {}
    assert halves.files(halves.hf, "step-1") == {}
    assert bucket.open_uploads() == []


def test_the_dcp_half_is_no_leftover_once_the_export_is_published(tmp_path: Path) -> None:
    run = tmp_path / "run"
    found: list[list[str]] = []

    def begin_other_save(point: str) -> None:
        if point == "export published":
            # What another save of this process does first, in a thread of its own.
            recover_parent(str(run), str(run / "step-2"))
            found.append(os.listdir(run))

    failpoints.set_hook(begin_other_save)
    export = HFExport(path=tmp_path / "exports" / "step-1")
    try:
        writer = HFDualWriter(run / "step-1", export=export)
        dcp.save({"model": {"a": torch.ones(3)}}, storage_writer=writer)
    finally:
        failpoints.set_hook(None)
    assert [name.startswith(".incomplete-") for name in found[0]] == [True]
    assert verify(run / "step-1").ok


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["local-s3", "s3-local"])
def test_taken_place_of_the_export_costs_no_dcp_half(
    tmp_path: Path, moto: S3Server, kind: str
) -> None:
    bucket = moto.new_bucket()
    halves = Halves.of_kind(kind, tmp_path / "run", bucket)
    assert run_ranks(save_apart, 2, halves, "step-1", 1) == [None, None]
    before = halves.files(halves.hf, "step-1")
    other = Halves(f"{halves.dcp}-b", halves.hf, halves.storage_options, halves.root)
    for error in run_ranks(save_apart, 2, other, "step-1", 2):
        assert error is not None
        assert "ExportError" in error
        assert "already exists" in error
    assert halves.files(halves.hf, "step-1") == before
    assert json.loads(other.files(other.dcp, "step-1")[MANIFEST]).get("other_half") is None
    report = verify(f"{other.dcp}/step-1", storage_options=other.options_of(other.dcp))
    assert report.ok, str(report)
    check_loaded(halves, "step-1", 1)


@pytest.mark.timeout(120)
def test_missing_bucket_of_the_export_costs_no_dcp_half(tmp_path: Path, moto: S3Server) -> None:
    bucket = moto.new_bucket()
    halves = Halves.of_kind("local-s3", tmp_path / "run", bucket)
    bad = Halves(halves.dcp, f"s3://no-{bucket.name}/serve", halves.storage_options, halves.root)
    for error in run_ranks(save_apart, 2, bad, "step-1", 1):
        assert error is not None
        assert "ExportError" in error
        assert "s3://no-" in error
    report = verify(f"{halves.dcp}/step-1")
    assert report.ok, str(report)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("target", ["partNumber", MANIFEST])
def test_store_of_the_export_that_does_not_answer_costs_no_dcp_half(
    tmp_path: Path, moto: S3Server, target: str
) -> None:
    bucket = moto.new_bucket()
    with fault_proxy(moto.endpoint) as proxy:
        hang = proxy.add("hang", "PUT", target, times=math.inf)
        halves = Halves.of_kind("local-s3", tmp_path / "run", bucket.at(proxy.endpoint))
        error = run_one(halves, "step-1", 1, timeout_s=12)
    assert hang.hits > 0
    assert error is not None
    assert "ExportError" in error
    report = verify(f"{halves.dcp}/step-1")
    assert report.ok, str(report)
    assert [key for key in bucket.keys() if key.endswith(MANIFEST)] == []  # noqa: SIM118


def test_export_that_is_gone_or_replaced_is_found(tmp_path: Path) -> None:
    halves = Halves(str(tmp_path / "train"), str(tmp_path / "serve"), {}, tmp_path)
    assert run_one(halves, "step-1", 1) is None
    place = Path(halves.hf, "step-1")
    place.rename(tmp_path / "moved")
    path = f"{halves.dcp}/step-1"
    assert "not where the manifest says" in str(verify(path))
    with pytest.raises(ReadError, match="not where the manifest says"):
        HFDualReader(path, source="hf").read_metadata()
    other = Halves(str(tmp_path / "other"), halves.hf, {}, tmp_path)
    assert run_one(other, "step-1", 2) is None
    assert "replaced by another save" in str(verify(path))
    with pytest.raises(CorruptCheckpointError, match="replaced by another save"):
        HFDualReader(path, source="hf").read_metadata()
    # The DCP half needs nothing from there.
    state = {"step": 0}
    dcp.load(state, checkpoint_id=path)
    assert state == {"step": 1}


def test_one_writer_serves_all_steps_when_both_paths_name_the_step(tmp_path: Path) -> None:
    halves = Halves(str(tmp_path / "train"), f"{tmp_path}/serve", {}, tmp_path)
    writer = HFDualWriter(
        f"{halves.dcp}/step-1", export=HFExport(path=f"{halves.hf}/step-1/hf", key="model")
    )
    for step in (1, 2):
        state = {"model": {"w": torch.full((2,), float(step))}}
        path = f"{halves.dcp}/step-{step}"
        dcp.async_save(state, checkpoint_id=path, storage_writer=writer).result()
        assert verify(path).ok
        assert Path(halves.hf, f"step-{step}", "hf", "model.safetensors").exists()
    unnamed = HFDualWriter(f"{halves.dcp}/step-3", export=HFExport(path=f"{halves.hf}/newest"))
    with pytest.raises(ConfigError, match="cannot tell where the export of another path goes"):
        unnamed.reset(f"{halves.dcp}/step-4")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"overwrite": True}, "overwrite=True cannot be used"),
        ({"weights": "once"}, 'weights="once" cannot be used'),
        ({"mirror": "s3://bucket/step-1"}, "mirror cannot be used"),
    ],
)
def test_options_that_need_one_place_are_refused(
    tmp_path: Path, options: dict[str, Any], found: str
) -> None:
    with pytest.raises(ConfigError, match=found):
        HFDualWriter(tmp_path / "step-1", export=HFExport(path="s3://bucket/serve"), **options)


@pytest.mark.parametrize("path", ["step-1", "step-1/hf", "."])
def test_place_of_the_export_within_the_checkpoint_or_around_it_is_refused(
    tmp_path: Path, path: str
) -> None:
    with pytest.raises(ConfigError, match="within each other"):
        HFDualWriter(tmp_path / "step-1", export=HFExport(path=os.path.normpath(tmp_path / path)))


def test_place_of_the_export_beside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    for parent in ("run", "link"):
        with pytest.raises(ConfigError, match="in the same directory"):
            HFDualWriter(
                tmp_path / "run" / "step-1", export=HFExport(path=str(tmp_path / parent / "serve"))
            )
    # Another path of the same writer may lie elsewhere.
    export = HFExport(path=str(tmp_path / "serve" / "step-1"))
    writer = HFDualWriter(tmp_path / "run" / "step-1", export=export)
    with pytest.raises(ConfigError, match="within each other"):
        writer.reset(tmp_path / "serve" / "step-2")


def test_options_of_the_export_are_checked() -> None:
    with pytest.raises(ConfigError, match="path and subdir"):
        HFExport(path="s3://bucket/serve", subdir="weights")
    with pytest.raises(ConfigError, match="are for its path"):
        HFExport(storage_options={"key": "value"})
    with pytest.raises(ConfigError, match="checksums"):
        HFDualWriter("/tmp/x", export=HFExport(path="s3://bucket/serve", checksums="sha256"))
