"""Specs of transformers models: what they say is what `save_pretrained` does."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import ConfigError, SpecError
from dcp_hf_writer.integrations.transformers import layout_of, specs_from_transformers
from support.compare import export_difference, tensor_difference
from support.dense_specs import assemble, compiled, differences
from support.hf_models import MODELS, build, build_loaded
from support.hub_quantized import load_dequantized, write_fp8, write_mxfp4
from support.parallel_models import has_distributed_sizes
from support.rank_process import Raised
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


# Small enough that each model fills several files.
MAX_SHARD_NBYTES = 20_000


def saved(directory: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a model directory."""
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def export(model: Any, directory: Path, **options: Any) -> Path:
    """Save a model with its own export and return the directory of the HuggingFace half."""
    made = HFExport.from_transformers(model, **options)
    dcp.save({"model": model.state_dict()}, storage_writer=HFDualWriter(directory, export=made))
    return directory / "hf"


@pytest.mark.parametrize("kind", ["built", "loaded"])
@pytest.mark.parametrize("name", MODELS)
def test_specs_do_what_save_pretrained_does(tmp_path: Path, name: str, kind: str) -> None:
    model = build(name) if kind == "built" else build_loaded(name, tmp_path / "source")
    model.save_pretrained(tmp_path / "reference", max_shard_size=MAX_SHARD_NBYTES)
    expected, tensors = saved(tmp_path / "reference"), model.state_dict()
    specs = specs_from_transformers(model)
    assert list(specs) == list(tensors)
    assert differences(assemble(specs.values(), tensors), expected) == []
    assert differences(compiled(specs.values(), tensors), expected) == []
    found = export(model, tmp_path / "export", max_shard_size=MAX_SHARD_NBYTES)
    assert export_difference(found, tmp_path / "reference") is None
    for name_of_config in ("config.json", "generation_config.json"):
        reference = tmp_path / "reference" / name_of_config
        if reference.exists():
            assert (found / name_of_config).read_bytes() == reference.read_bytes()
    assert {path.name for path in found.iterdir()} == {
        path.name for path in (tmp_path / "reference").iterdir()
    }


def test_model_from_runtime_names_gets_those_of_the_hub(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    loaded = type(model).from_pretrained(tmp_path)
    assert specs_from_transformers(loaded) == specs_from_transformers(model)


@pytest.mark.parametrize(("write", "name"), [(write_fp8, "deepseek_v3"), (write_mxfp4, "gpt_oss")])
def test_dequantised_model_gets_the_names_of_one_that_never_was(
    tmp_path: Path, write: Any, name: str
) -> None:
    write(tmp_path)
    model = load_dequantized(tmp_path)
    plain = type(model)(model.config).to(torch.bfloat16)
    assert plain.config.model_type == name
    assert specs_from_transformers(model) == specs_from_transformers(plain)
    with pytest.warns(UserWarning, match="the base is quantised in model.layers.0"):
        specs_from_transformers(model, base=tmp_path)


def test_prefixes_of_the_checkpoint_are_kept_beside_quantisation(tmp_path: Path) -> None:
    from transformers.core_model_loading import WeightConverter
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    model = build("gemma3_vision")
    model.save_pretrained(tmp_path)
    # As the hub has it, and a model that is built from its config does not.
    tensors = {
        key.replace("vision_tower.", "vision_tower.vision_model."): one
        for key, one in saved(tmp_path).items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path)
    layout = layout_of(loaded, base=tmp_path, orientation="model")
    assert layout.keys == tensors.keys()
    loaded._weight_conversions.append(WeightConverter("a.b", "a.b", [Fp8Dequantize(None)]))
    assert layout_of(loaded, base=tmp_path, orientation="model").keys == tensors.keys()


# ---- sharded and wrapped models

WAYS: dict[str, dict[str, int]] = {
    "fsdp": {"fsdp_size": 4},
    "tp": {"tp_size": 4},
    "fsdp x tp": {"fsdp_size": 2, "tp_size": 2},
    "fsdp x ep": {"fsdp_size": 4, "ep_size": 2},
}
DISTRIBUTED = ("llama_tied", "qwen3_moe", "gpt_oss", "deepseek_v3")


def distributed_layouts(rank: int, world_size: int, source: Path) -> dict[Any, Any]:
    """Return the layout of models that transformers itself shards, by name and way."""
    from transformers.distributed import DistributedConfig

    found: dict[Any, Any] = {}
    for name in DISTRIBUTED:
        for way, sizes in WAYS.items():
            if way == "fsdp x ep" and name == "llama_tied":
                continue
            try:
                model = type(build(name)).from_pretrained(
                    source / name, distributed_config=DistributedConfig(**sizes)
                )
                found[name, way] = layout_of(model, base=None, orientation="model")
            except BaseException as error:  # noqa: BLE001 one failure hides no other
                found[name, way] = Raised.of(error)
    return found


@pytest.mark.skipif(
    not has_distributed_sizes(),
    reason="transformers distributes models by sizes from 5.21 on, and where accelerate is",
)
def test_layout_is_that_of_the_unsharded_model_when_transformers_shards_it(tmp_path: Path) -> None:
    for name in DISTRIBUTED:
        build(name).save_pretrained(tmp_path / name)
    expected = {
        name: layout_of(
            type(build(name)).from_pretrained(tmp_path / name), base=None, orientation="model"
        )
        for name in DISTRIBUTED
    }
    for found in run_ranks(distributed_layouts, 4, tmp_path):
        assert len(found) == 15
        for (name, way), layout in found.items():
            if isinstance(layout, Raised):
                layout.reraise()
            assert layout == expected[name], (name, way)


def fsdp_layouts(rank: int, world_size: int) -> dict[str, Any]:
    """Return the layouts of all models, with the inner model wrapped by itself."""
    found: dict[str, Any] = {}
    for name in MODELS:
        model = build(name)
        inner = getattr(model.model, "language_model", model.model)
        for layer in inner.layers:
            fully_shard(layer)
        fully_shard(model.model)
        fully_shard(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layout = layout_of(model, base=None, orientation="model")
        found[name] = (layout, [str(one.message) for one in caught])
    return found


def test_layout_is_that_of_the_unsharded_model_under_fsdp() -> None:
    expected = {name: layout_of(build(name), base=None, orientation="model") for name in MODELS}
    for found in run_ranks(fsdp_layouts, 2):
        for name, (layout, caught) in found.items():
            assert layout == expected[name], name
            # The head falls to the root, the embedding to the inner model.
            is_tied = any(spec.alias_of for spec in layout.specs.values())
            assert [text[:16] for text in caught] == ["'lm_head.weight'"] * is_tied


# What torch says of itself when it is asked to compile.
by_compile = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)


def wrapped_checkpointed(model: PreTrainedModel) -> Any:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    return model


def wrapped_compiled_layers(model: PreTrainedModel) -> Any:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer)
    return model


def wrapped_compiled(model: PreTrainedModel) -> Any:
    return torch.compile(model)


@by_compile
@pytest.mark.parametrize("wrap", [wrapped_checkpointed, wrapped_compiled_layers, wrapped_compiled])
def test_names_are_those_of_get_model_state_dict_when_modules_are_wrapped(wrap: Any) -> None:
    expected = layout_of(build("qwen3_moe"), base=None, orientation="model")
    model = wrap(build("qwen3_moe"))
    layout = layout_of(model, base=None, orientation="model")
    assert layout == expected
    assert layout.specs.keys() == get_model_state_dict(model).keys()


@by_compile
def test_export_strips_names_of_wrappers(tmp_path: Path) -> None:
    model = wrapped_compiled(build("llama"))
    writer = HFDualWriter(tmp_path / "checkpoint", export=HFExport.from_transformers(model))
    dcp.save({"model": model.state_dict()}, storage_writer=writer)
    build("llama").save_pretrained(tmp_path / "bare")
    assert export_difference(tmp_path / "checkpoint" / "hf", tmp_path / "bare") is None


def test_asking_changes_neither_the_model_nor_what_is_drawn_next() -> None:
    model = build("mixtral")
    before, seed = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    config = model.config.to_dict()
    specs_from_transformers(model)
    assert tensor_difference(model.state_dict(), before) is None
    assert torch.equal(torch.get_rng_state(), seed)
    assert model.config.to_dict() == config


# ---- what cannot be asked


def test_model_is_refused_when_it_is_not_of_transformers() -> None:
    with pytest.raises(ConfigError, match="model must be a transformers model") as caught:
        specs_from_transformers(torch.nn.Linear(2, 2))
    assert caught.value.found == "Linear"


def test_model_is_refused_when_it_has_other_tensors_than_its_config_says() -> None:
    model = build("llama")
    model.value_head = torch.nn.Linear(32, 1, bias=False)
    with pytest.raises(SpecError, match="other tensors than a new LlamaForCausalLM") as caught:
        specs_from_transformers(model)
    assert "value_head.weight" in caught.value.found


def test_model_is_refused_when_a_plain_tensor_is_a_part() -> None:
    model = build("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:2])
    with pytest.raises(SpecError, match="another shape than in a new Qwen3MoeFor") as caught:
        specs_from_transformers(model)
    assert caught.value.fqn == "model.layers.0.mlp.experts.down_proj"
    assert caught.value.expected == "shape [4, 32, 16]"


@pytest.mark.parametrize("options", [{"orientation": "hub"}, {"orientation": "base"}])
def test_orientation_is_refused_when_it_cannot_be_followed(options: Any) -> None:
    with pytest.raises(ConfigError, match="orientation"):
        specs_from_transformers(build("llama"), **options)


# ---- options of the export


def test_export_knows_what_save_pretrained_writes() -> None:
    model = build("deepseek_v3")
    made = HFExport.from_transformers(model)
    assert made.total_parameters == model.num_parameters()
    assert made.expect_keys is not None
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in made.expect_keys
    assert made.groups is not None
    assert max(map(len, made.groups)) == 4
    assert made.keep_dtype == ()


def test_tied_name_is_an_alias() -> None:
    spec = specs_from_transformers(build("gemma3_vision"))["lm_head.weight"]
    assert spec == LoadSpec(
        "lm_head.weight",
        "lm_head.weight",
        (97, 32),
        alias_of="language_model.model.embed_tokens.weight",
    )


def test_tensors_that_save_pretrained_ignores_are_left_out(tmp_path: Path) -> None:
    from transformers import MarianConfig, MarianMTModel

    model = MarianMTModel(
        MarianConfig(
            vocab_size=50,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_position_embeddings=16,
            pad_token_id=0,
            decoder_start_token_id=1,
        )
    )
    model.save_pretrained(tmp_path / "reference", max_shard_size=3_000)
    found = export(model, tmp_path / "export", max_shard_size=3_000)
    assert export_difference(found, tmp_path / "reference") is None
    name = "model.encoder.embed_positions.weight"
    assert specs_from_transformers(model)[name] == LoadSpec(name, (), (16, 16), pieces=())


def test_modules_that_transformers_keeps_in_float32_keep_their_dtype(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    found = saved(
        export(model, tmp_path / "checkpoint", dtype="bfloat16", keep_dtype=[r"kv_a_layernorm"])
    )
    kept = {key for key, one in found.items() if one.dtype == torch.float32}
    strict = {"model.layers.1.mlp.gate.e_score_correction_bias"}
    # Since transformers 5.24.
    if "gate.weight" in type(model)._keep_in_fp32_modules_strict:
        strict.add("model.layers.1.mlp.gate.weight")
    assert kept == strict | {
        "model.layers.0.self_attn.kv_a_layernorm.weight",
        "model.layers.1.self_attn.kv_a_layernorm.weight",
    }
    # Only half precision loses what these norms need.
    model = build("gpt_oss")
    assert HFExport.from_transformers(model, dtype="bfloat16").keep_dtype == ()
    assert len(HFExport.from_transformers(model, dtype="float16").keep_dtype) == 3


def test_options_override_what_is_found_and_assets_are_added(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, directory: str) -> None:
            from pathlib import Path

            (Path(directory) / "tokenizer.json").write_text("{}")

    found = export(
        build("llama"),
        tmp_path / "checkpoint",
        tokenizer=Tokenizer(),
        assets={"README.md": "made here"},
        metadata={"step": "3"},
    )
    names = {path.name for path in found.iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "model.safetensors"} <= names
