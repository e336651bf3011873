"""Staging: what the trainer changes after the call reaches no file, and what is kept is reused."""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import random
import threading
import time
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, failpoints
from dcp_hf_writer.errors import StagingBusyError, StagingError
from dcp_hf_writer.staging.same_memory import memory_of
from dcp_hf_writer.staging.slab import SLABS
from dcp_hf_writer.staging.stager import EAGER_NBYTES, Staged, Stager
from support.audit import read_manifest
from support.compare import bits, tensor_difference
from support.rank_tensors import tensor
from support.ranks import run_ranks
from support.small_states import dcp_difference, difference, leftovers, spoil, state_of
from support.stock_readers import load_dcp, load_hf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

THREAD, PROCESS = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
LARGE = EAGER_NBYTES // 4


def soon() -> float:
    return time.monotonic() + 20


@contextlib.contextmanager
def held_at(point: str) -> Iterator[threading.Event]:
    """Hold every save at a point until the event is set, or the block ends."""
    go_on = threading.Event()

    def wait(reached: str) -> None:
        if reached == point:
            assert go_on.wait(30)

    failpoints.set_hook(wait)
    try:
        yield go_on
    finally:
        go_on.set()
        failpoints.set_hook(None)


class Named(NamedTuple):
    weight: torch.Tensor
    note: str


@dataclass
class Settings:
    """A value of a class that DCP does not know."""

    names: list[str]


def values() -> dict[str, Any]:
    """Make plain values of many kinds, all new."""
    return {
        "number": 3,
        "ratio": 0.5,
        "text": "before",
        "names": ["a", "b"],
        "mapping": {"depth": {"seeds": [1, 2]}},
        "set": {1, 2},
        "bytes": bytearray(b"before"),
        "array": np.arange(4),
        "queue": collections.deque([1, 2]),
        "size": torch.Size([2, 3]),
        "pair": (1, ["inner"]),
        "random": random.Random(5).getstate(),
        "settings": Settings(["a"]),
        "none": None,
    }


def change(found: dict[str, Any]) -> None:
    """Change every value that can be changed in place, and replace the others."""
    found["names"].append("after")
    found["mapping"]["depth"]["seeds"].append(3)
    found["set"].add(3)
    found["bytes"][:] = b"after!"
    found["array"][:] = -1
    found["queue"].append(3)
    found["pair"][1].append("after")
    found["settings"].names.append("after")
    found.update(number=4, ratio=1.5, text="after", size=torch.Size([]), none=1)


def shown(found: dict[str, Any]) -> dict[str, str]:
    return {name: repr(value) for name, value in found.items() if name != "mapping"}


# After the call


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_nothing_that_changes_after_the_call_reaches_a_file(tmp_path: Path) -> None:
    kept = save_and_go_on(tmp_path / "step-1", THREAD)
    assert_holds(tmp_path / "step-1", kept)


def assert_holds(path: Path, kept: dict[str, Any]) -> None:
    assert dcp_difference(path, kept) is None
    assert tensor_difference(load_hf(path / "hf"), kept["model"]) is None
    plain = values()
    loaded = load_dcp(path, {"values": plain})["values"]
    assert shown(loaded) == shown(plain)
    assert loaded["mapping"]["depth"]["seeds"] == [1, 2]


def save_and_go_on(path: Path, kind: AsyncCheckpointerType) -> dict[str, Any]:
    """Save, then train and change everything while the save is held; return what was held."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    moments = optimizer.state_dict()["state"]
    optim = {str(i): dict(state) for i, state in moments.items()}
    cpu, plain = {"counts": torch.arange(5), "strided": torch.arange(12.0)[::3]}, values()
    kept = {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "optim": {i: {n: v.clone() for n, v in state.items()} for i, state in optim.items()},
        "cpu": {name: value.clone() for name, value in cpu.items()},
    }
    state = {"model": model.state_dict(), "optim": optim, "cpu": cpu, "values": plain}
    with held_at("local plan") as go_on:
        writer = HFDualWriter(path, export=HFExport(key="model"))
        future = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=kind)
        train(model, optimizer)
        spoil(cpu)
        change(plain)
        state["model"].clear()
        state["new"] = torch.ones(2)
        go_on.set()
        future.result()
    changed = model.state_dict()
    assert all(not torch.equal(changed[name], value) for name, value in kept["model"].items())
    return kept


def large_model() -> torch.nn.Linear:
    """Make a model whose weight is copied in the background, and whose bias is not."""
    torch.manual_seed(2)
    return torch.nn.Linear(LARGE // 256, 256)


@contextlib.contextmanager
def background_copies_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold the thread that copies beside training until the event is set, or the block ends."""
    go_on = threading.Event()
    copy_now = Stager._copy_now

    def wait(self: Stager, pairs: Any) -> None:
        if threading.current_thread().name.startswith("dcp-hf-staging"):
            assert go_on.wait(30)
        copy_now(self, pairs)

    monkeypatch.setattr(Stager, "_copy_now", wait)
    try:
        yield go_on
    finally:
        go_on.set()


def test_guarded_step_waits_for_the_copies_of_an_overlapped_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = large_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer = HFDualWriter(tmp_path / "step-1", staging="overlap")
    handle = writer.guard(optimizer)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with background_copies_held(monkeypatch) as go_on:
        response = dcp.async_save({"model": model.state_dict()}, storage_writer=writer)
        model(torch.ones(2, LARGE // 256)).sum().backward()
        step = threading.Thread(target=optimizer.step)
        step.start()
        step.join(0.2)
        assert step.is_alive()
        assert not response.staging_completion.done()
        assert torch.equal(model.weight, kept["weight"])
        go_on.set()
        step.join(20)
        assert not step.is_alive()
    response.upload_completion.result()
    assert not torch.equal(model.weight, kept["weight"])
    assert dcp_difference(tmp_path / "step-1", {"model": kept}) is None
    assert tensor_difference(load_hf(tmp_path / "step-1" / "hf"), kept) is None
    handle.remove()
    optimizer.step()


def test_unguarded_step_would_reach_the_file_but_for_small_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guard is for: without it the weight is copied after it has changed."""
    model = large_model()
    writer = HFDualWriter(tmp_path / "step-1", staging="overlap")
    bias = model.bias.detach().clone()
    with background_copies_held(monkeypatch) as go_on:
        response = dcp.async_save({"model": model.state_dict()}, storage_writer=writer)
        with torch.no_grad():
            model.weight.fill_(1)
            model.bias.fill_(1)
        go_on.set()
        response.upload_completion.result()
    found = load_hf(tmp_path / "step-1" / "hf")
    assert torch.equal(found["weight"], torch.ones_like(model.weight))
    assert torch.equal(found["bias"], bias)


def test_parameter_that_is_given_other_memory_is_copied_from_its_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameter = large_model().weight
    kept = parameter.detach().clone()
    writer = HFDualWriter(tmp_path / "step-1", staging="overlap")
    with background_copies_held(monkeypatch) as go_on:
        staged = writer.stage({"model": {"weight": parameter}})
        parameter.data = torch.zeros_like(kept)
        go_on.set()
        assert torch.equal(staged.result(20)["model"]["weight"], kept)


def test_memory_is_free_again_when_no_save_takes_up_an_overlapped_copy(tmp_path: Path) -> None:
    state = {"model": large_model().state_dict()}
    writer = HFDualWriter(tmp_path / "step-1", staging="overlap", timeout_s=5)
    for _ in range(3):
        copied = writer.stage(state).result(20)
        assert tensor_difference(copied["model"], state["model"]) is None
        del copied


def test_step_does_not_wait_when_nothing_is_being_copied(tmp_path: Path) -> None:
    model = large_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer = HFDualWriter(tmp_path / "step-1", staging="overlap")
    writer.guard(optimizer)
    model(torch.ones(2, LARGE // 256)).sum().backward()
    optimizer.step()
    response = dcp.async_save({"model": model.state_dict()}, storage_writer=writer)
    response.upload_completion.result()
    optimizer.step()


# What is staged


def staged_of(state_dict: dict[str, Any], mode: Any = "blocking") -> tuple[Stager, Staged]:
    stager = Stager()
    staged = stager.stage(state_dict, mode=mode, what="step", deadline=soon())
    if staged.copies is not None:
        staged.copies.copying.result(20)
    return stager, staged


@pytest.mark.parametrize("mode", ["blocking", "overlap"])
def test_staged_tensors_equal_the_originals_and_own_their_storage(mode: str) -> None:
    wide = tensor("wide", 6, 8)
    state = {
        "plain": tensor("plain", 3, 5),
        "scalar": tensor("scalar"),
        "empty": torch.zeros(0, 4),
        "strided": wide[:, ::2],
        "transposed": wide.t(),
        "expanded": tensor("row", 1, 3).expand(4, 3),
        "parameter": torch.nn.Parameter(tensor("parameter", 4)),
        "bool": tensor("bool", 7, dtype=torch.bool),
        "conjugate": tensor("wave", 5, dtype=torch.complex64).conj(),
        "list": [tensor("first", 2), {"deep": tensor("deep", 2)}],
        "tuple": Named(tensor("weight", 2), "note"),
        "large": tensor("large", LARGE + 1),
    }
    _, staged = staged_of(state, mode)
    found = dict(flat(staged.state_dict))
    for name, original in flat(state):
        copied = found[name]
        assert torch.equal(bits(copied), bits(original)), name
        assert (copied.dtype, copied.shape) == (original.dtype, original.shape), name
        assert copied.untyped_storage().nbytes() == copied.nbytes, name
        assert copied.data_ptr() % 64 == 0, name
        assert not copied.requires_grad, name
    assert type(staged.state_dict["tuple"]) is Named
    assert staged.state_dict["tuple"].note == "note"


def flat(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{name}.{i}")


def test_tied_tensors_are_staged_once() -> None:
    shared = tensor("shared", 64, 4)
    state = {
        "embed": shared,
        "head": shared.detach(),
        "other": shared.clone(),
        "flat": shared.view(-1),
    }
    _, staged = staged_of(state)
    assert staged.info.nbytes == 3 * shared.nbytes
    found = {name: value.data_ptr() for name, value in staged.state_dict.items()}
    assert found["embed"] == found["head"]
    assert len(set(found.values())) == 3
    memory = memory_of(staged.state_dict)
    assert memory["embed"] == memory["head"]
    assert len(set(memory.values())) == 3


def test_mappings_of_other_types_are_staged_as_dicts_are() -> None:
    inner = {"w": torch.ones(LARGE)}
    state = {
        "ordered": collections.OrderedDict(inner),
        "proxy": types.MappingProxyType(inner),
        "user": collections.UserDict(w=torch.ones(2)),
    }
    _, staged = staged_of(state)
    inner["w"].zero_()
    assert staged.state_dict["ordered"]["w"].sum() == LARGE
    assert staged.state_dict["proxy"]["w"].sum() == LARGE
    assert staged.info.nbytes == 4 * LARGE + 8


def test_copies_are_reused_while_the_state_dict_keeps_its_structure() -> None:
    stager = Stager()
    seen = []
    for step in range(3):
        staged = stager.stage(
            {"w": torch.full((5,), float(step)), "step": step},
            mode="blocking",
            what="step",
            deadline=soon(),
        )
        seen.append((id(staged.state_dict["w"]), staged.lease.slab.slab_id))
        assert staged.state_dict == {"w": staged.state_dict["w"], "step": step}
        assert staged.state_dict["w"].tolist() == [step] * 5
        staged.lease.release()
    assert len(set(seen)) == 1


@pytest.mark.parametrize(
    "state",
    [
        {"w": torch.ones(6)},
        {"w": torch.ones(5, dtype=torch.float64)},
        {"v": torch.ones(5)},
        {"w": torch.ones(5), "v": torch.ones(5)},
    ],
    ids=["shape", "dtype", "name", "number"],
)
def test_copies_are_made_anew_when_the_structure_changes(state: dict[str, torch.Tensor]) -> None:
    stager = Stager()
    stager.stage({"w": torch.zeros(5)}, mode="blocking", what="a", deadline=soon()).lease.release()
    staged = stager.stage(state, mode="blocking", what="b", deadline=soon())
    assert tensor_difference(staged.state_dict, state) is None


def unstageable() -> dict[str, Any]:
    return {
        "sparse": torch.ones(3).to_sparse(),
        "meta": torch.ones(3, device="meta"),
        "lock": threading.Lock(),
    }


@pytest.mark.parametrize("name", unstageable())
def test_value_that_cannot_be_copied_is_refused_and_the_next_save_works(
    tmp_path: Path, name: str
) -> None:
    state = state_of(1)
    state["model" if name != "lock" else "optim"]["odd"] = unstageable()[name]
    with pytest.raises(StagingError) as caught:
        dcp.async_save(state, storage_writer=HFDualWriter(tmp_path / "step-1")).result()
    assert caught.value.phase == "stage"
    assert name == "lock" or caught.value.fqn == "model.odd"
    dcp.async_save(state_of(1), storage_writer=HFDualWriter(tmp_path / "step-1")).result()
    assert difference(tmp_path / "step-1", 1) is None
    assert leftovers(tmp_path) == []


# One save after another


def test_save_waits_for_the_one_before_and_says_how_long(tmp_path: Path) -> None:
    with held_at("mid dcp") as go_on:
        first = dcp.async_save(state_of(1), storage_writer=HFDualWriter(tmp_path / "step-1"))
        started: list[Any] = []

        def save_next() -> None:
            writer = HFDualWriter(tmp_path / "step-2")
            started.append(dcp.async_save(state_of(2), storage_writer=writer))

        thread = threading.Thread(target=save_next)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert started == []
        go_on.set()
        thread.join(20)
        first.result()
        started[0].result()
    assert difference(tmp_path / "step-1", 1) is None
    assert difference(tmp_path / "step-2", 2) is None
    first_wait, next_wait = (
        read_manifest(tmp_path / name)["timings"]["ranks"][0]["stage wait"]
        for name in ("step-1", "step-2")
    )
    assert next_wait > max(0.2, first_wait)


def test_save_is_refused_when_the_one_before_holds_the_memory_too_long(tmp_path: Path) -> None:
    with held_at("mid dcp") as go_on:
        first = dcp.async_save(state_of(1), storage_writer=HFDualWriter(tmp_path / "step-1"))
        with pytest.raises(StagingBusyError, match="step-1"):
            dcp.async_save(
                state_of(2), storage_writer=HFDualWriter(tmp_path / "step-2", timeout_s=0.1)
            )
        go_on.set()
        first.result()
    assert difference(tmp_path / "step-1", 1) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_first_save_after_warm_up_takes_no_new_memory(tmp_path: Path) -> None:
    state = state_of(1)
    state["model"]["large"] = tensor("large", 3 * LARGE)
    nbytes = HFDualWriter(tmp_path / "step-1").warm_up(state)
    assert nbytes >= state["model"]["large"].nbytes
    slab = SLABS._slab
    for step in (1, 2):
        dcp.async_save(state, storage_writer=HFDualWriter(tmp_path / f"step-{step}")).result()
    assert SLABS._slab is slab
    assert slab is not None


def test_warm_up_writes_nothing_and_is_not_in_the_way(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "step-1", export=HFExport(assets={"config.json": b"{}"}))
    writer.warm_up(state_of(1))
    assert list(tmp_path.iterdir()) == []
    dcp.async_save(state_of(1), storage_writer=writer).result()
    assert difference(tmp_path / "step-1", 1) is None


# Resources


@dataclass(frozen=True)
class Usage:
    """What a process holds."""

    resident: int
    """Bytes of memory."""
    descriptors: int
    threads: int
    slabs: frozenset[str]
    """Ids of the memory files that it has open."""


def usage(pid: int | str = "self") -> Usage:
    gc.collect()
    with open(f"/proc/{pid}/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return Usage(
        resident,
        len(links),
        len(os.listdir(f"/proc/{pid}/task")),
        frozenset(link for link in links if "memfd:dcp-hf" in link),
    )


def save_fifty_times(rank: int, world_size: int, root: Path) -> list[Usage]:
    """Save with one writer and with new writers, in turns; usage after 10 saves and after 60."""
    mesh = init_device_mesh("cpu", (world_size,))
    kept = HFDualWriter(root / "kept", overwrite=True)
    found = []
    for step in range(60):
        state = state_of(step, mesh)
        state["model"]["large"] = tensor("large", LARGE)
        writer = kept if step % 2 else HFDualWriter(root / "new", overwrite=True)
        future = dcp.async_save(state, storage_writer=writer)
        future.result()
        if step in (9, 59):
            # Threads that have done their work may take a moment to end.
            time.sleep(0.2)
            found.append(usage())
    return found


def test_memory_descriptors_and_threads_stay_flat_over_fifty_saves(tmp_path: Path) -> None:
    for rank, (before, after) in enumerate(run_ranks(save_fifty_times, 2, tmp_path)):
        grown = after.resident - before.resident
        print(f"rank {rank}: {before} -> {after}, {grown / 2**20:.1f} MiB more")  # noqa: T201
        assert after.slabs == before.slabs
        assert len(after.slabs) == 1
        assert after.descriptors <= before.descriptors + 1
        assert after.threads <= before.threads + 1
        # The slab alone has a megabyte: a copy that is kept by each save would show.
        assert grown < 16 * 2**20


# Tensors beside those of the model, save by save.
COUNTS = (1, 300, 300, 300, 2)


@dataclass(frozen=True)
class SavedByProcess:
    """What a rank says of its saves by a checkpointer process."""

    kept: dict[str, Any]
    """What the first one was given."""
    children: list[Usage]
    """Of the checkpointer process, after each of the others."""
    descriptors: list[int]
    """Of the rank, likewise."""


def save_by_process(rank: int, world_size: int, root: Path) -> SavedByProcess:
    found = SavedByProcess(save_and_go_on(root / "changing", PROCESS), [], [])
    for step, count in enumerate(COUNTS):
        state = state_of(step)
        extra = {f"extra.{i}": torch.full((4,), float(i)) for i in range(count)}
        state["model"].update(extra)
        writer = HFDualWriter(root / f"process-{step}")
        future = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=PROCESS)
        spoil(state)
        future.result()
        process = _async_process_executor._CHECKPOINT_PROCESS
        assert process is not None
        found.children.append(usage(process._save_process.pid))
        found.descriptors.append(usage().descriptors)
    return found


@pytest.fixture(scope="module")
def by_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SavedByProcess]:
    root = tmp_path_factory.mktemp("by-process")
    return root, run_ranks(save_by_process, 1, root)[0]


def test_nothing_that_changes_after_the_call_reaches_a_checkpointer_process(
    by_process: tuple[Path, SavedByProcess],
) -> None:
    root, found = by_process
    assert_holds(root / "changing", found.kept)


def test_checkpointer_process_has_one_memory_file_whatever_the_number_of_tensors(
    by_process: tuple[Path, SavedByProcess],
) -> None:
    root, found = by_process
    assert [len(child.slabs) for child in found.children] == [1] * 5
    assert len({child.descriptors for child in found.children}) == 1
    assert len(set(found.descriptors)) == 1
    for step, count in enumerate(COUNTS):
        expected = {f"extra.{i}": torch.full((4,), float(i)) for i in range(count)}
        expected |= state_of(step)["model"]
        assert difference(root / f"process-{step}", step, exported=expected) is None
