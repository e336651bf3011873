"""Tiny random models of transformers, by name: one for each way in which the hub's layout differs.

`build(name)` gives the same weights in every process. Heads and experts divide by four, so that the
models can be cut by tensor and expert parallelism; the vocabulary does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

_SIZES: Mapping[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# The grouped matrix product of the experts wants rows in multiples of 16 bytes.
_EXPERTS: Mapping[str, Any] = {
    **_SIZES,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_LOCAL_EXPERTS: Mapping[str, Any] = {
    **{name: value for name, value in _SIZES.items() if name != "intermediate_size"},
    "intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE: Mapping[str, Any] = {**_ROPE, "mrope_section": [1, 1, 2]}


def _model(kind: str, model_class: str = "", **values: Any) -> Callable[[], PreTrainedModel]:
    """Return what makes a model from `<kind>Config`, by default `<kind>ForCausalLM`."""

    def make() -> PreTrainedModel:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**values)
        made: PreTrainedModel = getattr(transformers, model_class or f"{kind}ForCausalLM")(config)
        return made

    return make


_QWEN_VISION: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}


def _qwen3_vl_moe(**values: Any) -> Callable[[], PreTrainedModel]:
    return _model(
        "Qwen3VLMoe",
        "Qwen3VLMoeForConditionalGeneration",
        text_config={**_EXPERTS, "rope_parameters": _MROPE, **values},
        vision_config=_QWEN_VISION,
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=False,
    )


MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": _model("Llama", **_SIZES),
    "llama_tied": _model("Llama", **{**_SIZES, "tie_word_embeddings": True}),
    "qwen3": _model("Qwen3", **_SIZES),
    "phi3": _model("Phi3", **{k: v for k, v in _SIZES.items() if k != "head_dim"}),
    "gpt_oss": _model("GptOss", **_LOCAL_EXPERTS),
    "qwen3_moe": _model("Qwen3Moe", **_EXPERTS, mlp_only_layers=[1]),
    "mixtral": _model("Mixtral", **_LOCAL_EXPERTS),
    "qwen2_moe": _model("Qwen2Moe", **_EXPERTS, shared_expert_intermediate_size=24),
    "deepseek_v3": _model(
        "DeepseekV3",
        **{
            k: v
            for k, v in _EXPERTS.items()
            if k not in {"num_experts", "head_dim", "num_key_value_heads"}
        },
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=8,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "glm4_moe": _model(
        "Glm4Moe",
        **{k: v for k, v in _EXPERTS.items() if k != "num_experts"},
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    # Of six experts, four ranks hold two, two, two and none.
    "olmoe": _model(
        "Olmoe", **{k: v for k, v in {**_EXPERTS, "num_experts": 6}.items() if k != "head_dim"}
    ),
    "phimoe": _model("Phimoe", **{k: v for k, v in _LOCAL_EXPERTS.items() if k != "head_dim"}),
    "granitemoe": _model(
        "GraniteMoe", **{k: v for k, v in _LOCAL_EXPERTS.items() if k != "head_dim"}
    ),
    "llama4": _model(
        "Llama4Text",
        "Llama4ForCausalLM",
        **_LOCAL_EXPERTS,
        intermediate_size_mlp=48,
        moe_layers=[1],
        no_rope_layers=[1, 0],
    ),
    "qwen3_vl": _model(
        "Qwen3VL",
        "Qwen3VLForConditionalGeneration",
        text_config={**_SIZES, "rope_parameters": _MROPE},
        vision_config=_QWEN_VISION,
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=False,
    ),
    "qwen2_vl": _model(
        "Qwen2VL",
        "Qwen2VLForConditionalGeneration",
        text_config={
            **{k: v for k, v in _SIZES.items() if k != "head_dim"},
            "rope_parameters": {**_ROPE, "mrope_section": [1, 1]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 4,
        },
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=False,
    ),
    "gemma3_text": _model(
        "Gemma3Text", "Gemma3ForCausalLM", **{**_SIZES, "tie_word_embeddings": True}
    ),
    "gemma3_vision": _model(
        "Gemma3",
        "Gemma3ForConditionalGeneration",
        text_config={**_SIZES, "tie_word_embeddings": True},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    ),
    "ernie4_5_vl_moe": _model(
        "Ernie4_5_VLMoe",
        "Ernie4_5_VLMoeForConditionalGeneration",
        text_config={
            **{k: v for k, v in _SIZES.items() if k != "head_dim"},
            "num_attention_heads": 4,
            "rope_parameters": _MROPE,
            "moe_intermediate_size": [16, 8],
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
        },
        image_start_token_id=90,
        image_end_token_id=91,
        image_token_id=92,
        video_start_token_id=93,
        video_end_token_id=94,
        video_token_id=95,
    ),
    "qwen3_vl_moe": _qwen3_vl_moe(moe_intermediate_size=16),
    # None of its experts is square, so that their shapes tell how they lie.
    "qwen3_vl_moe_wide": _qwen3_vl_moe(moe_intermediate_size=24),
}


def build(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Make a model from its config, with random weights, the same in every process."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    # Norms and biases start as ones and zeros, which would hide a mix-up.
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1)
    return model


def build_loaded(name: str, directory: Path) -> PreTrainedModel:
    """Make a model by loading what `build` gives, saved to a directory."""
    made = build(name)
    made.save_pretrained(directory)
    loaded: PreTrainedModel = type(made).from_pretrained(directory)
    return loaded.eval()
