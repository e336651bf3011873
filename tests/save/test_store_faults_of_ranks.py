"""Saves of two ranks through a server that fails: the faults S1 to S12 with I1 to I8.

How each request is tried again is tested in `tests/storage/test_s3_faults.py`. Here, whole saves
run into the same faults, all in one run of two ranks for each server.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, verify
from support.fault_proxy import fault_proxy
from support.faults import Resources
from support.ranks import run_ranks
from support.store_runs import storage_of
from support.store_saves import CONFIG, Store

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

    from support.fault_proxy import FaultProxy
    from support.s3_servers import S3Bucket, S3Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

MANIFEST = "dcp-hf.json"
TIMEOUT_S = 12.0
# How much later than its deadline a save may tell its outcome (I4, I5).
AFTER_S = 5.0

# float32: one file of the export in two parts, one from each rank.
ROWS, COLUMNS = 3 << 9, 1 << 10

PART = r"hf/model.*partNumber="
COMPLETE = r"hf/model.*[?&]uploadId="
CREATE = r"hf/model.*\?uploads"
DCP_FILE = r"__1_0\.distcp"


@dataclass(frozen=True)
class Case:
    """A fault in one save, and what the save comes to."""

    act: str
    method: str
    target: str
    """What follows the name of the checkpoint in the request."""
    more: Mapping[str, Any]
    words: tuple[str, ...] | None = None
    """What the error of each rank says; `None` if the save succeeds."""
    within_s: float = TIMEOUT_S + AFTER_S
    """How long the save may take."""


ALWAYS: dict[str, Any] = {"times": math.inf}

CASES = {
    "S1 503 eight times": Case("answer", "PUT", PART, {"times": 8}),
    "S1 503 for ever": Case("answer", "PUT", DCP_FILE, ALWAYS, ("503", "SlowDown", "__1_0.distcp")),
    "S2 500 three times": Case(
        "answer", "PUT", r"\.metadata", {"times": 3, "status": 500, "code": "InternalError"}
    ),
    "S3 reset in a body": Case("abort", "PUT", PART, {"after_nbytes": 65536, "times": 3}),
    "S4 answer to a part lost": Case("lose_answer", "PUT", PART, {}),
    "S5 answer to complete lost": Case("lose_answer", "POST", COMPLETE, {}),
    "S6 complete answers 200 with an error": Case(
        "answer", "POST", COMPLETE, {"status": 200, "code": "InternalError"}
    ),
    "S7 answer to create lost": Case("lose_answer", "POST", CREATE, {}),
    "S8 answer to the manifest lost": Case("lose_answer", "PUT", r"dcp-hf\.json$", {}),
    "S9 no answer": Case("hang", "PUT", DCP_FILE, ALWAYS, ("rank 1 write", "deadline")),
    "S9 slow body": Case("slow", "PUT", PART, {"delay_s": 0.005}),
    "S10 bit flipped": Case("flip", "PUT", PART, {"times": 2}),
    "S10 bit flipped in a DCP file": Case("flip", "PUT", DCP_FILE, {}),
    "S11 access denied": Case(
        "answer", "PUT", DCP_FILE, {"status": 403, "code": "AccessDenied", **ALWAYS},
        ("AccessDenied", "__1_0.distcp"), AFTER_S,
    ),
    "S12 upload aborted by others": Case("call", "POST", COMPLETE, {}, ("upload",), AFTER_S),
}  # fmt: skip


# One of each outcome; none waits for a deadline.
QUICK = ("S6 complete answers 200 with an error", "S10 bit flipped", "S12 upload aborted by others")


def name_of(case: str) -> str:
    """Return the name of the checkpoint of a case."""
    return f"step-{2 + list(CASES).index(case)}"


def install(proxy: FaultProxy, bucket: S3Bucket) -> dict[str, Any]:
    """Let the proxy fail in the save of each case."""

    def abort_uploads_of(name: str) -> None:
        client = bucket.client()
        for key, upload in bucket.open_uploads():
            if key.startswith(f"run/{name}/"):
                client.abort_multipart_upload(Bucket=bucket.name, Key=key, UploadId=upload)

    faults = {}
    for text, case in CASES.items():
        name = name_of(text)
        more = dict(case.more)
        if case.act == "call":
            more["then"] = lambda name=name: abort_uploads_of(name)
        act: Any = case.act
        faults[text] = proxy.add(act, case.method, f"run/{name}/.*{case.target}", **more)
    return faults


def save_all(rank: int, world_size: int, store: Store, root: Path, names: list[str]) -> list[Any]:
    """Save a step without a fault, then each of the others.

    Returns:
        For each of the others: the error, seconds, what the rank holds more than before, and the
        sum of ones over the ranks by the training group.
    """
    mesh = init_device_mesh("cpu", (world_size,))
    found: list[Any] = []
    for name in ["step-1", *names]:
        # The clean-up threads of clients come and go with the first saves.
        resources = Resources(root, with_slots=False)
        begun = time.monotonic()
        error = save(store, name, mesh)
        seconds = time.monotonic() - begun
        leaked = resources.leaked()
        ones = torch.ones(())
        dist.all_reduce(ones)
        found.append((error, seconds, leaked, int(ones)))
    assert found[0][0] is None, found[0][0]
    return found[1:]


def save(store: Store, name: str, mesh: DeviceMesh) -> str | None:
    """Save a step, whose values are its number; return the type and text of the error."""
    whole = torch.full((ROWS, COLUMNS), float(name.rpartition("-")[2]))
    model = {"w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)}
    writer = HFDualWriter(
        store.at(name),
        export=HFExport(assets={"config.json": CONFIG}),
        storage_options=dict(store.storage_options),
        host_budget_bytes=1 << 20,
        timeout_s=TIMEOUT_S,
    )
    try:
        dcp.async_save({"model": model}, storage_writer=writer).result(timeout=60)
    except BaseException as error:  # noqa: BLE001 - torch's exception is no Exception
        return f"{type(error).__name__}: {error}"
    return None


def save_again(rank: int, world_size: int, store: Store, names: list[str]) -> list[str | None]:
    mesh = init_device_mesh("cpu", (world_size,))
    return [save(store, name, mesh) for name in names]


def check_whole(store: Store, name: str) -> None:
    """The checkpoint verifies, and loads with the values of its step."""
    options = dict(store.storage_options)
    report = verify(store.at(name), storage_options=options)
    assert report.ok, str(report)
    found = {"model": {"w": torch.zeros(ROWS, COLUMNS)}}
    dcp.load(found, storage_reader=HFDualReader(store.at(name), storage_options=options))
    assert set(found["model"]["w"].unique().tolist()) == {float(name.rpartition("-")[2])}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("kind", "tried"),
    [
        pytest.param("moto", QUICK, id="moto, some"),
        pytest.param("moto", tuple(CASES), id="moto, all", marks=pytest.mark.slow),
        pytest.param("rclone", tuple(CASES), id="rclone, all", marks=pytest.mark.slow),
    ],
)
def test_promises_hold_for_two_ranks_when_the_server_fails(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, tried: tuple[str, ...]
) -> None:
    s3_server: S3Server = request.getfixturevalue(kind)
    bucket = s3_server.new_bucket()
    cases = {text: CASES[text] for text in tried}
    if kind == "rclone":
        # It streams parts to its disk, and refuses another try at one with other bytes.
        del cases["S10 bit flipped"]
    names = [name_of(text) for text in cases]
    with fault_proxy(s3_server.endpoint) as proxy:
        faults = install(proxy, bucket)
        struck = Store.of_bucket(bucket.at(proxy.endpoint))
        results = run_ranks(save_all, 2, struck, tmp_path, names, timeout_s=300)
    store = Store.of_bucket(bucket)
    for number, (text, case) in enumerate(cases.items()):
        assert faults[text].hits >= 1, f"the fault did not strike: {text}"
        check_ranks(text, case, [of_rank[number] for of_rank in results])
    lost = [name_of(text) for text, case in cases.items() if case.words is not None]
    kept = ["step-1", *(name for name in names if name not in lost)]
    # I1, I2, I3: storage alone decides.
    for name in names:
        assert (MANIFEST in store.files(name)) is (name in kept), name
    run = storage_of(store)
    assert [f"step-{step}" for step in run.steps()] == kept
    assert f"step-{run.latest()}" == kept[-1]
    for name in kept:
        check_whole(store, name)
    # I6, I7: a record names what a failed save left, and what is removed stays removed.
    assert bucket.open_uploads() == []
    assert {one.name for one in run.leftovers()} <= set(lost)
    run.finish_deletions()
    assert run.leftovers() == []
    before = sorted(bucket.keys())
    run.finish_deletions()
    assert sorted(bucket.keys()) == before
    for name in kept:
        assert MANIFEST in store.files(name)
    # I8
    assert run_ranks(save_again, 2, store, lost, timeout_s=120) == [[None] * len(lost)] * 2
    for name in lost:
        check_whole(store, name)


def check_ranks(text: str, case: Case, ranks: list[Any]) -> None:
    """Check I4, I5 and I6 of one save."""
    for rank, (error, seconds, leaked, ranks_of_group) in enumerate(ranks):
        assert seconds < case.within_s, f"{text} on rank {rank} took {seconds:.1f} s"
        assert leaked == [], f"{text} on rank {rank}"
        assert ranks_of_group == 2
        if case.words is None:
            assert error is None, f"{text} on rank {rank}: {error}"
            continue
        assert error is not None, f"{text} on rank {rank}"
        assert f"run/{name_of(text)}" in error, f"{text} on rank {rank}: {error}"
        for word in case.words:
            assert word in error, f"{text} on rank {rank}: {error}"
