"""A LoRA model saves its adapter as PEFT does, beside what it resumes from."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard

from dcp_hf_writer import HFDualReader, HFDualWriter, verify
from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.integrations.peft import (
    adapter_export,
    adapter_state,
    merged_export,
    merged_weights,
    set_adapter_state,
)
from support.ranks import run_ranks
from support.trained_runs import assert_same_adapter, tiny_llama

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# PEFT 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "task": {"task_type": "CAUSAL_LM"},
    "head": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


def lora_model(kind: str = "lora") -> PeftModel:
    given = {"r": 4, "target_modules": ["q_proj", "v_proj"], **KINDS[kind]}
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), LoraConfig(**given))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_()
    return model


def shard(model: PeftModel) -> None:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)


def train_step(model: Any) -> torch.optim.Optimizer:
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    rows = torch.randint(0, 64, (2, 8))
    model.eval()(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    return optimizer


def save_on_rank(rank: int, world_size: int, directory: Path, kind: str) -> None:
    """Save one step of a LoRA model, and let PEFT save the same model unsharded."""
    plain, model = lora_model(kind), lora_model(kind)
    train_step(plain)
    if world_size > 1:
        shard(model)
    optimizer = train_step(model)
    state = adapter_state(model, optimizer)
    full = {name: _full(tensor) for name, tensor in model.state_dict().items()}
    # Sharded arithmetic may round otherwise: compare with the values of the sharded model.
    plain.load_state_dict(full)
    if rank == 0:
        plain.save_pretrained(directory / "peft")
    export = adapter_export(model, state["model"])
    dcp.save(state, storage_writer=HFDualWriter(directory / "step-1", export=export))


def _full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_on_rank(rank: int, world_size: int, directory: Path) -> list[dict[str, torch.Tensor]]:
    """Load the step into a model with other values; return its trained tensors and moments."""
    model = lora_model()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.zero_()
    if world_size > 1:
        shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    state = adapter_state(model, optimizer)
    dcp.load(state, storage_reader=HFDualReader(directory / "step-1", source="dcp", verify=True))
    set_adapter_state(model, optimizer, state)
    trained = {n: _full(p.data) for n, p in model.named_parameters() if p.requires_grad}
    moments = [_full(one["exp_avg"]) for one in optimizer.state_dict()["state"].values()]
    return [trained, dict(zip(trained, moments, strict=True))]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapter_is_the_one_that_peft_writes(tmp_path: Path, kind: str, world_size: int) -> None:
    run_ranks(save_on_rank, world_size, tmp_path, kind)
    ours, theirs = tmp_path / "step-1" / "hf", tmp_path / "peft"
    assert_same_adapter(ours, theirs)
    assert sorted(p.name for p in ours.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert verify(tmp_path / "step-1").ok


def test_adapter_resumes_on_another_number_of_ranks_and_loads_in_peft(tmp_path: Path) -> None:
    run_ranks(save_on_rank, 2, tmp_path, "lora")
    (trained, moments), (again, _) = (
        run_ranks(load_on_rank, 1, tmp_path)[0],
        run_ranks(load_on_rank, 2, tmp_path)[1],
    )
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "step-1" / "hf", is_trainable=True)
    served = {name: p.data for name, p in loaded.named_parameters() if p.requires_grad}
    assert served.keys() == trained.keys() == again.keys()
    for name, tensor in trained.items():
        assert torch.equal(tensor, served[name]), name
        assert torch.equal(tensor, again[name]), name
        assert moments[name].abs().sum() > 0
    files = (tmp_path / "step-1").glob("*.distcp")
    assert sum(path.stat().st_size for path in files) < 200_000, "no frozen weights"


def save_merged_on_rank(rank: int, world_size: int, directory: Path) -> None:
    model = lora_model()
    if rank == 0:
        merged = copy.deepcopy(model).merge_and_unload()
        merged.save_pretrained(directory / "peft")
    export = merged_export(model)
    if world_size > 1:
        shard(model)
    before = {name: _full(tensor).clone() for name, tensor in model.state_dict().items()}
    weights = merged_weights(model)
    writer = HFDualWriter(directory / "merged", export=export, weights="once")
    dcp.save({"model": weights}, storage_writer=writer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(_full(tensor), before[name]), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_merged_model_is_the_one_that_peft_writes(tmp_path: Path, world_size: int) -> None:
    run_ranks(save_merged_on_rank, world_size, tmp_path)
    ours, theirs = tmp_path / "merged" / "hf", tmp_path / "peft"
    for path in sorted(theirs.iterdir()):
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("kind", ["dora", "head", "bias"])
def test_merging_is_refused_when_the_adapter_does_more_than_add(kind: str) -> None:
    with pytest.raises(ConfigError, match="cannot be merged without changing the model"):
        merged_weights(lora_model(kind))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adapter_export(tiny_llama(), {}), "expected a PeftModel"),
        (lambda: adapter_export(lora_model(), {}, adapter="x"), r"one of \['default'\]; found 'x'"),
        (
            lambda: adapter_export(lora_model(), {"a": torch.ones(1)}),
            "lacks tensors of the adapter",
        ),
    ],
)
def test_export_of_an_adapter_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
