"""What `convert.py` converts: how trainers lay out a model, and how the hub does.

`to_hf` is what a script of today does to the whole tensors; the peers run it. `dcp-hf export` gets
the options that its command line would give it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dcp_hf_writer import HFExport, specs_from_function
from dcp_hf_writer.integrations.export_of_config import options_of_config
from llama import LLAMA_1B, Llama, shapes_of, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PretrainedConfig

GIB = 1 << 30
FILES = 4
"""Files of an export, so that two workers have work."""

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

# Names of torchtitan's llama3, and what the hub calls them.
_TITAN_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}
_HEAD = 64
"""Elements of an attention head."""


@dataclass(frozen=True)
class Layout:
    """A model as a trainer saves it."""

    shapes: Shapes
    """Shapes of the weights, in state-dict order."""
    config: PretrainedConfig
    """Config of the model on the hub."""
    to_hf: Callable[[Tensors], Tensors]
    """Rearranges whole tensors as the hub has them."""
    is_at_top: bool
    """Whether the weights lie at the top of the state dict, or below `model`."""
    options: Callable[[Layout], Mapping[str, Any]]
    """Returns what `HFExport` gets beside the size of a file."""

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(2 * torch.Size(shape).numel() for shape in self.shapes.values())

    def export(self) -> HFExport:
        """Return the options of an export into about `FILES` files."""
        return HFExport(max_shard_size=self.file_nbytes, **self.options(self))

    @property
    def file_nbytes(self) -> int:
        """Largest size of a file of an export."""
        return self.nbytes // FILES + (1 << 20)

    def state(self, *, adam: bool) -> dict[str, Any]:
        """Make the state dict of random weights that stock torch saves."""
        state = state_of("cpu", self.shapes, adam=adam)
        weights = state.pop("model")
        return {**weights, **state} if self.is_at_top else {"model": weights, **state}

    def weights_in(self, state: dict[str, Any]) -> Tensors:
        """Return the weights of a loaded state dict."""
        return {name: (state if self.is_at_top else state["model"])[name] for name in self.shapes}


def llama_layout(model: Llama) -> Layout:
    """Return transformers' Llama, which needs no rearranging."""
    return Layout(shapes_of(model), _llama_config(model), dict, is_at_top=False, options=_assets)


def titan_layout(model: Llama) -> Layout:
    """Return torchtitan's llama3: other names, and rows of queries and keys in another order."""
    to_titan = {hub: titan for titan, hub in _TITAN_NAMES.items()}
    shapes = {}
    for name, shape in shapes_of(model).items():
        layer, rest = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+)\.weight", name).groups()  # type: ignore[union-attr]
        shapes[f"{layer or ''}{to_titan[rest]}.weight"] = shape
    return Layout(
        shapes, _llama_config(model), titan_to_hf, is_at_top=True, options=_specs_of_titan
    )


def titan_to_hf(weights: Tensors) -> Tensors:
    """Rename, and put the halves of each rotary head one after the other."""
    found = {}
    for name, tensor in weights.items():
        layer, rest = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups()  # type: ignore[union-attr]
        if rest in {"attention.wq", "attention.wk"}:
            heads = tensor.unflatten(0, (-1, _HEAD // 2, 2))
            tensor = heads.transpose(1, 2).flatten(0, 2)  # noqa: PLW2901 - the same tensor, rearranged
        prefix = f"model.{layer}" if layer else ""
        found[f"{prefix}{_TITAN_NAMES[rest]}.weight"] = tensor
    return found


def moe_layout(**sizes: int) -> Layout:
    """Return transformers' Qwen3-MoE, which stacks the experts of a layer and fuses gate and up."""
    config = Qwen3MoeConfig(
        **{
            "vocab_size": 32_000,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 64,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "dtype": "bfloat16",
            **sizes,
        }
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    with torch.device("meta"):
        state = Qwen3MoeForCausalLM(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return Layout(shapes, config, moe_to_hf, is_at_top=False, options=_options_of_config)


def moe_to_hf(weights: Tensors) -> Tensors:
    """Give each expert tensors of its own."""
    found = {}
    for name, tensor in weights.items():
        prefix, _, part = name.rpartition(".")
        if not prefix.endswith(".experts"):
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor.unbind()):
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
            parts = zip(names, expert.chunk(len(names)), strict=True)
            found |= {f"{prefix}.{number}.{one}.weight": tensor for one, tensor in parts}
    return found


def layout_of_size(name: str, gib: float) -> Layout:
    """Return a layout by its name, with as many layers as make about `gib` GiB of weights."""
    base = replace(LLAMA_1B, vocabulary=32_000, is_tied=False)

    def make(layers: int) -> Layout:
        if name == "moe":
            return moe_layout(num_hidden_layers=layers)
        make_llama = titan_layout if name == "titan" else llama_layout
        return make_llama(replace(base, layers=layers))

    one, two = make(1).nbytes, make(2).nbytes
    return make(max(1, 1 + round((gib * GIB - one) / (two - one))))


def _llama_config(model: Llama) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_hidden_layers=model.layers,
        num_attention_heads=model.hidden // _HEAD,
        num_key_value_heads=model.kv // _HEAD,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def _assets(layout: Layout) -> dict[str, Any]:
    return {"assets": (layout.config,)}


def _specs_of_titan(layout: Layout) -> dict[str, Any]:
    meta = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in layout.shapes.items()
    }
    return {**_assets(layout), "specs": specs_from_function(layout.to_hf, meta)}


def _options_of_config(layout: Layout) -> Mapping[str, Any]:
    data = layout.config.to_json_string().encode()
    given = {"assets": {"config.json": data}, "max_shard_size": layout.file_nbytes}
    found = dict(options_of_config(data, path="config.json", options=given))
    del found["max_shard_size"]
    return found
