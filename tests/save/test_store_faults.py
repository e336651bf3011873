"""Faults of section S that need a whole run: kills between requests, parts out of order, caches."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, verify
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.s3_store import S3Store
from support.processes import FreshProcess, in_fresh_process
from support.ranks import run_ranks
from support.s3_servers import serving
from support.store_runs import manager_on, small_state, storage_of
from support.store_saves import CONFIG, Store

if TYPE_CHECKING:
    from pathlib import Path

    from support.s3_servers import S3Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

RECORD, MANIFEST = ".dcp-hf-save.json", "dcp-hf.json"

# float32: two files of the export, each of two parts of 5 MiB at most.
ROWS, COLUMNS = 3 << 9, 1 << 10


def state_of(step: int) -> dict[str, Any]:
    """Return a state dict whose values tell the step."""
    model = {f"w{i}": torch.full((ROWS, COLUMNS), step + i / 8) for i in range(2)}
    return {"model": model, "step": step}


def save(store: Store, step: int) -> None:
    """Save a step as `step-<n>`."""
    export = HFExport(assets={"config.json": CONFIG}, max_shard_size=ROWS * COLUMNS * 4)
    writer = HFDualWriter(
        store.at(f"step-{step}"),
        export=export,
        storage_options=dict(store.storage_options),
        host_budget_bytes=1 << 20,
        timeout_s=60,
    )
    dcp.save(state_of(step), storage_writer=writer, no_dist=True)


def check_whole(store: Store, step: int) -> None:
    """The step verifies and loads (I1)."""
    options = dict(store.storage_options)
    report = verify(store.at(f"step-{step}"), storage_options=options)
    assert report.ok, str(report)
    found = {"model": {f"w{i}": torch.zeros(ROWS, COLUMNS) for i in range(2)}, "step": 0}
    reader = HFDualReader(store.at(f"step-{step}"), storage_options=options)
    dcp.load(found, storage_reader=reader)
    assert found["step"] == step
    for name, tensor in state_of(step)["model"].items():
        assert torch.equal(found["model"][name], tensor)


# S13


@dataclass(frozen=True)
class Kill:
    """SIGKILL right after a request of a save, or right before it."""

    request: str
    """A method of the store."""
    key: str
    """End of the key of its object."""
    is_before: bool = False

    def install(self) -> None:
        """Kill this process at the first such request."""
        real = getattr(S3Store, self.request)

        def request(store: S3Store, target: Any, *args: Any, **options: Any) -> Any:
            key = target if isinstance(target, str) else target.key
            is_meant = key.endswith(self.key)
            if is_meant and self.is_before:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = real(store, target, *args, **options)
            if is_meant:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        setattr(S3Store, self.request, request)


KILLS = {
    "between parts": Kill("send_part", ".safetensors"),
    "between completes": Kill("complete", ".safetensors"),
    "after the index": Kill("put", "model.safetensors.index.json"),
    "after the metadata": Kill("put", ".metadata"),
    "before the manifest": Kill("put", MANIFEST, is_before=True),
    "after the manifest": Kill("put", MANIFEST),
}


# The others take as long, and differ little.
USUAL = ("between parts", "before the manifest", "after the manifest")
KILLS_TO_TRY = [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in KILLS
]


def save_and_die(store: Store, kill: Kill) -> None:
    kill.install()
    save(store, 2)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", KILLS_TO_TRY)
def test_s13_kill_between_requests_costs_nothing_but_the_save(moto: S3Server, name: str) -> None:
    """Step 1 is committed, the save of step 2 is killed."""
    bucket = moto.new_bucket()
    store = Store.of_bucket(bucket)
    save(store, 1)
    with FreshProcess(save_and_die, store, KILLS[name]) as process:
        assert process.exitcode() == -signal.SIGKILL
    is_committed = name == "after the manifest"
    run = storage_of(store)
    # I1, I2, I3: the manifest decides.
    assert run.latest() == (2 if is_committed else 1)
    check_whole(store, 1)
    assert (MANIFEST in store.files("step-2")) is is_committed
    # I7: the record names what is there; what is removed stays removed.
    assert RECORD in store.files("step-2")
    assert [one.name for one in run.leftovers()] == ([] if is_committed else ["step-2"])
    if name == "between parts":
        assert bucket.open_uploads() != []
    run.finish_deletions()
    assert run.leftovers() == []
    assert bucket.open_uploads() == []
    assert is_committed or store.files("step-2") == {}
    before = sorted(bucket.keys())
    run.finish_deletions()
    assert sorted(bucket.keys()) == before
    # I8
    if not is_committed:
        save(store, 2)
    check_whole(store, 2)
    assert run.steps() == [1, 2]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["between parts", "before the manifest"])
def test_s13_next_save_needs_no_gc(moto: S3Server, rclone: S3Server, name: str) -> None:
    bucket = (moto if name == "before the manifest" else rclone).new_bucket()
    store = Store.of_bucket(bucket)
    with FreshProcess(save_and_die, store, KILLS[name]) as process:
        assert process.exitcode() == -signal.SIGKILL
    save(store, 2)
    check_whole(store, 2)
    assert bucket.open_uploads() == []
    assert RECORD not in store.files("step-2")


# S16


def save_columns(rank: int, world_size: int, store: Store) -> str | None:
    mesh = init_device_mesh("cpu", (world_size,))
    whole = torch.arange(10 << 20, dtype=torch.float32).reshape(2560, 4096)
    model = {"w": distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None)}
    writer = HFDualWriter(
        store.at("step-1"),
        export=HFExport(assets={"config.json": CONFIG}),
        storage_options=dict(store.storage_options),
        host_budget_bytes=24 << 20,
        timeout_s=60,
    )
    try:
        dcp.async_save({"model": model}, storage_writer=writer).result()
    except BaseException as error:  # noqa: BLE001 - torch's exception is no Exception
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.timeout(150)
def test_s16_parts_out_of_order_do_not_block_a_server_with_a_small_buffer() -> None:
    """Eight parts from two ranks; the server holds no more than one that is not its turn."""
    with serving("rclone", "--multipart-streaming-buffer-limit", "8M") as server:
        bucket = server.new_bucket()
        store = Store.of_bucket(bucket)
        assert run_ranks(save_columns, 2, store, timeout_s=120) == [None, None]
        assert bucket.open_uploads() == []
        report = verify(store.at("step-1"), storage_options=dict(store.storage_options))
        assert report.ok, str(report)


# S17


def save_small(store: Store, step: int) -> None:
    with manager_on(store, save_every=1) as manager:
        manager.step(step, small_state(step))


def test_s17_commit_of_another_process_is_seen_at_once(tmp_path: Path, s3_server: S3Server) -> None:
    store = Store.of_bucket(s3_server.new_bucket())
    with manager_on(store, save_every=1) as manager:
        manager.step(1, small_state(1))
        manager.wait()
        assert manager.latest() == 1
        options = dict(store.storage_options)
        files = open_directory(store.url, options)
        assert "step-2/dcp-hf.json" not in files.tree()
        in_fresh_process(save_small, store, 2)
        assert manager.latest() == 2
        assert manager.steps() == [1, 2]
        assert "step-2/dcp-hf.json" in files.tree()
        assert "step-2/dcp-hf.json" in open_directory(store.url, options).tree()
        state = small_state(0)
        assert manager.restore(state) == 2
