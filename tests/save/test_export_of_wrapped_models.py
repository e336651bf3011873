"""Two ranks save models whose names wrappers have changed; the export fits its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.errors import ExportError
from support.rank_process import Raised
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=19,
    )
    return LlamaForCausalLM(config)


def save_state(state: dict[str, Any], path: Path, **options: Any) -> Raised | None:
    try:
        dcp.async_save(state, storage_writer=HFDualWriter(path, **options)).result(60)
    except Exception as error:  # noqa: BLE001 - compared on the other side
        return Raised.of(error)
    return None


def save_wrapped(rank: int, world_size: int, root: Path) -> list[Raised | None]:
    model = llama()
    for i, layer in enumerate(model.model.layers):
        fully_shard(layer)
        model.model.layers[i] = torch.compile(layer, backend="eager")
    fully_shard(model)
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert any("_orig_mod" in name for name in wrapped)
    by_asset = save_state({"model": wrapped}, root / "asset", export=HFExport(assets=model))
    export = HFExport.from_transformers(model)
    by_specs = save_state({"model": wrapped}, root / "specs", export=export)
    more = {"model": {**wrapped, "v_head.w": torch.ones(2)}}
    refused = save_state(more, root / "refused", export=HFExport(assets=model))
    # The stages of a pipeline: each rank has its own layers, in a list of parts.
    layers = [n for n in llama().state_dict() if f"layers.{rank}." in n]
    ends = [n for n in llama().state_dict() if "layers." not in n]
    full = llama().state_dict()
    part = {name: full[name] for name in (*layers, *(ends if rank == 0 else []))}
    asset = HFExport(assets=llama())
    staged = save_state({"model": [part]}, root / "stages", export=asset)
    dist.barrier()
    return [by_asset, by_specs, refused, staged]


def test_names_of_wrapped_shards_are_those_of_the_model(tmp_path: Path) -> None:
    found = run_ranks(save_wrapped, 2, tmp_path)
    expected = llama().state_dict()
    for by_asset, by_specs, refused, staged in found:
        for raised in (by_asset, by_specs, staged):
            if raised is not None:
                raised.reraise()
        assert refused is not None
        if not isinstance(refused.error, ExportError):
            refused.reraise()
        assert "'module.'" in str(refused.error)
        assert "v_head" in str(refused.error)
    for name in ("asset", "specs", "stages"):
        exported = load_file(tmp_path / name / "hf" / "model.safetensors")
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[key], value) for key, value in expected.items())
    assert (tmp_path / "refused" / ".metadata").exists()
    assert not (tmp_path / "refused" / "hf").exists()
