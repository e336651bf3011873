"""A run on S3 when the store fails, and when processes die: nothing is taken for what it is not."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer import verify
from dcp_hf_writer.errors import CheckpointError, SaveTimeoutError, StorageError, WriteError
from support.fault_proxy import FaultProxy, fault_proxy
from support.faults import Strike, hits
from support.ranks import run_ranks, spawn_ranks
from support.s3_servers import SECRET_KEY
from support.store_runs import (
    manager_on,
    small_state,
    steps_with_objects,
    storage_of,
)
from support.store_saves import Store, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.s3_servers import S3Bucket, S3Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture
def bucket(moto: S3Server) -> S3Bucket:
    return moto.new_bucket()


@pytest.fixture
def proxy(moto: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(moto.endpoint) as made:
        yield made


def test_store_that_does_not_answer_is_no_damaged_checkpoint(
    bucket: S3Bucket, proxy: FaultProxy
) -> None:
    store = Store.of_bucket(bucket.at(proxy.endpoint))
    with manager_on(store, save_every=1) as manager:
        for step in (1, 2):
            manager.step(step, small_state(step))
    run = storage_of(store, answer_s=1.5)
    away = proxy.add("answer", target="step-2/dcp-hf.json", times=math.inf)
    with pytest.raises((WriteError, SaveTimeoutError), match="step-2/dcp-hf"):
        run.steps()
    assert away.hits
    proxy.faults.clear()
    once = proxy.add("answer", target="step-2/dcp-hf.json")
    assert run.steps() == [1, 2]
    assert once.hits == 1
    run.close()


def test_refusal_at_the_start_names_the_key_and_no_credential(
    bucket: S3Bucket, proxy: FaultProxy
) -> None:
    store = Store.of_bucket(bucket.at(proxy.endpoint))
    proxy.add("answer", "PUT", status=403, code="AccessDenied", times=math.inf)
    with pytest.raises(StorageError) as caught:
        manager_on(store)
    assert f"{bucket.url}/run/.dcp-hf-manager/probe-" in str(caught.value)
    assert "AccessDenied" in str(caught.value)
    assert SECRET_KEY not in str(caught.value)


def test_bucket_that_is_not_there_is_an_error_at_the_start(moto: S3Server) -> None:
    options = moto.new_bucket().storage_options
    with pytest.raises(StorageError, match="NoSuchBucket"):
        manager_on(Store("s3://there-is-none/run", options))


def make_with_fault(rank: int, world_size: int, store: Store) -> str:
    try:
        manager_on(store)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_all_ranks_hear_why_the_store_refused(moto: S3Server) -> None:
    options = moto.new_bucket().storage_options
    for text in run_ranks(make_with_fault, 2, Store("s3://there-is-none/run", options)):
        assert "NoSuchBucket" in text


def save_and_die(rank: int, world_size: int, store: Store, root: Path, point: str) -> None:
    """Resume, and kill rank 0 at a point of the second save."""
    strike = Strike(rank=0, point=point, action="kill", hit=2)
    manager = manager_on(store, save_every=1, keep_last=2, timeout_s=20)
    start = manager.restore(state_of(0, is_sharded=True)) or 0
    with strike.installed(rank, root):
        for step in range(start + 1, start + 4):
            manager.step(step, state_of(step, is_sharded=True))
            manager.wait()
    os._exit(1)


def resume(rank: int, world_size: int, store: Store) -> list[Any]:
    """Resume, check what was loaded, and save once more."""
    with manager_on(store, save_every=1, keep_last=2) as manager:
        state = state_of(0, is_sharded=True)
        start = manager.restore(state, verify=True)
        assert start is not None
        wanted = state_of(start, is_sharded=True)["model"]
        assert state["model"]["embed"].to_local().equal(wanted["embed"].to_local())
        manager.save(start + 1, state_of(start + 1, is_sharded=True), wait=True)
        manager.wait()
        return [start, manager.steps()]


@pytest.mark.parametrize(
    ("kind", "point", "expected"),
    [
        ("moto", "before rename", 1),
        pytest.param("rclone", "before fsync", 1, marks=pytest.mark.slow),
        pytest.param("moto", "after rename", 2, marks=pytest.mark.slow),
    ],
)
def test_run_that_is_killed_during_a_save_resumes(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, point: str, expected: int
) -> None:
    bucket = request.getfixturevalue(kind).new_bucket()
    store = Store.of_bucket(bucket)
    with spawn_ranks(save_and_die, 2, store, tmp_path, point, timeout_s=100) as handle:
        while not hits(tmp_path):
            time.sleep(0.05)
        handle.kill(1)
    found = run_ranks(resume, 2, store)
    assert found[0][0] == found[1][0]
    # Rank 0 deletes, so it alone lists what retention leaves.
    start, steps = found[0]
    assert (start, steps) == (expected, list(range(max(expected, 1), expected + 2)))
    assert bucket.open_uploads() == []
    left = steps_with_objects(store)
    assert sorted(left) == [f"step-{step}" for step in steps]
    for name, keys in left.items():
        assert ".dcp-hf-save.json" not in keys
        assert verify(store.at(name), storage_options=dict(store.storage_options)).ok
