"""Directories whose names differ from those that `save_pretrained` writes today.

Hubs hold such directories: without the prefix of the base model, with the names that a model had
before it was renamed, of a model with another head, or with another tensor of a tied group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from support.hf_models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]

_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 16},
    "Bert": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 31,
        "max_position_embeddings": 16,
    },
    "T5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 31,
    },
    "Llava": {
        "text_config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 97,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "projection_dim": 32,
        },
        "image_token_index": 90,
    },
}


def make(name: str, model_class: str, *, seed: int) -> PreTrainedModel:
    """Make a model of another class than `hf_models` makes, with random weights.

    Args:
        name: A key of `hf_models.MODELS`, which gives the config, or the start of a config's name.
        model_class: Name of the class in transformers.
        seed: Decides the weights.
    """
    import transformers

    if name in MODELS:
        config = MODELS[name]().config
    else:
        config = getattr(transformers, f"{name}Config")(
            **_CONFIGS[name], bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1)
    return model


@dataclass(frozen=True, slots=True)
class HubCase:
    """One directory, and a model to load it into."""

    name: str
    """As `make` takes it."""
    saved: str
    """Class of the saved model."""
    loaded: str
    """Class of the model to load into."""
    change: Callable[[Tensors], Tensors]
    """Turns what `save_pretrained` writes into what the directory holds."""
    is_partial: bool = False
    """Whether the model has a head that the directory lacks, or the other way round."""

    def write(self, directory: Path) -> None:
        """Write the directory."""
        make(self.name, self.saved, seed=1).save_pretrained(directory)
        (file,) = directory.glob("*.safetensors")
        save_file(self.change(load_file(file)), file, {"format": "pt"})

    def target(self) -> PreTrainedModel:
        """Make the model to load into; its weights differ from the saved ones."""
        return make(self.name, self.loaded, seed=2)


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """Return what replaces each pattern in the names, one after another."""

    def change(tensors: Tensors) -> Tensors:
        found = {}
        for key, tensor in tensors.items():
            name = key
            for pattern, replacement in pairs:
                name = re.sub(pattern, replacement, name)
            found[name] = tensor
        assert len(found) == len(tensors)
        return found

    return change


def as_saved(tensors: Tensors) -> Tensors:
    """Change nothing."""
    return tensors


def _experts_turned(tensors: Tensors) -> Tensors:
    return {
        key: one.transpose(1, 2).contiguous() if ".experts." in key and one.ndim == 3 else one
        for key, one in tensors.items()
    }


def _all_of_t5(tensors: Tensors) -> Tensors:
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    return tensors | {name: tensors["shared.weight"].clone() for name in names}


_GAMMA = (r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta")

CASES: Mapping[str, HubCase] = {
    "gpt2_without_prefix": HubCase(
        "GPT2", "GPT2LMHeadModel", "GPT2LMHeadModel", renamed((r"^transformer\.", ""))
    ),
    "gpt2_only_the_head": HubCase(
        "GPT2",
        "GPT2LMHeadModel",
        "GPT2LMHeadModel",
        renamed((r"^transformer\.wte\.", "lm_head.")),
    ),
    "gpt2_base": HubCase("GPT2", "GPT2LMHeadModel", "GPT2Model", as_saved),
    "bert_gamma": HubCase("Bert", "BertForMaskedLM", "BertForMaskedLM", renamed(*_GAMMA)),
    "bert_gamma_into_base": HubCase(
        "Bert", "BertForPreTraining", "BertModel", renamed(*_GAMMA), is_partial=True
    ),
    "bert_gamma_base_into_head": HubCase(
        "Bert", "BertModel", "BertForSequenceClassification", renamed(*_GAMMA), is_partial=True
    ),
    "llama_into_base": HubCase(
        "llama", "LlamaForCausalLM", "LlamaModel", as_saved, is_partial=True
    ),
    "llama_base_into_head": HubCase(
        "llama", "LlamaModel", "LlamaForCausalLM", as_saved, is_partial=True
    ),
    "llama_tied_base_into_head": HubCase("llama_tied", "LlamaModel", "LlamaForCausalLM", as_saved),
    "t5_all_embeddings": HubCase(
        "T5", "T5ForConditionalGeneration", "T5ForConditionalGeneration", _all_of_t5
    ),
    "t5_without_shared": HubCase(
        "T5",
        "T5ForConditionalGeneration",
        "T5ForConditionalGeneration",
        renamed(("^shared", "encoder.embed_tokens")),
    ),
    "t5_into_encoder": HubCase("T5", "T5ForConditionalGeneration", "T5EncoderModel", as_saved),
    "mixtral_base_into_head": HubCase(
        "mixtral", "MixtralModel", "MixtralForCausalLM", as_saved, is_partial=True
    ),
    "mixtral_into_base": HubCase(
        "mixtral", "MixtralForCausalLM", "MixtralModel", as_saved, is_partial=True
    ),
    "llava_before_4_52": HubCase(
        "Llava",
        "LlavaForConditionalGeneration",
        "LlavaForConditionalGeneration",
        renamed(
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.(vision_tower|multi_modal_projector)", r"\1"),
        ),
    ),
    "llava_into_base": HubCase(
        "Llava",
        "LlavaForConditionalGeneration",
        "LlavaModel",
        as_saved,
        is_partial=True,
    ),
    "llava_runtime_names": HubCase(
        "Llava",
        "LlavaForConditionalGeneration",
        "LlavaForConditionalGeneration",
        renamed(
            (r"^language_model\.lm_head", "lm_head"),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^(vision_tower|multi_modal_projector)", r"model.\1"),
        ),
    ),
    "qwen2_vl_before_4_52": HubCase(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        renamed((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    ),
    "qwen2_vl_into_base": HubCase(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLModel",
        as_saved,
        is_partial=True,
    ),
    "qwen3_vl_moe_turned": HubCase(
        "qwen3_vl_moe_wide",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        _experts_turned,
    ),
}
