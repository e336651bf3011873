"""Tensors on a GPU: what was held at the call is what is saved."""

from __future__ import annotations

import gc
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_hf_writer import HFDualReader, HFDualWriter, iter_hf_buckets
from dcp_hf_writer import load_hf as load_hf_directory
from support.compare import tensor_difference
from support.stock_readers import load_dcp, load_hf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch.cuda.is_available() is False"
)

DEVICE = "cuda"


def mesh_of_one() -> DeviceMesh:
    """Return a mesh of the first GPU alone."""
    # A mesh warns in a process that has not chosen its GPU yet.
    torch.cuda.set_device(0)
    return init_device_mesh(DEVICE, (1,))


# About a second of work for the device, far longer than staging keeps the host.
BUSY_CYCLES = 2_000_000_000


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone, with a backend for either kind of tensor."""
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def some_state() -> dict[str, torch.Tensor]:
    return {
        "large": numbers(2048, 4096, seed=1),
        "half": numbers(1000, 333, seed=2, dtype=torch.bfloat16),
        "transposed": numbers(64, 48, seed=3).t(),
        "scalar": numbers(seed=4),
        "none": numbers(0, 5, seed=5),
        "on_host": torch.arange(7),
        "flags": numbers(9, seed=6) > 0,
    }


def on_host(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def check(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    assert tensor_difference(load_hf(directory / "hf"), expected) is None
    found = load_dcp(directory, {"model": {n: torch.zeros_like(t) for n, t in expected.items()}})
    assert tensor_difference(found["model"], expected) is None


@pytest.mark.parametrize("kind", ["thread", "process", "synchronous"])
def test_saved_tensors_are_those_at_the_call(tmp_path: Path, kind: str, group: None) -> None:
    state = some_state()
    expected = on_host(state)
    writer = HFDualWriter(tmp_path / "one")
    if kind == "synchronous":
        dcp.save({"model": state}, storage_writer=writer)
    else:
        which = getattr(dcp.state_dict_saver.AsyncCheckpointerType, kind.upper())
        future = dcp.async_save(
            {"model": state}, storage_writer=writer, async_checkpointer_type=which
        )
        for tensor in state.values():
            tensor.zero_()
        torch.cuda.synchronize()
        future.result()
    check(tmp_path / "one", expected)


def test_save_waits_for_what_is_still_being_computed(tmp_path: Path, group: None) -> None:
    weight = numbers(1024, 1024)
    factor = torch.full((), 1.0001, device=DEVICE)
    for _ in range(2000):
        weight.mul_(factor)
    future = dcp.async_save({"model": {"w": weight}}, storage_writer=HFDualWriter(tmp_path / "one"))
    expected = {"w": weight.cpu().clone()}
    weight.zero_()
    future.result()
    check(tmp_path / "one", expected)


def test_overlapped_copies_end_before_a_guarded_step(tmp_path: Path, group: None) -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048, device=DEVICE) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writer = HFDualWriter(tmp_path / "one", staging="overlap")
    writer.guard(optimizer)
    for step in range(3):
        model(numbers(4, 2048, seed=step)).sum().backward()
        expected = on_host(model.state_dict())
        path = tmp_path / f"step-{step}"
        response: Any = dcp.async_save(
            {"model": model.state_dict()}, storage_writer=writer, checkpoint_id=path
        )
        optimizer.step()
        optimizer.zero_grad()
        response.upload_completion.result()
        check(path, expected)


def contiguous_state() -> dict[str, Any]:
    return {"model": {"large": numbers(2048, 1024, seed=1), "small": numbers(100, seed=2)}}


def keep_device_busy() -> torch.cuda.Event:
    torch.cuda._sleep(BUSY_CYCLES)
    busy = torch.cuda.Event()
    busy.record()
    return busy


def step_of(weight: nn.Parameter) -> torch.optim.SGD:
    """Make an optimizer whose step takes 1 from the weight.

    The first step of a process loads kernels, for which CUDA may wait for the whole device.
    """
    weight.grad = torch.ones_like(weight)
    return torch.optim.SGD([weight], lr=1.0)


def staged_by(writer: HFDualWriter, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    staged = writer.stage(state)
    whole = staged.result() if isinstance(staged, Future) else staged
    found: dict[str, torch.Tensor] = whole["model"]
    return found


def test_overlapped_staging_returns_while_the_device_computes(tmp_path: Path) -> None:
    state = contiguous_state()
    expected = on_host(state["model"])
    writer = HFDualWriter(tmp_path / "one", staging="overlap")
    writer.warm_up(state)
    busy = keep_device_busy()
    staged = writer.stage(state)
    assert not busy.query()
    assert tensor_difference(staged.result()["model"], expected) is None
    assert busy.query()


def test_change_after_overlapped_staging_does_not_reach_the_copy(tmp_path: Path) -> None:
    state = contiguous_state()
    expected = on_host(state["model"])
    first = nn.Parameter(numbers(4))
    step_of(first).step()
    first.detach().sub_(1)
    optimizer = step_of(nn.Parameter(state["model"]["large"]))
    writer = HFDualWriter(tmp_path / "one", staging="overlap")
    writer.guard(optimizer)
    writer.warm_up(state)
    busy = keep_device_busy()
    staged = writer.stage(state)
    state["model"]["small"].sub_(1)
    optimizer.step()
    assert not busy.query()
    assert tensor_difference(staged.result()["model"], expected) is None
    changed = {name: tensor - 1 for name, tensor in expected.items()}
    assert tensor_difference(on_host(state["model"]), changed) is None


@pytest.mark.parametrize("mode", ["blocking", "overlap"])
def test_staging_takes_no_memory_of_the_device(tmp_path: Path, mode: Any) -> None:
    state = contiguous_state()
    writer = HFDualWriter(tmp_path / "one", staging=mode)
    writer.warm_up(state)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    staged = staged_by(writer, state)
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated() == before
    assert tensor_difference(staged, on_host(state["model"])) is None


def test_staged_tensors_lie_in_pinned_memory(tmp_path: Path) -> None:
    staged = staged_by(HFDualWriter(tmp_path / "one"), contiguous_state())
    assert {name: tensor.is_pinned() for name, tensor in staged.items()} == {
        "large": True,
        "small": True,
    }


def test_sharded_model_and_optimizer_are_saved(tmp_path: Path, group: None) -> None:
    model = nn.Sequential(*(nn.Linear(512, 512, device=DEVICE) for _ in range(3)))
    mesh = mesh_of_one()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        model(numbers(4, 512, seed=step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, moments = dcp.state_dict.get_state_dict(model, optimizer)
    state = {"model": weights, "optim": moments}
    expected = {
        name: value.full_tensor().cpu().clone()
        for name, value in weights.items()
        if isinstance(value, DTensor)
    }
    future = dcp.async_save(state, storage_writer=HFDualWriter(tmp_path / "one"))
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    future.result()
    check(tmp_path / "one", expected)


def test_slab_is_one_memory_file_and_reused(tmp_path: Path, group: None) -> None:
    state = {"model": some_state()}
    writer = HFDualWriter(tmp_path / "0")
    writer.warm_up(state)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for step in range(3):
        dcp.async_save(state, storage_writer=writer, checkpoint_id=tmp_path / str(step)).result()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    with open("/proc/self/maps") as maps:
        assert sum("memfd:" in line for line in maps) == 1


def test_mesh_of_the_gpu_is_saved_from_the_host_copy(tmp_path: Path, group: None) -> None:
    mesh = mesh_of_one()
    full = numbers(96, 32)
    state = {"model": {"w": distribute_tensor(full, mesh, [Shard(0)])}}
    dcp.async_save(state, storage_writer=HFDualWriter(tmp_path / "one")).result()
    check(tmp_path / "one", {"w": full.cpu()})


def sharded_layers(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(96, 96, device=DEVICE) for _ in range(3)))
    mesh = mesh_of_one()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.full_tensor().detach().cpu().clone()
        for name, value in model.state_dict().items()
        if isinstance(value, DTensor)
    }


@pytest.mark.parametrize("source", ["dcp", "hf", "load_hf"])
@pytest.mark.parametrize("weights", ["both", "once"])
def test_what_was_saved_is_loaded_onto_the_gpu(
    tmp_path: Path, group: None, source: Any, weights: Any
) -> None:
    model = sharded_layers(0)
    expected = whole(model)
    writer = HFDualWriter(tmp_path / "one", weights=weights)
    dcp.async_save({"model": model.state_dict()}, storage_writer=writer).result()
    other = sharded_layers(1)
    assert tensor_difference(whole(other), expected) is not None
    if source == "load_hf":
        load_hf_directory(other, tmp_path / "one" / "hf")
    else:
        reader = HFDualReader(tmp_path / "one", source=source, verify=True)
        dcp.load({"model": other.state_dict()}, storage_reader=reader)
    assert tensor_difference(whole(other), expected) is None


def test_cast_on_the_way_to_the_gpu_is_that_of_torch(tmp_path: Path, group: None) -> None:
    full = numbers(300, 40)
    dcp.save({"model": {"w": full}}, storage_writer=HFDualWriter(tmp_path / "one"))
    target = torch.zeros(300, 40, dtype=torch.bfloat16, device=DEVICE)
    load_hf_directory({"w": target}, tmp_path / "one")
    assert torch.equal(target, full.to(torch.bfloat16))


def test_stream_leaves_tensors_on_the_gpu(group: None) -> None:
    model = sharded_layers(0)
    expected = whole(model)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = {}
    for bucket in iter_hf_buckets(model.state_dict(), bucket_bytes=50_000):
        assert all(tensor.is_cuda for _, tensor in bucket)
        found |= {name: tensor.cpu() for name, tensor in bucket}
    assert tensor_difference(found, expected) is None
    assert torch.cuda.max_memory_allocated() - before < 4 * 50_000


def small_state() -> dict[str, torch.Tensor]:
    """Return small tensors of many dtypes and layouts, and one large one."""
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64)
    state = {f"{dtype}": numbers(33, 17, seed=7, dtype=dtype) for dtype in dtypes}
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    state |= {f"{dtype}": (numbers(50, seed=8) * 9).abs().to(dtype) for dtype in whole}
    return (
        state
        | {
            "transposed": numbers(64, 48, seed=9).t(),
            "every_second": numbers(40, 40, seed=10)[::2, ::2],
            "expanded": numbers(1, 30, seed=11).expand(20, 30),
            "negated": numbers(30, seed=12, dtype=torch.complex64).conj().imag,
            "scalar": numbers(seed=13),
            "empty": numbers(0, 5, seed=14),
            "large": numbers(1024, 1024, seed=15),
        }
        | {f"layer.{i}": numbers(64 + i, seed=20 + i) for i in range(300)}
    )


@pytest.mark.parametrize("mode", ["blocking", "overlap"])
def test_small_tensors_of_all_kinds_are_staged(tmp_path: Path, mode: Any) -> None:
    state = small_state()
    writer = HFDualWriter(tmp_path / "one", staging=mode)
    writer.warm_up({"model": state})
    for _ in range(2):
        staged = staged_by(writer, {"model": state})
        assert tensor_difference(staged, on_host(state)) is None
        del staged
        for name in ("scalar", "layer.7", "torch.int16", "every_second"):
            state[name] = state[name] + 1


def test_small_tensors_are_copied_by_few_calls(tmp_path: Path) -> None:
    layers = {f"layer.{i}": numbers(64 + i, seed=i) for i in range(300)}
    writer = HFDualWriter(tmp_path / "one")
    writer.warm_up({"model": layers})
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        staged = staged_by(writer, {"model": layers})
    copies = [event for event in profile.events() if "Memcpy" in event.name]
    assert len(copies) < len(layers) / 10
    assert tensor_difference(staged, on_host(layers)) is None
