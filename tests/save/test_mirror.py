"""Mirrors: commit on a local path, then upload in the background, and what becomes of failures."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import (
    FinishedMirror,
    HFDualReader,
    HFDualWriter,
    HFExport,
    MirrorTo,
    failpoints,
    resume_mirrors,
    verify,
)
from dcp_hf_writer.errors import (
    ConfigError,
    SaveAbortedError,
    SaveTimeoutError,
    TargetExistsError,
)
from support import shared_store
from support.fault_proxy import fault_proxy
from support.processes import FreshProcess
from support.ranks import run_ranks
from support.store_saves import CONFIG, Store, state_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.fault_proxy import Fault, FaultProxy
    from support.s3_servers import S3Bucket, S3Server


def save(path: Path, mirror: Any, step: int = 1, **options: Any) -> HFDualWriter:
    """Save a small model to a local path with a mirror; return when the save is over."""
    is_sharded = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    writer = HFDualWriter(
        path,
        mirror=mirror,
        export=HFExport(assets={"config.json": CONFIG}, max_shard_size=500_000),
        timeout_s=60,
        **options,
    )
    dcp.async_save(state_of(step, is_sharded=is_sharded), storage_writer=writer).result()
    return writer


def mirror_to(store: Store, name: str) -> MirrorTo:
    shared_store.register()
    return MirrorTo(store.at(name), store.storage_options, timeout_s=60)


def files_below(path: Path) -> dict[str, bytes]:
    return {
        str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()
    }


def left_beside(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir() if one.name.startswith("."))


def save_on_ranks(_rank: int, _world: int, path: Path, store: Store, name: str) -> None:
    to = mirror_to(store, name)
    save(path, to).wait_for_mirror(60)


def test_mirror_holds_the_files_of_the_local_checkpoint_when_ranks_share_the_upload(
    tmp_path: Path,
) -> None:
    store = Store.shared(tmp_path / "store")
    run_ranks(save_on_ranks, 3, tmp_path / "run" / "step-1", store, "step-1")
    assert store.files("step-1") == files_below(tmp_path / "run" / "step-1")
    assert left_beside(tmp_path / "run") == []


def test_mirror_on_s3_can_be_loaded_and_verified(tmp_path: Path, s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    store = Store.of_bucket(bucket)
    run_ranks(save_on_ranks, 2, tmp_path / "step-1", store, "step-1")
    assert store.files("step-1") == files_below(tmp_path / "step-1")
    assert bucket.open_uploads() == []
    options = bucket.storage_options
    report = verify(store.at("step-1"), storage_options=options)
    assert report.ok, str(report)
    state = {"model": {"norm": torch.zeros(3)}, "step": 0}
    reader = HFDualReader(store.at("step-1"), storage_options=options)
    dcp.load(state, storage_reader=reader)
    assert state["step"] == 1


def test_mirror_sends_a_large_file_in_parts_when_the_budget_is_small(
    tmp_path: Path, moto: S3Server
) -> None:
    bucket = moto.new_bucket()
    to = MirrorTo(f"{bucket.url}/run/step-1", bucket.storage_options)
    state = {"w": torch.arange(3 << 20, dtype=torch.float32)}
    writer = HFDualWriter(tmp_path / "step-1", mirror=to, export=None, host_budget_bytes=1 << 20)
    dcp.async_save(state, storage_writer=writer).result()
    writer.wait_for_mirror(60)
    head = bucket.client().head_object(Bucket=bucket.name, Key="run/step-1/__0_0.distcp")
    assert head["ETag"].strip('"').endswith("-3")
    found = bucket.content("run/step-1/__0_0.distcp")
    assert found == (tmp_path / "step-1" / "__0_0.distcp").read_bytes()


def test_one_writer_mirrors_each_step_beside_the_first(tmp_path: Path) -> None:
    store = Store.shared(tmp_path / "store")
    writer = HFDualWriter(tmp_path / "step-1", mirror=store.at("step-1"), export=None)
    for step in (1, 2):
        path = tmp_path / f"step-{step}"
        dcp.save({"w": torch.full((3,), step)}, storage_writer=writer, checkpoint_id=path)
        writer.wait_for_mirror(60)
        assert store.files(f"step-{step}") == files_below(path)


def test_writer_refuses_another_path_when_the_name_of_its_mirror_does_not_match(
    tmp_path: Path,
) -> None:
    store = Store.shared(tmp_path / "store")
    writer = HFDualWriter(tmp_path / "step-1", mirror=store.at("newest"))
    with pytest.raises(ConfigError, match="another path"):
        writer.reset(tmp_path / "step-2")


@pytest.mark.parametrize(
    ("path", "mirror", "text"),
    [
        ("local", "other", "must be the URL of a store"),
        ("local", 3, "must be the URL of a store"),
        ("memory://x/a", "memory://x/b", "has no mirror"),
        ("local", "nothing-known://x", "no file system is known"),
    ],
)
def test_writer_refuses_a_mirror_that_cannot_be_one(
    tmp_path: Path, path: str, mirror: Any, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        HFDualWriter(path if "://" in path else tmp_path / path, mirror=mirror)


def test_mirror_shows_no_credentials() -> None:
    to = MirrorTo("memory://user:hidden-word@x/y", {"secret": "hidden-word"})
    assert "hidden-word" not in repr(to)
    assert to.shown_url == "memory://x/y"


def refusing(proxy: FaultProxy) -> Fault:
    return proxy.add("answer", method="PUT|POST", times=math.inf, status=403, code="AccessDenied")


def test_failed_mirror_is_reported_and_costs_the_save_nothing_and_can_be_resumed(
    tmp_path: Path,
    s3_bucket: S3Bucket,
    s3_proxy: FaultProxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault = refusing(s3_proxy)
    reports: list[FinishedMirror] = []
    store = Store.of_bucket(s3_bucket)
    options = s3_bucket.at(s3_proxy.endpoint).storage_options
    to = MirrorTo(store.at("step-1"), options, report_to=reports.append)
    with caplog.at_level(logging.ERROR):
        writer = save(tmp_path / "step-1", to)
        with pytest.raises(OSError, match="refused"):
            writer.wait_for_mirror(60)
    assert fault.hits
    assert verify(tmp_path / "step-1").ok
    assert [one.outcome for one in reports] == ["failed"]
    assert "is not published" in caplog.text
    assert s3_bucket.keys() == []
    record = next(tmp_path.glob(".mirror-*.json")).read_text()
    assert options["secret"] not in record + caplog.text
    assert options["key"] not in record + caplog.text

    done = resume_mirrors(tmp_path, storage_options=s3_bucket.storage_options)
    assert [(one.outcome, one.error) for one in done] == [("published", None)]
    assert store.files("step-1") == files_below(tmp_path / "step-1")
    assert left_beside(tmp_path) == []
    assert resume_mirrors(tmp_path, storage_options=s3_bucket.storage_options) == []


def test_mirror_gives_up_at_its_deadline_when_the_store_does_not_answer(
    tmp_path: Path, moto: S3Server
) -> None:
    bucket = moto.new_bucket()
    with fault_proxy(moto.endpoint) as proxy:
        fault = proxy.add("answer", times=math.inf)
        options = bucket.at(proxy.endpoint).storage_options
        to = MirrorTo(f"{bucket.url}/step-1", options, timeout_s=1.5)
        writer = save(tmp_path / "step-1", to)
        with pytest.raises(SaveTimeoutError):
            writer.wait_for_mirror(60)
    assert fault.hits > 1
    assert verify(tmp_path / "step-1").ok


def test_mirror_goes_through_when_the_store_fails_now_and_then(
    tmp_path: Path, s3_bucket: S3Bucket, s3_proxy: FaultProxy
) -> None:
    faults = [
        s3_proxy.add("lose_answer", method="PUT", skip=1),
        s3_proxy.add("flip", method="PUT", target="distcp"),
        s3_proxy.add("answer", method="PUT", target="dcp-hf.json", times=2),
        s3_proxy.add("lose_answer", method="PUT", target="dcp-hf.json"),
    ]
    store = Store.of_bucket(s3_bucket)
    to = MirrorTo(store.at("step-1"), s3_bucket.at(s3_proxy.endpoint).storage_options)
    save(tmp_path / "step-1", to).wait_for_mirror(60)
    assert all(fault.hits for fault in faults)
    assert store.files("step-1") == files_below(tmp_path / "step-1")


def test_mirror_leaves_a_checkpoint_of_another_save_alone(tmp_path: Path) -> None:
    store = Store.shared(tmp_path / "store")
    save(tmp_path / "a" / "step-1", store.at("step-1"), 1).wait_for_mirror(60)
    before = store.files("step-1")
    writer = save(tmp_path / "b" / "step-1", store.at("step-1"), 2)
    with pytest.raises(TargetExistsError):
        writer.wait_for_mirror(60)
    assert store.files("step-1") == before


def save_and_die(path: Path, store: Store, place: str, skip: int) -> None:
    """Save, and die by SIGKILL when the upload reaches a place for the `skip + 1`-th time."""
    left = [skip]

    def die(point: str) -> None:
        left[0] -= point == place
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.set_hook(die)
    save(path, mirror_to(store, path.name))
    time.sleep(60)


def save_next(path: Path, store: Store) -> None:
    save(path, mirror_to(store, path.name), 2).wait_for_mirror(60)


KILLED_AT = [
    pytest.param("after rename", 0, marks=pytest.mark.slow),
    pytest.param("mirror begun", 0, marks=pytest.mark.slow),
    ("mirror part sent", 1),
    pytest.param("mirror object sent", 2, marks=pytest.mark.slow),
    pytest.param("before mirror manifest", 0, marks=pytest.mark.slow),
    ("after mirror manifest", 0),
]


@pytest.mark.parametrize(("place", "skip"), KILLED_AT)
def test_next_process_finishes_a_mirror_when_the_uploader_was_killed(
    tmp_path: Path, moto: S3Server, place: str, skip: int
) -> None:
    bucket = moto.new_bucket()
    store, path = Store.of_bucket(bucket), tmp_path / "step-1"
    with FreshProcess(save_and_die, path, store, place, skip) as process:
        assert process.exitcode() == -signal.SIGKILL
    assert verify(path).ok
    has_manifest = "dcp-hf.json" in store.files("step-1")
    assert has_manifest == (place == "after mirror manifest")

    options = bucket.storage_options
    with pytest.raises(SaveAbortedError, match="is gone"):
        HFDualWriter(path, mirror=store.at("step-1"), storage_options=options).wait_for_mirror(5)
    done = resume_mirrors(tmp_path, storage_options=options)
    assert [(one.outcome, one.error) for one in done] == [("published", None)]
    assert store.files("step-1") == files_below(path)
    assert bucket.open_uploads() == []
    assert left_beside(tmp_path) == []


def test_next_writer_finishes_the_mirror_of_a_killed_process(
    tmp_path: Path, moto: S3Server
) -> None:
    bucket = moto.new_bucket()
    store = Store.of_bucket(bucket)
    with FreshProcess(save_and_die, tmp_path / "step-1", store, "mirror object sent", 1) as process:
        assert process.exitcode() == -signal.SIGKILL
    with FreshProcess(save_next, tmp_path / "step-2", store) as process:
        process.result()
        assert process.exitcode() == 0
    for step in ("step-1", "step-2"):
        assert store.files(step) == files_below(tmp_path / step)
    assert left_beside(tmp_path) == []


def save_and_end(path: Path, store: Store) -> None:
    save(path, mirror_to(store, path.name))


def test_process_ends_after_its_mirror(tmp_path: Path, rclone: S3Server) -> None:
    store = Store.of_bucket(rclone.new_bucket())
    with FreshProcess(save_and_end, tmp_path / "step-1", store) as process:
        process.result()
        assert process.exitcode() == 0
    assert store.files("step-1") == files_below(tmp_path / "step-1")


def test_mirror_is_dropped_when_its_local_checkpoint_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store.shared(tmp_path / "store")
    path = tmp_path / "run" / "step-1"
    with FreshProcess(save_and_die, path, store, "mirror begun", 0) as process:
        assert process.exitcode() == -signal.SIGKILL
    path.rename(tmp_path / "elsewhere")
    assert resume_mirrors(tmp_path / "run") == []
    assert "has no checkpoint any more" in caplog.text
    assert left_beside(tmp_path / "run") == []


@pytest.mark.parametrize("name", [".metadata", "dcp-hf/digests-00000.safetensors"])
def test_damaged_local_file_keeps_the_mirror_from_being_published(
    tmp_path: Path, name: str
) -> None:
    store = Store.shared(tmp_path / "store")
    path = tmp_path / "run" / "step-1"
    with FreshProcess(save_and_die, path, store, "mirror begun", 0) as process:
        assert process.exitcode() == -signal.SIGKILL
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = resume_mirrors(tmp_path / "run")
    assert [one.outcome for one in done] == ["failed"]
    assert "not as its manifest says" in str(done[0].error)
    assert "dcp-hf.json" not in store.files("step-1")


def die_on_rank_1(rank: int, _world: int, path: Path, store: Store) -> str:
    """Rank 1 uploads nothing: rank 0 does its share."""

    def refuse(point: str) -> None:
        if point == "mirror begun":
            msg = "no upload on this rank"
            raise OSError(msg)

    if rank == 1:
        failpoints.set_hook(refuse)
    else:
        from dcp_hf_writer.save import mirror_upload

        mirror_upload._GRACE_S = 0.5
    writer = save(path, mirror_to(store, "step-1"))
    try:
        writer.wait_for_mirror(60)
    except BaseException as error:  # noqa: BLE001 - compared by the test
        return type(error).__name__
    return ""


def test_first_rank_uploads_what_another_rank_could_not(tmp_path: Path) -> None:
    store = Store.shared(tmp_path / "store")
    path = tmp_path / "run" / "step-1"
    assert run_ranks(die_on_rank_1, 2, path, store) == ["", "SaveAbortedError"]
    assert store.files("step-1") == files_below(path)
