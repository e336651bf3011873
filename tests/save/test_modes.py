"""Every way in which torch saves: what is read back is what was held at the call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, WriteSlots
from dcp_hf_writer.errors import CheckpointError, ConfigError
from support.compare import tensor_difference
from support.ranks import run_ranks
from support.small_states import (
    dcp_difference,
    difference,
    leftovers,
    model_of,
    spoil,
    state_of,
    take_name,
)
from support.stock_fsspec import FsspecWriter
from support.stock_readers import load_hf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

THREAD, PROCESS = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS

# The step of a directory `<name>-<step>` tells what it must hold.


def save(path: Path, mesh: DeviceMesh | None, step: int, **options: Any) -> None:
    state = state_of(step, mesh)
    response = dcp.async_save(state, storage_writer=HFDualWriter(path), **options)
    spoil(state)
    response.result()


def by_dcp_save(root: Path, mesh: DeviceMesh | None) -> None:
    dcp.save(state_of(1, mesh), storage_writer=HFDualWriter(root / "save-1"))


def by_thread(root: Path, mesh: DeviceMesh | None) -> None:
    save(root / "thread-2", mesh, 2, async_checkpointer_type=THREAD)


def with_checkpoint_id(root: Path, mesh: DeviceMesh | None) -> None:
    state = state_of(3, mesh)
    writer = HFDualWriter(root / "never")
    dcp.async_save(state, storage_writer=writer, checkpoint_id=root / "async-id-3").result()
    dcp.save(state, storage_writer=writer, checkpoint_id=str(root / "id-3"))


def one_writer_for_many_steps(root: Path, mesh: DeviceMesh | None) -> None:
    writer = HFDualWriter(root / "kept-4")
    for step in (4, 5, 6):
        state = state_of(step, mesh)
        future = dcp.async_save(state, storage_writer=writer, checkpoint_id=root / f"kept-{step}")
        spoil(state)
        future.result()


def one_writer_that_is_not_waited_for(root: Path, mesh: DeviceMesh | None) -> None:
    writer = HFDualWriter(root / "never")
    futures = []
    for step in (30, 31, 32):
        state = state_of(step, mesh)
        checkpoint_id = root / f"busy-{step}"
        futures.append(dcp.async_save(state, storage_writer=writer, checkpoint_id=checkpoint_id))
        spoil(state)
    for future in futures:
        future.result()


def new_writer_each_step(root: Path, mesh: DeviceMesh | None) -> None:
    futures = []
    for step in (7, 8, 9):
        state = state_of(step, mesh)
        # Not waited for: the next save waits for the staging memory.
        futures.append(dcp.async_save(state, storage_writer=HFDualWriter(root / f"new-{step}")))
        spoil(state)
    for future in futures:
        future.result()


def overlapped(root: Path, mesh: DeviceMesh | None) -> None:
    writer = HFDualWriter(root / "overlap-10", staging="overlap")
    state = state_of(10, mesh)
    response = dcp.async_save(state, storage_writer=writer)
    assert isinstance(response, AsyncSaveResponse)
    response.staging_completion.result()
    spoil(state)
    response.upload_completion.result()


def overwriting(root: Path, mesh: DeviceMesh | None) -> None:
    path = root / "overwrite-12"
    dcp.save(state_of(11, mesh), storage_writer=HFDualWriter(path))
    dcp.save(state_of(12, mesh), storage_writer=HFDualWriter(path, overwrite=True))


def with_writer_of_torch(root: Path, mesh: DeviceMesh | None) -> None:
    for step, make in (
        (13, lambda path: FileSystemWriter(path, thread_count=2)),
        (14, lambda path: FileSystemWriter(path, single_file_per_rank=False)),
        (33, lambda path: FsspecWriter(str(path))),
    ):
        path = root / f"given-{step}"
        writer = HFDualWriter(path, dcp_writer=make(path))
        state = state_of(step, mesh)
        future = dcp.async_save(state, storage_writer=writer)
        spoil(state)
        future.result()


def with_other_planners(root: Path, mesh: DeviceMesh | None) -> None:
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    writer = HFDualWriter(root / "planner-34")
    dcp.async_save(state_of(34, mesh), storage_writer=writer, planner=planner).result()
    # Names are as they are, dots and all; there are no entries.
    planner = DefaultSavePlanner(flatten_state_dict=False)
    writer = HFDualWriter(root / "other" / "flat-35")
    dcp.async_save(state_of(35, mesh)["model"], storage_writer=writer, planner=planner).result()


def with_one_slot(root: Path, mesh: DeviceMesh | None) -> None:
    for step in (15, 16):
        writer = HFDualWriter(root / f"slots-{step}", slots=WriteSlots(1))
        dcp.async_save(state_of(step, mesh), storage_writer=writer).result()


class Part:
    """A `Stateful`, as trainers have."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def stateful(root: Path, mesh: DeviceMesh | None) -> None:
    for step, saved in ((17, dcp.save), (18, dcp.async_save)):
        state = state_of(step, mesh)
        parts = {"model": Part(state["model"]), "optim": Part(state["optim"]), "step": step}
        outcome = saved(parts, storage_writer=HFDualWriter(root / f"stateful-{step}"))
        if saved is dcp.async_save:
            outcome.result()


def on_paths_of_every_kind(root: Path, mesh: DeviceMesh | None) -> None:
    for step, path in (
        (19, str(root / "missing" / "parents" / "path-19")),
        (20, f"file://{root}/path-20"),
    ):
        dcp.save(state_of(step, mesh), storage_writer=HFDualWriter(path))


def tied_in_a_synchronous_save(root: Path, mesh: DeviceMesh | None) -> None:
    for step, dtype in ((21, None), (22, torch.bfloat16)):
        state = state_of(step, mesh)
        state["model"]["tied"] = state["model"]["embed"].detach()
        writer = HFDualWriter(root / "tied" / f"tied-{step}", export=HFExport(dtype=dtype))
        dcp.save(state, storage_writer=writer)


def bare_and_nested(root: Path, mesh: DeviceMesh | None) -> None:
    state = state_of(23, mesh)
    dcp.save(state["model"], storage_writer=HFDualWriter(root / "other" / "bare-23"))
    dcp.save({"app": state}, storage_writer=HFDualWriter(root / "other" / "nested-23"))
    dcp.async_save(
        state["model"], storage_writer=HFDualWriter(root / "other" / "async-bare-23")
    ).result()


def without_export(root: Path, mesh: DeviceMesh | None) -> None:
    writer = HFDualWriter(root / "other" / "dcp-only-24", export=None)
    dcp.async_save(state_of(24, mesh), storage_writer=writer).result()


def by_process(root: Path, mesh: DeviceMesh | None) -> None:
    save(root / "process-25", mesh, 25, async_checkpointer_type=PROCESS)
    state = state_of(26, mesh)
    path = root / "process-26"
    writer = HFDualWriter(path, dcp_writer=FileSystemWriter(path, thread_count=2))
    future = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=PROCESS)
    spoil(state)
    future.result()
    writer = HFDualWriter(
        root / "process-27", staging="overlap", export=HFExport(assets={"config.json": b"{}"})
    )
    state = state_of(27, mesh)
    response = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=PROCESS)
    response.staging_completion.result()
    spoil(state)
    response.upload_completion.result()
    assert (root / "process-27" / "hf" / "config.json").read_bytes() == b"{}"


WAYS: list[Callable[[Path, DeviceMesh | None], None]] = [
    by_dcp_save,
    by_thread,
    with_checkpoint_id,
    one_writer_for_many_steps,
    one_writer_that_is_not_waited_for,
    new_writer_each_step,
    overlapped,
    overwriting,
    with_writer_of_torch,
    with_other_planners,
    with_one_slot,
    stateful,
    on_paths_of_every_kind,
    tied_in_a_synchronous_save,
    bare_and_nested,
    without_export,
]
DIRECT = {
    *("save-1", "thread-2", "async-id-3", "id-3", "kept-4", "kept-5", "kept-6"),
    *("new-7", "new-8", "new-9", "overlap-10", "overwrite-12", "given-13", "given-14"),
    *("busy-30", "busy-31", "busy-32", "given-33", "planner-34"),
    *("slots-15", "slots-16", "stateful-17", "stateful-18", "missing/parents/path-19", "path-20"),
}


def save_all_ways(rank: int, world_size: int, root: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for way in WAYS:
        way(root, mesh)


def save_by_process(rank: int, world_size: int, root: Path) -> None:
    by_process(root, init_device_mesh("cpu", (world_size,)))


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda count: f"ranks-{count}")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(f"modes-{request.param}")
    run_ranks(save_all_ways, request.param, root)
    return root


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


@pytest.mark.parametrize("name", sorted(DIRECT))
def test_checkpoint_holds_what_was_held_at_the_call(saved: Path, name: str) -> None:
    path = saved / name
    assert difference(path, step_of(path)) is None


def test_ways_leave_their_checkpoints_and_nothing_else(saved: Path) -> None:
    expected = {name.partition("/")[0] for name in DIRECT} | {"tied", "other"}
    assert {path.name for path in saved.iterdir()} == expected


@pytest.mark.parametrize("step", [21, 22])
def test_tied_weights_are_exported_once_by_a_synchronous_save(saved: Path, step: int) -> None:
    expected = model_of(step)
    if step == 22:
        expected = {name: value.to(torch.bfloat16) for name, value in expected.items()}
    assert tensor_difference(load_hf(saved / "tied" / f"tied-{step}" / "hf"), expected) is None
    state = state_of(step)
    state["model"]["tied"] = state["model"]["embed"]
    assert dcp_difference(saved / "tied" / f"tied-{step}", state) is None


@pytest.mark.parametrize("name", ["bare-23", "async-bare-23", "flat-35", "nested-23"])
def test_model_is_found_in_bare_and_nested_state_dicts(saved: Path, name: str) -> None:
    path = saved / "other" / name
    state = state_of(step_of(path))
    expected = {"app": state} if name == "nested-23" else state["model"]
    assert dcp_difference(path, expected) is None
    assert tensor_difference(load_hf(path / "hf"), state["model"]) is None


def test_no_export_is_left_when_none_is_asked_for(saved: Path) -> None:
    path = saved / "other" / "dcp-only-24"
    assert dcp_difference(path, state_of(24)) is None
    assert not (path / "hf").exists()


# Starting a process for each rank takes seconds; those of 1 and 2 ranks are in `test_staging` and
# `test_plan_caching`.
def test_checkpointer_processes_save_what_was_held_at_the_call(tmp_path: Path) -> None:
    run_ranks(save_by_process, 4, tmp_path)
    for step in (25, 26, 27):
        assert difference(tmp_path / f"process-{step}", step) is None
    assert leftovers(tmp_path) == []


def test_comparison_fails_when_a_checkpoint_holds_another_step(saved: Path) -> None:
    assert "'/step': 2" in (difference(saved / "save-1", 2) or "")
    assert "bytes differ" in (dcp_difference(saved / "save-1", {"model": model_of(2)}) or "")
    bfloat16 = {name: value.to(torch.bfloat16) for name, value in model_of(1).items()}
    assert "torch.bfloat16" in (difference(saved / "save-1", 1, exported=bfloat16) or "")


# Alone


ALONE = ("save-1", "thread-2", "kept-6", "overlap-10", "overwrite-12", "given-13", "given-14")


def test_saves_work_without_a_process_group(tmp_path: Path) -> None:
    assert not dist.is_initialized()
    for way in (by_dcp_save, by_thread, one_writer_for_many_steps, overlapped, overwriting):
        way(tmp_path, None)
    with_writer_of_torch(tmp_path, None)
    found = {name: difference(tmp_path / name, step_of(tmp_path / name)) for name in ALONE}
    assert found == dict.fromkeys(ALONE)
    assert leftovers(tmp_path) == []


def save_each_for_itself(rank: int, world_size: int, root: Path) -> None:
    """Save with `no_dist=True`: every rank a checkpoint of its own, at the same time."""
    dcp.save(state_of(rank), storage_writer=HFDualWriter(root / f"save-{rank}"), no_dist=True)
    save(root / f"thread-{rank}", None, rank, no_dist=True)
    assert rank > 0 or dist.get_world_size() == world_size
    dist.barrier()


def test_each_rank_saves_for_itself_when_told_to_take_no_part(tmp_path: Path) -> None:
    run_ranks(save_each_for_itself, 2, tmp_path)
    for name in ("save-0", "save-1", "thread-0", "thread-1"):
        assert difference(tmp_path / name, step_of(tmp_path / name)) is None
    assert leftovers(tmp_path) == []


# Part of the ranks


def save_in_groups(rank: int, world_size: int, root: Path) -> None:
    """Two groups save at the same time; the first ranks of both are their coordinators."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = rank % 2
    group = groups[mine]
    mesh = DeviceMesh.from_group(group, "cpu")
    for kind, step in (("save", mine), ("async", 10 + mine)):
        state = state_of(step, mesh)
        writer = HFDualWriter(root / f"{kind}-{step}", process_group=group)
        if kind == "save":
            dcp.save(state, storage_writer=writer, process_group=group)
        else:
            dcp.async_save(state, storage_writer=writer, process_group=group).result()


def save_in_one_group(rank: int, world_size: int, root: Path) -> None:
    """Only the last two ranks save; the others go on."""
    group = dist.new_group([2, 3])
    if rank < 2:
        return
    mesh = DeviceMesh.from_group(group, "cpu")
    for step in (0, 1):
        state = state_of(step, mesh)
        writer = HFDualWriter(root / f"part-{step}", process_group=group)
        dcp.async_save(state, storage_writer=writer, process_group=group).result()
    options = {"async_checkpointer_type": PROCESS, "process_group": group}
    state = state_of(2, mesh)
    writer = HFDualWriter(root / "part-2", process_group=group)
    dcp.async_save(state, storage_writer=writer, **options).result()


def test_groups_of_ranks_save_at_the_same_time(tmp_path: Path) -> None:
    run_ranks(save_in_groups, 4, tmp_path)
    for name in ("save-0", "save-1", "async-10", "async-11"):
        assert difference(tmp_path / name, step_of(tmp_path / name)) is None
    assert leftovers(tmp_path) == []


def test_group_without_rank_0_saves(tmp_path: Path) -> None:
    run_ranks(save_in_one_group, 4, tmp_path)
    for name in ("part-0", "part-1", "part-2"):
        assert difference(tmp_path / name, step_of(tmp_path / name)) is None
    assert leftovers(tmp_path) == []


# Refusals


def save_refused(rank: int, world_size: int, root: Path) -> list[tuple[str, str]]:
    found = []
    state = state_of(1, init_device_mesh("cpu", (world_size,)))
    take_name(root / "taken-1")
    dist.barrier()
    for path, options in (
        (root / "uncoordinated", {"use_collectives": False}),
        (root / "taken-1", {}),
    ):
        try:
            dcp.async_save(state, storage_writer=HFDualWriter(path), **options).result()
        except CheckpointError as error:
            found.append((type(error).__name__, str(error)))
    # What was refused does not stand in the way of the next save.
    dcp.async_save(state, storage_writer=HFDualWriter(root / "after-1")).result()
    return found


def test_saves_that_cannot_be_made_are_refused_on_every_rank(tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks(save_refused, 2, tmp_path)):
        assert [kind for kind, _ in found] == ["ConfigError", "TargetExistsError"], rank
        assert "use_collectives=False is not supported" in found[0][1]
        assert "overwrite=True" in found[1][1]
    assert difference(tmp_path / "after-1", 1) is None
    assert {path.name for path in tmp_path.iterdir()} == {"taken-1", "after-1"}
    assert os.listdir(tmp_path / "taken-1") == [".metadata"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": ""}, "path must be a path"),
        ({"path": "s3://bucket/step-1", "overwrite": True}, "overwrite=True is for local paths"),
        ({"path": "nowhere://bucket/step-1"}, "no file system is known for nowhere://"),
        ({"path": "simplecache::memory://x"}, "chain of file systems"),
        ({"storage_options": "key"}, "must be a dict or None"),
        ({"weights": "twice"}, "'both' or 'once'"),
        ({"weights": "twice"}, "'both'"),
        ({"staging": "never"}, "'blocking' or 'overlap'"),
        ({"on_export_error": "ignore"}, "'raise' or 'warn'"),
        ({"strategy": "gather"}, "'exchange'"),
        ({"timeout_s": 0}, "above zero"),
        ({"timeout_s": float("nan")}, "above zero"),
        ({"timeout_s": float("inf")}, "above zero"),
        ({"timeout_s": True}, "above zero"),
        ({"host_budget_bytes": 1}, "too small"),
        ({"storage_options": {"key": "x"}}, "object store"),
        ({"export": "hf"}, "HFExport"),
    ],
)
def test_option_is_refused_when_it_cannot_be_used(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HFDualWriter(**{"path": "step-1", **options})


def test_writer_is_a_storage_writer_for_paths_and_urls_of_stores() -> None:
    assert HFDualWriter.validate_checkpoint_id("ckpt/step-1")
    assert HFDualWriter.validate_checkpoint_id("memory://run/step-1")
    assert not HFDualWriter.validate_checkpoint_id("nowhere://bucket/step-1")
    assert HFDualWriter("ckpt/step-1").checkpoint_id == os.path.abspath("ckpt/step-1")
