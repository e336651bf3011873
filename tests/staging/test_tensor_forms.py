"""Tensors that are not plain are staged as the synchronous save writes them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_hf_writer import HFDualReader, HFDualWriter, verify
from dcp_hf_writer.errors import ExportError
from dcp_hf_writer.torch_seam.future_guard import own_error
from support.odd_tensors import Coded, Gathered, Named, quantized
from support.rank_tensors import tensor
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# torch plans to remove quantised tensors.
pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")

HOW = ("sync", "async", "overlap")


def save(state: dict[str, Any], path: Path, how: str, **options: Any) -> None:
    """Save in one of the ways that must give the same files."""
    staging = "overlap" if how == "overlap" else "blocking"
    writer = HFDualWriter(path, staging=staging, **options)
    if how == "sync":
        dcp.save(state, storage_writer=writer)
        return
    kind = AsyncCheckpointerType.PROCESS if how == "process" else AsyncCheckpointerType.THREAD
    future = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=kind)
    getattr(future, "upload_completion", future).result()


def weight() -> torch.Tensor:
    return tensor("w", 6, 4)


PLAIN: dict[str, Callable[[], torch.Tensor]] = {
    "subclass": lambda: weight().as_subclass(Named),
    "parameter": lambda: torch.nn.Parameter(weight()),
    "buffer": lambda: torch.nn.Buffer(weight()),
    "gathered": lambda: Gathered.of(weight()),
    "columns": lambda: weight().t().contiguous().t().as_subclass(Named),
    "part of a larger one": lambda: torch.stack([weight()] * 3)[1].as_subclass(Named),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", PLAIN)
def test_values_of_a_subclass_are_in_both_halves(tmp_path: Path, kind: str, how: str) -> None:
    state = {"model": {"w": PLAIN[kind]()}, "optim": {"m": PLAIN[kind]()}}
    assert HFDualWriter(tmp_path / "c").explain(state).problems == ()
    save(state, tmp_path / "c", how)
    assert torch.equal(load_file(tmp_path / "c/hf/model.safetensors")["w"], weight())
    for reader in (FileSystemReader, HFDualReader):
        found = {"model": {"w": torch.zeros(6, 4)}, "optim": {"m": torch.zeros(6, 4)}}
        dcp.load(found, storage_reader=reader(tmp_path / "c"))
        assert torch.equal(found["model"]["w"], weight())
        assert torch.equal(found["optim"]["m"], weight())
    assert verify(tmp_path / "c").ok


def test_synchronous_and_asynchronous_save_write_the_same_bytes(tmp_path: Path) -> None:
    kinds = {**PLAIN, "quantised": lambda: quantized(per_channel=False)}
    state = {
        "model": {"w": weight()},
        "optim": {"coded": Coded.of(weight()), **{name: of() for name, of in kinds.items()}},
    }
    for how in HOW:
        save(state, tmp_path / how, how)
    first, *others = ((tmp_path / how / "__0_0.distcp").read_bytes() for how in HOW)
    assert others == [first, first]


@pytest.mark.parametrize("how", HOW)
def test_tied_subclasses_are_exported_once(tmp_path: Path, how: str) -> None:
    one = weight().as_subclass(Named)
    save({"model": {"a": one, "b": one}}, tmp_path / "c", how)
    assert list(load_file(tmp_path / "c/hf/model.safetensors")) == ["a"]


@pytest.mark.parametrize("how", HOW)
def test_encoded_optimizer_state_is_stored_as_torch_stores_it(tmp_path: Path, how: str) -> None:
    whole = torch.stack([weight()] * 3)
    coded = Coded.of(whole[1])
    coded.codes = torch.stack([coded.codes] * 3)[1]  # type: ignore[attr-defined]
    save({"model": {"w": weight()}, "optim": {"m": coded}}, tmp_path / "c", how)
    assert verify(tmp_path / "c").ok
    for reader in (FileSystemReader, HFDualReader):
        with torch.serialization.safe_globals([Coded]):
            found = {"optim": {"m": Coded.of(torch.zeros(6, 4))}}
            dcp.load(found, storage_reader=reader(tmp_path / "c"))
        assert torch.equal(found["optim"]["m"].decoded(), coded.decoded())
    assert (tmp_path / "c/__0_0.distcp").stat().st_size < 10_000


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_tensor_is_stored_as_torch_stores_it(
    tmp_path: Path, how: str, *, per_channel: bool
) -> None:
    state = {"model": {"w": weight()}, "o": {"q": quantized(per_channel=per_channel)}}
    writer = HFDualWriter(tmp_path / "c")
    assert writer.explain(state).problems == ()
    save(state, tmp_path / "c", how)
    for reader in (FileSystemReader, HFDualReader):
        target = quantized(per_channel=per_channel)
        target.copy_(torch.zeros(3, 3))
        dcp.load({"o": {"q": target}}, storage_reader=reader(tmp_path / "c"))
        assert torch.equal(target.int_repr(), quantized(per_channel=per_channel).int_repr())


@pytest.mark.parametrize("how", HOW)
def test_encoded_weight_costs_the_export_and_not_the_dcp_half(tmp_path: Path, how: str) -> None:
    state = {"model": {"w": Coded.of(weight()), "b": torch.ones(3)}}
    problems = HFDualWriter(tmp_path / "c").explain(state).problems
    assert any("a weight of this kind cannot be exported" in problem for problem in problems)
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - torch wraps those of a sync save
        save(state, tmp_path / "c", how)
    error = own_error(caught.value)
    assert isinstance(error, ExportError)
    assert error.fqn == "model.w"
    assert "Coded" in str(error.found)
    found = {"model": {"b": torch.zeros(3)}}
    dcp.load(found, checkpoint_id=tmp_path / "c")
    assert torch.equal(found["model"]["b"], torch.ones(3))
    assert not (tmp_path / "c/hf").exists()


@pytest.mark.parametrize("how", HOW)
def test_sparse_tensor_is_refused_alike_and_explained(tmp_path: Path, how: str) -> None:
    state = {"model": {"w": weight()}, "o": {"s": torch.eye(3).to_sparse()}}
    (problem,) = HFDualWriter(tmp_path / "c").explain(state).problems
    assert "the save would be refused: stage: a tensor of this kind cannot be saved" in problem
    assert "'o.s'" in problem
    with pytest.raises(BaseException, match="a tensor of this kind cannot be saved"):
        save(state, tmp_path / "c", how)
    assert not (tmp_path / "c").exists()


def test_value_that_cannot_be_pickled_is_explained(tmp_path: Path) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    state = {"model": {"w": weight()}, "a": threading.Lock(), "b": (cycle,), "c": (lambda: 1,)}
    problems = HFDualWriter(tmp_path / "c").explain(state).problems
    assert ["a value cannot be pickled" in problem for problem in problems] == [True, True]
    assert "'a'" in problems[0]
    assert "'c'" in problems[1]


def test_encoded_state_that_torchs_writer_saved_is_loaded(tmp_path: Path) -> None:
    coded = Coded.of(weight())
    dcp.save({"optim": {"m": coded}}, storage_writer=FileSystemWriter(tmp_path / "c"))
    with torch.serialization.safe_globals([Coded]):
        found = {"optim": {"m": Coded.of(torch.zeros(6, 4))}}
        dcp.load(found, storage_reader=HFDualReader(tmp_path / "c"))
    assert torch.equal(found["optim"]["m"].decoded(), coded.decoded())


def test_encoded_state_changes_from_save_to_save(tmp_path: Path) -> None:
    for step in range(3):
        coded = Coded.of(weight() * (step + 1))
        save({"model": {"w": weight()}, "optim": {"m": coded}}, tmp_path / f"{step}", "async")
    with torch.serialization.safe_globals([Coded]):
        for step in range(3):
            found = {"optim": {"m": Coded.of(torch.zeros(6, 4))}}
            dcp.load(found, storage_reader=FileSystemReader(tmp_path / f"{step}"))
            assert torch.equal(
                found["optim"]["m"].decoded(), Coded.of(weight() * (step + 1)).decoded()
            )


# Sharded


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = torch.nn.Linear(4, 6)
        self.two = torch.nn.Linear(6, 4)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.two(self.one(value).relu())
        return found


def sharded_state() -> tuple[Any, dict[str, Any]]:
    """Train FSDP1 for a step; return the model and its sharded state dicts."""
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    FullyShardedDataParallel.set_state_dict_type(
        model,
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(),
        ShardedOptimStateDictConfig(),
    )
    moments = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    return model, {"model": model.state_dict(), "optim": moments["state"]}


def save_fsdp1(rank: int, world_size: int, root: Path) -> list[str]:
    model, state = sharded_state()
    kinds = [type(state["model"]["one.weight"]).__name__]
    for how in ("sync", "async", "async", "process"):
        if (root / how).exists():
            how += " again"  # noqa: PLW2901 - the second save reuses what the first one staged
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            state = {**state, "model": model.state_dict()}
        dist.barrier()
        save(state, root / how, how.partition(" ")[0])
        dist.barrier()
    FullyShardedDataParallel.set_state_dict_type(model, StateDictType.FULL_STATE_DICT)
    full = model.state_dict()
    if rank == 0:
        torch.save({name: value.clone() for name, value in full.items()}, root / "full.pt")
    return kinds


def test_sharded_state_dicts_of_fsdp1_are_saved(tmp_path: Path) -> None:
    # Rank 3 holds no shard of some tensors.
    assert run_ranks(save_fsdp1, 4, tmp_path) == [["ShardedTensor"]] * 4
    full = torch.load(tmp_path / "full.pt")
    for how, added in {"sync": 1, "async": 1, "async again": 0, "process": 0}.items():
        assert verify(tmp_path / how).ok
        exported = load_file(tmp_path / how / "hf/model.safetensors")
        assert exported.keys() == full.keys()
        for name, value in exported.items():
            assert torch.allclose(value + added, full[name])
        found = {"model": {name: torch.zeros_like(value) for name, value in full.items()}}
        found["optim"] = {"one.weight": {"exp_avg": torch.zeros(6, 4)}}
        dcp.load(found, checkpoint_id=tmp_path / how)
        assert torch.equal(found["model"]["one.weight"], exported["one.weight"])
        assert found["optim"]["one.weight"]["exp_avg"].abs().sum() > 0


def save_fsdp2(rank: int, world_size: int, root: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    model = Net()
    for layer in (model.one, model.two):
        layer.weight = torch.nn.Parameter(Gathered.of(layer.weight.data))
    fully_shard(model, mesh=mesh)
    model(torch.ones(2, 4)).sum().backward()
    local = Coded.of(tensor("m", 8, 4).chunk(world_size)[rank])
    moment = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    state = {"model": model.state_dict(), "optim": {"m": moment}}
    assert isinstance(state["model"]["one.weight"].to_local(), Gathered)
    for how in (*HOW, "process"):
        save(state, root / how, how)
        dist.barrier()
        with torch.serialization.safe_globals([Coded]):
            target = Coded.of(torch.zeros(8 // world_size, 4))
            empty = DTensor.from_local(target, mesh, [Shard(0)], run_check=False)
            other = distribute_tensor(torch.zeros(6, 4), mesh, [Shard(1)])
            dcp.load(
                {"optim": {"m": empty}, "model": {"one.weight": other}},
                storage_reader=FileSystemReader(root / how),
            )
        assert torch.equal(target.decoded(), local.decoded())
        assert torch.equal(other.full_tensor(), Net().one.weight)


def test_gathered_weights_and_encoded_state_are_saved_under_fsdp2(tmp_path: Path) -> None:
    run_ranks(save_fsdp2, 2, tmp_path)
    for how in (*HOW, "process"):
        assert verify(tmp_path / how).ok
        exported = load_file(tmp_path / how / "hf/model.safetensors")
        assert torch.equal(exported["one.weight"], Net().one.weight)
        assert torch.equal(exported["two.bias"], Net().two.bias)
