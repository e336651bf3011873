"""Exports through a `StateDictAdapter`: one of our own, and those of torchtitan if it is there."""

from __future__ import annotations

import functools
import importlib
import json
import re
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import ConfigError, SpecError
from support.dense_specs import assemble, compiled, differences
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

HEADS, ROWS, WIDTH, EXPERTS = 2, 8, 6, 4

Tensors = dict[str, torch.Tensor]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(EXPERTS, 5, WIDTH))
        self.w2 = nn.Parameter(torch.empty(EXPERTS, WIDTH, 5))
        self.register_buffer("load", torch.zeros(EXPERTS))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(WIDTH, ROWS, bias=False)
        self.experts = Experts()
        self.norm = nn.RMSNorm(WIDTH)


class Model(nn.Module):
    """A model with the names and shapes of a trainer, and tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleDict({str(n): Layer() for n in range(2)})
        self.output = nn.Linear(WIDTH, 11, bias=False)
        self.output.weight = self.tok_embeddings.weight


class Adapter:
    """What torchtitan's adapters do: rename, permute heads, split experts, drop what is tied."""

    names = {  # noqa: RUF012 - as the adapters have it
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "layers.{}.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.experts.w1": "model.layers.{}.mlp.experts.{}.up_proj.weight",
        "layers.{}.experts.w2": "model.layers.{}.mlp.experts.{}.down_proj.weight",
        "layers.{}.norm.weight": "model.layers.{}.input_layernorm.weight",
    }

    def __init__(self, hf_assets_path: str | None = None) -> None:
        self.hf_assets_path = hf_assets_path
        self.fqn_to_index_mapping: dict[str, int] | None = None

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in state_dict.items():
            abstract = re.sub(r"(\d+)", "{}", name, count=1)
            layer = re.search(r"\d+", name)
            if abstract not in self.names:
                continue
            key = self.names[abstract]
            if "experts" in name:
                for e, one in enumerate(torch.split(value, value.shape[0] // EXPERTS, dim=0)):
                    found[key.format(layer and layer[0], e)] = one.squeeze()
            elif name.endswith("wq.weight"):
                found[key.format(layer and layer[0])] = (
                    value.view(HEADS, ROWS // HEADS // 2, 2, WIDTH)
                    .transpose(1, 2)
                    .reshape(ROWS, WIDTH)
                    .clone()
                )
            else:
                found[key.format(layer and layer[0])] = value
        return found


def model() -> Model:
    torch.manual_seed(0)
    made = Model()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def expected(adapter: Any, tensors: Tensors) -> Tensors:
    """Return what an adapter makes of whole tensors, row-major."""
    made = adapter.to_hf(dict(tensors))
    return {k: one.clone(memory_format=torch.contiguous_format) for k, one in made.items()}


left_out = pytest.mark.filterwarnings("ignore:the adapter leaves tensors of the model out")


@left_out
def test_specs_do_what_the_adapter_does() -> None:
    state = model().state_dict()
    made = HFExport.from_state_dict_adapter(Adapter(), state)
    want = expected(Adapter(), state)
    specs = made.spec_by_fqn.values()
    assert made.spec_by_fqn.keys() == state.keys()
    assert differences(assemble(specs, state), want) == []
    assert differences(compiled(specs, state), want) == []
    assert made.expect_keys == want.keys()
    assert made.groups == tuple((key,) for key in want)


def test_tied_tensor_is_an_alias_and_a_buffer_is_left_out() -> None:
    with pytest.warns(UserWarning, match="leaves tensors of the model out of the export") as said:
        specs = HFExport.from_state_dict_adapter(Adapter(), model().state_dict()).spec_by_fqn
    assert str(said[0].message).endswith(": 'layers.0.experts.load', 'layers.1.experts.load'")
    assert said[0].filename == __file__
    kept = "model.embed_tokens.weight"
    assert specs["output.weight"] == LoadSpec(
        "output.weight", "output.weight", (11, 6), alias_of=kept
    )
    assert specs["layers.0.experts.load"] == LoadSpec("layers.0.experts.load", (), (4,), pieces=())


def save_sharded(rank: int, world_size: int, directory: Path) -> None:
    sharded = model()
    for layer in sharded.layers.values():
        fully_shard(layer)
    fully_shard(sharded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export = HFExport.from_state_dict_adapter(Adapter(), sharded.state_dict())
    writer = HFDualWriter(directory, export=export)
    dcp.async_save({"model": sharded.state_dict(), "step": 1}, storage_writer=writer).result()


@pytest.mark.parametrize("world_size", [2, 3])
def test_export_of_a_sharded_model_is_what_the_adapter_makes_of_the_whole(
    tmp_path: Path, world_size: int
) -> None:
    run_ranks(save_sharded, world_size, tmp_path / "checkpoint")
    found = load_file(tmp_path / "checkpoint" / "hf" / "model.safetensors")
    assert differences(found, expected(Adapter(), model().state_dict())) == []


# ---- the files of the base model


def assets(directory: Path, *, shards: int) -> Adapter:
    """Write a base model of so many files, and return the adapter that knows of it."""
    tensors = expected(Adapter(), model().state_dict())
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    adapter = Adapter(str(directory))
    if not shards:
        return adapter
    weight_map = {key: f"model-0000{n % shards + 1}.safetensors" for n, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file({k: tensors[k] for k in tensors if weight_map[k] == name}, directory / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter.fqn_to_index_mapping = {key: n % shards + 1 for n, key in enumerate(tensors)}
    return adapter


@left_out
def test_export_is_cut_into_files_as_the_base_is(tmp_path: Path) -> None:
    adapter = assets(tmp_path / "base", shards=3)
    state = model().state_dict()
    export = HFExport.from_state_dict_adapter(adapter, state)
    assert export.like == str(tmp_path / "base")
    dcp.save({"model": state}, storage_writer=HFDualWriter(tmp_path / "saved", export=export))
    for path in (tmp_path / "base").glob("*.safetensors"):
        found = load_file(tmp_path / "saved" / "hf" / path.name)
        assert differences(found, load_file(path)) == []
    assert (tmp_path / "saved" / "hf" / "config.json").read_text() == "{}"


@left_out
def test_other_files_of_the_base_are_assets_where_it_has_no_index(tmp_path: Path) -> None:
    adapter = assets(tmp_path / "base", shards=0)
    state = model().state_dict()
    assert HFExport.from_state_dict_adapter(adapter, state).assets == (str(tmp_path / "base"),)
    assert HFExport.from_state_dict_adapter(adapter, state, assets=()).assets == ()
    adapter.hf_assets_path = str(tmp_path / "nowhere")
    assert HFExport.from_state_dict_adapter(adapter, state).assets == ()


@left_out
def test_tensors_that_only_the_index_has_are_named(tmp_path: Path) -> None:
    adapter = assets(tmp_path / "base", shards=1)
    assert adapter.fqn_to_index_mapping is not None
    adapter.fqn_to_index_mapping["model.layers.2.norm.weight"] = 1
    with pytest.warns(UserWarning, match="the export lacks .*: 'model.layers.2.norm.weight'"):
        HFExport.from_state_dict_adapter(adapter, model().state_dict())


# ---- what cannot be asked


def test_adapter_is_refused_when_it_has_no_to_hf() -> None:
    with pytest.raises(ConfigError, match="adapter must be a state-dict adapter"):
        HFExport.from_state_dict_adapter(object(), model().state_dict())


def test_state_dict_is_refused_when_it_holds_no_tensors() -> None:
    with pytest.raises(ConfigError, match="holds no tensors") as caught:
        HFExport.from_state_dict_adapter(Adapter(), {"model": model().state_dict()})
    assert caught.value.found == "'model'"


def test_adapter_is_refused_when_it_computes() -> None:
    class Scaling(Adapter):
        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {name: one * 2 for name, one in state_dict.items()}

    with pytest.raises(SpecError, match="does more than copy elements") as caught:
        HFExport.from_state_dict_adapter(Scaling(), model().state_dict())
    assert caught.value.fqn == "tok_embeddings.weight"


# ---- torchtitan itself

# torchtitan and what its models import; it cannot be a dependency, since it wants another torch.
NEEDED = ("torchtitan", "tyro", "spmd_types", "triton")


@functools.cache
def reason_to_skip() -> str | None:
    """Say what stands in the way of torchtitan's own adapters; `None` if nothing does."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


with_torchtitan = pytest.mark.skipif(bool(reason_to_skip()), reason=str(reason_to_skip()))
# What torch and torchtitan say of each other.
by_torchtitan = pytest.mark.filterwarnings("ignore")

TITAN: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama3": ("llama3", "llama3_configs", "debugmodel", {}),
    "qwen3": ("qwen3", "qwen3_configs", "debugmodel", {}),
    "qwen3 moe": ("qwen3", "qwen3_configs", "debugmodel_moe", {}),
    "deepseek_v3": (
        "deepseek_v3",
        "deepseekv3_configs",
        "debugmodel",
        {"moe_comm_backend": "standard", "num_mtp_layers": 1},
    ),
}


def titan(name: str) -> tuple[Any, Any]:
    """Return config and adapter of a debug model of torchtitan."""
    package, configs, flavor, options = TITAN[name]
    module = importlib.import_module(f"torchtitan.models.{package}")
    adapters = importlib.import_module(f"torchtitan.models.{package}.state_dict_adapter")
    config = getattr(module, configs)[flavor](attn_backend="flex", **options)
    (adapter,) = (
        value
        for key, value in vars(adapters).items()
        if key.endswith("StateDictAdapter") and value.__module__ == adapters.__name__
    )
    return config, adapter(config, None)


def two_layers(state: Tensors) -> Tensors:
    """Return small tensors in place of those of a model on the meta device, for two layers."""
    kept = {n: one for n, one in state.items() if not re.match(r"layers\.([2-9]|\d\d)", n)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 256, one.shape, dtype=torch.uint8, generator=generator)
        for name, one in kept.items()
    }


@with_torchtitan
@by_torchtitan
@pytest.mark.parametrize("name", TITAN)
def test_specs_do_what_the_adapter_of_torchtitan_does(name: str) -> None:
    config, adapter = titan(name)
    with torch.device("meta"):
        built = config.build()
    state = two_layers(built.state_dict())
    want = expected(adapter, state)
    made = HFExport.from_state_dict_adapter(adapter, state)
    assert made.expect_keys == want.keys()
    assert differences(compiled(made.spec_by_fqn.values(), state), want) == []
    left = [name for name, spec in made.spec_by_fqn.items() if not spec.hf_keys]
    # The tied head of qwen3, and what balances experts, which only deepseek_v3 has on the hub.
    assert {one.rpartition(".")[2] for one in left} <= {"weight", "expert_bias_E"}


def save_titan(rank: int, world_size: int, directory: Path) -> Tensors:
    warnings.simplefilter("ignore")
    config, adapter = titan("llama3")
    torch.manual_seed(0)
    sharded = config.build()
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.normal_()
    want = expected(adapter, sharded.state_dict())
    for layer in sharded.layers.values():
        fully_shard(layer)
    fully_shard(sharded)
    state = sharded.state_dict()
    export = HFExport.from_state_dict_adapter(adapter, state)
    writer = HFDualWriter(directory, export=export)
    dcp.async_save({"model": state}, storage_writer=writer).result()
    return want if rank == 0 else {}


@with_torchtitan
def test_export_of_a_sharded_model_of_torchtitan(tmp_path: Path) -> None:
    want, _ = run_ranks(save_titan, 2, tmp_path / "checkpoint")
    found = load_file(tmp_path / "checkpoint" / "hf" / "model.safetensors")
    assert differences(found, want) == []
