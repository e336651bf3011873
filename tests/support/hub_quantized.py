"""Directories as the hub has them quantised, from tiny random models, and what transformers loads.

The quantisers here are plain ones of our own: a checkpoint needs codes and scales that vary, not
the best ones.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, FineGrainedFP8Config, GptOssConfig, Mxfp4Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

BLOCK = 16
_FP8 = torch.float8_e4m3fn
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

# All that is quantised in multiples of a block, of which the half of a rank often is none.
_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "dtype": torch.bfloat16,
}


def deepseek_config() -> DeepseekV3Config:
    """Return a config of one dense and one sparse layer; sizes are multiples of a block."""
    return DeepseekV3Config(
        **_SIZES,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        moe_intermediate_size=48,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )


def gpt_oss_config() -> GptOssConfig:
    """Return a config whose experts do not divide by two."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return GptOssConfig(
        **_SIZES, num_hidden_layers=1, num_local_experts=3, head_dim=16, rope_parameters=rope
    )


def write_fp8(directory: Path) -> None:
    """Write a deepseek_v3 model as published: fp8 projections, the rest bf16."""
    tensors = _saved(DeepseekV3ForCausalLM(deepseek_config()), directory)
    for key in [one for one in tensors if "_proj" in one]:
        codes, scales = _to_fp8(tensors[key])
        tensors |= {key: codes, f"{key}_scale_inv": scales}
    block = [BLOCK, BLOCK]
    _rewrite(directory, tensors, {"quant_method": "fp8", "weight_block_size": block})


def write_mxfp4(directory: Path) -> None:
    """Write a gpt_oss model as published: mxfp4 experts, the rest bf16."""
    tensors = _saved(GptOssForCausalLM(gpt_oss_config()), directory)
    for key in [one for one in tensors if one.endswith(("gate_up_proj", "experts.down_proj"))]:
        blocks, scales = _to_mxfp4(tensors.pop(key))
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    _rewrite(directory, tensors, {"quant_method": "mxfp4"})


def dequantized_by_transformers(directory: Path) -> dict[str, torch.Tensor]:
    """Return the state dict that transformers itself loads from a quantised directory."""
    return dict(load_dequantized(directory).state_dict())


def load_dequantized(directory: Path) -> PreTrainedModel:
    """Load a quantised directory with transformers, as a model of bf16 weights."""
    # transformers wants accelerate for any fp8 model, but not to load one on the CPU.
    gate = "transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available"
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    # Said, since the default is to keep the codes where there is a GPU to compute with them.
    with mock.patch(gate, return_value=True):
        model: PreTrainedModel
        if kind == "gpt_oss":
            model = GptOssForCausalLM.from_pretrained(
                directory, quantization_config=Mxfp4Config(dequantize=True)
            )
        else:
            model = DeepseekV3ForCausalLM.from_pretrained(
                directory, quantization_config=FineGrainedFP8Config(dequantize=True)
            )
    return model


def _saved(model: PreTrainedModel, directory: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.to(torch.bfloat16).save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def _rewrite(
    directory: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]
) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": quantization}))


def _to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(_FP8).max
    codes = blocks / scales[:, None, :, None]
    return codes.view(weight.shape).to(_FP8), scales


def _to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = groups.abs().amax(-1).log2().floor() - 2
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled.abs()[..., None] - _FP4).abs().argmin(-1) + 8 * (scaled < 0)
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, (exponents + 127).to(torch.uint8)
