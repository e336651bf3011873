"""An export fits the config beside it: prefixes are stripped, what does not fit is refused."""

from __future__ import annotations

import copy
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec, specs_from_transformers
from dcp_hf_writer.errors import ExportError
from dcp_hf_writer.said_once import SaidOnce
from dcp_hf_writer.save import planned_export

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 19,
}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2, **options))


def save(path: Path, state_dict: Mapping[str, Any], **options: Any) -> None:
    """Save in this process alone; raise the writer's own error."""
    writer = HFDualWriter(path, export=HFExport(**options))
    dcp.async_save({"model": dict(state_dict)}, storage_writer=writer, no_dist=True).result(60)


def keys_of(path: Path) -> set[str]:
    found: set[str] = set()
    for file in (path / "hf").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    return found


def prefixed(prefix: str) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    return lambda model: {prefix + name: value for name, value in model.state_dict().items()}


def compiled_model(model: nn.Module) -> Any:
    # The default backend imports modules of torch that warn.
    return torch.compile(model, backend="eager")


def compiled(model: nn.Module) -> dict[str, torch.Tensor]:
    return compiled_model(model).state_dict()


def compiled_in_layers(model: Any) -> dict[str, torch.Tensor]:
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = compiled_model(checkpoint_wrapper(layer))
    state_dict = model.state_dict()
    assert any("_orig_mod" in name for name in state_dict)
    return dict(state_dict)


class Holder(nn.Module):
    """Holds a model as an attribute, as wrappers do."""

    def __init__(self, **children: nn.Module) -> None:
        """Take the children by name."""
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def sentence_transformer(model: nn.Module) -> nn.Sequential:
    return nn.Sequential(Holder(auto_model=model), nn.Identity())


WRAPPED: dict[str, Callable[[Any], Mapping[str, torch.Tensor]]] = {
    "compiled": compiled,
    "compiled layer by layer with activation checkpointing": compiled_in_layers,
    "compiled in DDP": lambda model: Holder(module=compiled_model(model)).state_dict(),
    "DDP in compiled": lambda model: compiled_model(Holder(module=model)).state_dict(),
    "DDP": prefixed("module."),
    "PEFT": prefixed("base_model.model."),
    "value head": prefixed("pretrained_model."),
    "SentenceTransformer": lambda model: sentence_transformer(model).state_dict(),
    "Lightning": prefixed("model."),
    "several": prefixed("module._orig_mod.base_model.model._checkpoint_wrapped_module."),
}


def model_itself(model: Any) -> Any:
    return model


def config_with_class(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config


def config_without_class(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.architectures = None
    return config


def bytes_of_config(model: Any) -> Any:
    return {"config.json": config_with_class(model).to_json_string().encode()}


ASSETS = [model_itself, config_with_class, config_without_class, bytes_of_config]


@pytest.mark.parametrize("assets", ASSETS)
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_uniform_prefix_is_stripped(
    wrapper: str, assets: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = llama()
    asset, plain = assets(model), {k: v.clone() for k, v in model.state_dict().items()}
    state_dict = WRAPPED[wrapper](model)
    assert state_dict.keys() != plain.keys()
    save(tmp_path / "s", state_dict, assets=asset)
    assert keys_of(tmp_path / "s") == plain.keys()
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "s" / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in plain.items())


@pytest.mark.parametrize("wrapper", ["compiled", "DDP", "PEFT", "SentenceTransformer", "several"])
def test_uniform_prefix_is_stripped_when_specs_name_the_tensors_without_it(
    wrapper: str, tmp_path: Path
) -> None:
    model = llama()
    export = HFExport.from_transformers(model)
    writer = HFDualWriter(tmp_path / "s", export=export)
    state = {"model": dict(WRAPPED[wrapper](model))}
    assert writer.explain(state).problems == ()
    dcp.async_save(state, storage_writer=writer, no_dist=True).result(60)
    assert keys_of(tmp_path / "s") == export.expect_keys


def test_parts_of_wrappers_are_stripped_without_a_config(tmp_path: Path) -> None:
    model = llama()
    names = model.state_dict().keys()
    save(tmp_path / "s", compiled_in_layers(model))
    assert keys_of(tmp_path / "s") == names


def test_name_of_a_wrapper_stays_when_a_spec_declares_it_or_it_would_collide(
    tmp_path: Path,
) -> None:
    state = {"_orig_mod.w": torch.ones(2)}
    save(tmp_path / "1", state, specs=[LoadSpec("_orig_mod.w", ["a"], (2,))])
    assert keys_of(tmp_path / "1") == {"a"}
    both = {**state, "w": torch.zeros(2)}
    save(tmp_path / "2", both)
    assert keys_of(tmp_path / "2") == both.keys()


def with_lora(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in model.state_dict().items():
        if "q_proj" in name:
            stem = "base_model.model." + name.removesuffix("weight")
            found[stem + "base_layer.weight"] = value
            found[stem + "lora_A.default.weight"] = torch.ones(2, value.shape[1])
            found[stem + "lora_B.default.weight"] = torch.ones(value.shape[0], 2)
        else:
            found["base_model.model." + name] = value
    return found


def adapter_alone(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".default", ""): value
        for name, value in with_lora(model).items()
        if "lora_" in name
    }


def with_value_head(prefix: str) -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    return lambda model: {
        **prefixed(prefix)(model),
        "v_head.summary.weight": torch.ones(1, 16),
        "v_head.summary.bias": torch.ones(1),
    }


def with_dense(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**sentence_transformer(model).state_dict(), "2.linear.weight": torch.ones(3, 16)}


def with_other_prefixes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        ("module." if "layers" in name else "ema.") + name: value
        for name, value in model.state_dict().items()
    }


MISFITS: dict[str, tuple[Callable[[Any], Mapping[str, torch.Tensor]], tuple[str, ...]]] = {
    "LoRA": (with_lora, ("'base_model.model.'", "merge_and_unload()")),
    "LoRA alone": (adapter_alone, ("'base_model.model.'", "merge_and_unload()")),
    "value head": (with_value_head(""), ("v_head", "model.pretrained_model.state_dict()")),
    "value head with prefix": (
        with_value_head("pretrained_model."),
        ("'pretrained_model.'", "v_head", "model.pretrained_model.state_dict()"),
    ),
    "SentenceTransformer with a dense layer": (
        with_dense,
        ("'0.auto_model.'", "model[0].auto_model.state_dict()"),
    ),
    "DDP and more": (with_other_prefixes, ("'module.'", "model.module.state_dict()")),
}


# A config without a class stands for the model without a head, whatever head there is.
CLASSLESS = [name for name in MISFITS if name != "value head"]


@pytest.mark.parametrize(
    ("problem", "assets"),
    [
        *(
            (name, asset)
            for name in MISFITS
            for asset in ASSETS
            if asset is not config_without_class
        ),
        *((name, config_without_class) for name in CLASSLESS),
    ],
)
def test_prefix_is_named_with_the_call_that_avoids_it_when_it_is_not_all(
    problem: str, assets: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = llama()
    change, words = MISFITS[problem]
    state = change(model)
    with pytest.raises(ExportError) as raised:
        save(tmp_path / "s", state, assets=assets(model))
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)
    explained = HFDualWriter(tmp_path / "e", export=HFExport(assets=assets(model))).explain(
        {"model": dict(state)}
    )
    assert [words[0] in problem for problem in explained.problems] == [True]
    loaded = {"model": {name: torch.zeros_like(value) for name, value in state.items()}}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / "s"), no_dist=True)
    assert all(torch.equal(loaded["model"][name], value) for name, value in state.items())
    assert not (tmp_path / "s" / "hf").exists()


def classifier(model: Any) -> nn.Module:
    return LlamaForSequenceClassification(model.config)


def without_a_tensor(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: value for name, value in state.items() if "layers.1.mlp.up" not in name}


def of_other_shape(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), "lm_head.weight": torch.ones(20, 16)}


def of_other_width(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), "model.embed_tokens.weight": torch.ones(20, 16)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_a_tensor, ("layers.1.mlp.up_proj.weight", "LlamaForCausalLM")),
        (of_other_shape, ("lm_head.weight [20, 16]",)),
        (lambda model: classifier(model).state_dict(), ("score.weight", "lm_head.weight")),
        (lambda model: {**model.state_dict(), "extra": torch.ones(2)}, ("'extra'",)),
    ],
    ids=["missing", "shape", "other head", "added"],
)
def test_export_is_refused_when_it_is_of_another_model(
    change: Callable[[Any], Mapping[str, torch.Tensor]], words: tuple[str, ...], tmp_path: Path
) -> None:
    model = llama()
    with pytest.raises(ExportError) as raised:
        save(tmp_path / "s", change(model), assets=model)
    assert [word for word in words if word not in str(raised.value)] == [], str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [(without_a_tensor, "layers.1.mlp.up_proj.weight"), (of_other_width, "change the config")],
    ids=["missing", "shape"],
)
def test_config_without_a_class_is_compared_below_the_head(
    change: Callable[[Any], Mapping[str, torch.Tensor]], words: str, tmp_path: Path
) -> None:
    model = llama()
    with pytest.raises(ExportError) as raised:
        save(tmp_path / "s", change(model), assets=config_without_class(model))
    assert words in str(raised.value)
    assert "prefix" not in str(raised.value)


def test_config_without_a_class_may_lack_a_part_that_heads_leave_out(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    state = BertForMaskedLM(config).state_dict()
    assert not any("pooler" in name for name in state)
    save(tmp_path / "s", state, assets=config)
    assert "bert.embeddings.word_embeddings.weight" in keys_of(tmp_path / "s")


def test_misfit_is_a_warning_when_the_writer_shall_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export = HFExport(assets=llama())
    writer = HFDualWriter(tmp_path / "s", export=export, on_export_error="warn")
    dcp.save({"model": with_lora(llama())}, storage_writer=writer, no_dist=True)
    said = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert ["does not fit the config" in one for one in said] == [True]
    assert (tmp_path / "s" / ".metadata").exists()


def test_tied_tensor_may_be_there_or_not(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save(tmp_path / "1", state, assets=model)
    save(tmp_path / "2", model.state_dict(), assets=model)
    del state["lm_head.weight"]
    save(tmp_path / "3", state, assets=model)
    assert keys_of(tmp_path / "1") - {"lm_head.weight"} == keys_of(tmp_path / "2")
    assert keys_of(tmp_path / "2") == keys_of(tmp_path / "3")


def test_tie_is_refused_when_the_config_does_not_have_it(tmp_path: Path) -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ExportError, match="tie_word_embeddings"):
        save(tmp_path / "s", model.state_dict(), assets=model)


def test_layer_that_the_model_lacks_is_not_missed(tmp_path: Path) -> None:
    config = BertConfig(**_SIZES)
    model = BertModel(config, add_pooling_layer=False)
    save(tmp_path / "s", model.state_dict(), assets=model)
    assert keys_of(tmp_path / "s") == model.state_dict().keys()


def test_names_without_the_prefix_of_the_base_model_are_taken(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9, n_positions=8))
    state = {name.removeprefix("transformer."): one for name, one in model.state_dict().items()}
    save(tmp_path / "s", state, assets=model)
    _, info = GPT2LMHeadModel.from_pretrained(tmp_path / "s" / "hf", output_loading_info=True)
    assert not info["missing_keys"]


def fused() -> MixtralForCausalLM:
    config = MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=2)
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("assets", ASSETS)
@pytest.mark.parametrize("make", [llama, fused, lambda: BertForMaskedLM(BertConfig(**_SIZES))])
@pytest.mark.parametrize("with_specs", [True, False])
def test_layouts_of_the_hub_and_of_the_model_fit(
    make: Callable[[], Any], assets: Callable[[Any], Any], tmp_path: Path, *, with_specs: bool
) -> None:
    model = make()
    specs = specs_from_transformers(model) if with_specs else None
    save(tmp_path / "s", model.state_dict(), assets=assets(model), specs=specs)
    _, info = type(model).from_pretrained(tmp_path / "s" / "hf", output_loading_info=True)
    assert not info["missing_keys"]


def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES))


def weight_map(directory: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((directory / "model.safetensors.index.json").read_bytes())
    return found["weight_map"]


@pytest.mark.parametrize("assets", [model_itself, config_with_class, lambda model: model.config])
@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("with_specs", [False, True])
@pytest.mark.parametrize("make", [neox, llama])
def test_files_are_filled_as_save_pretrained_fills_them(
    make: Callable[[], Any],
    assets: Callable[[Any], Any],
    tmp_path: Path,
    *,
    is_loaded: bool,
    with_specs: bool,
) -> None:
    model = make()
    if is_loaded:
        model.save_pretrained(tmp_path / "base")
        model = type(model).from_pretrained(tmp_path / "base")
    config = copy.deepcopy(model.config)
    model.save_pretrained(tmp_path / "hub", max_shard_size=4000)
    model.config = config
    specs = specs_from_transformers(model) if with_specs else None
    save(
        tmp_path / "s",
        model.state_dict(),
        assets=assets(model),
        specs=specs,
        max_shard_size=4000,
    )
    expected = weight_map(tmp_path / "hub")
    if not with_specs and "embed_out.weight" in expected:
        expected["lm_head.weight"] = expected.pop("embed_out.weight")
    assert len(set(expected.values())) > 3
    assert weight_map(tmp_path / "s" / "hf") == expected


@pytest.mark.parametrize(
    "config",
    [b"no json", b"[]", b"{}", b'{"model_type": "none", "architectures": ["None"]}'],
    ids=["no JSON", "a list", "nothing", "unknown"],
)
def test_log_says_why_when_the_config_cannot_be_compared(
    config: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dcp_hf_writer")
    save(tmp_path / "s", {"w": torch.ones(2)}, assets={"config.json": config})
    said = [one.getMessage() for one in caplog.records]
    assert sum("is not compared with its config.json" in one for one in said) == 1


@pytest.mark.parametrize(
    ("names", "call"),
    [
        (["module.a", "module.b"], "model.module."),
        (["base_model.model.a"], "merge_and_unload()"),
        (["module.a", "b"], None),
    ],
)
def test_prefix_of_a_known_wrapper_is_a_warning_when_no_config_can_tell(
    names: list[str],
    call: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(planned_export, "SAID_ONCE", SaidOnce())
    config = {"config.json": b'{"model_type": "none"}'}
    save(tmp_path / "s", {name: torch.ones(2) for name in names}, assets=config)
    said = [one.getMessage() for one in caplog.records if "all names of the" in one.getMessage()]
    assert [call in one for one in said] == ([] if call is None else [True])
    assert keys_of(tmp_path / "s") == set(names)


def test_comparing_draws_no_random_numbers(tmp_path: Path) -> None:
    model = llama()
    torch.manual_seed(7)
    save(tmp_path / "s", model.state_dict(), assets=model)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


# What wraps the model among the assets


@pytest.mark.parametrize(
    "wrap",
    [
        compiled_model,
        lambda model: Holder(module=model),
        lambda model: Holder(base_model=Holder(model=model)),
        lambda model: Holder(pretrained_model=model),
    ],
    ids=["compiled", "DDP", "PEFT", "value head"],
)
def test_config_is_that_of_the_model_in_a_wrapper(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = llama()
    save(tmp_path / "s", model.state_dict(), assets=wrap(model))
    config = json.loads((tmp_path / "s" / "hf" / "config.json").read_bytes())
    assert config["architectures"] == ["LlamaForCausalLM"]


# Custom code

_PACKAGE = {
    "configuration_own.py": """
from transformers import PreTrainedConfig
class OwnConfig(PreTrainedConfig):
    model_type = "own"
    def __init__(self, width=4, **kw):
        super().__init__(**kw)
        self.width = width
""",
    "layers_own.py": "from torch import nn\nLayer = nn.Linear\n",
    "modeling_own.py": """
from transformers import PreTrainedModel
from .configuration_own import OwnConfig
from .layers_own import Layer
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = Layer(config.width, config.width)
        self.post_init()
""",
    "__init__.py": "",
}


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("own")
    (root / "own_package").mkdir()
    for name, text in _PACKAGE.items():
        (root / "own_package" / name).write_text(text)
    sys.path.insert(0, str(root))
    try:
        from own_package.configuration_own import OwnConfig
        from own_package.modeling_own import OwnModel
    finally:
        sys.path.remove(str(root))
    OwnConfig.register_for_auto_class()
    OwnModel.register_for_auto_class("AutoModel")
    return OwnModel(OwnConfig())


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.suffix != ".safetensors"
    }


def test_model_with_custom_code_gets_the_files_that_save_pretrained_copies(
    own_model: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(own_model)
    save(tmp_path / "s", model.state_dict(), assets=model)
    model.save_pretrained(tmp_path / "hub")
    assert files_of(tmp_path / "s" / "hf") == files_of(tmp_path / "hub")
    assert {"modeling_own.py", "configuration_own.py", "layers_own.py"} <= files_of(
        tmp_path / "hub"
    ).keys()


def test_config_with_custom_code_gets_the_files_that_it_names(
    own_model: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(own_model)
    model.save_pretrained(tmp_path / "hub")
    model.config.auto_map["AutoModel"] = "modeling_own.OwnModel"
    save(tmp_path / "s", model.state_dict(), assets=model.config)
    assert files_of(tmp_path / "s" / "hf").keys() == files_of(tmp_path / "hub").keys()


def test_prefix_of_a_model_with_custom_code_is_stripped_or_refused(
    own_model: Any, tmp_path: Path
) -> None:
    save(tmp_path / "1", prefixed("module.")(own_model), assets=own_model)
    assert keys_of(tmp_path / "1") == own_model.state_dict().keys()
    state = {**prefixed("module.")(own_model), "other": torch.ones(2)}
    with pytest.raises(ExportError, match=r"'module\.'"):
        save(tmp_path / "2", state, assets=own_model)
