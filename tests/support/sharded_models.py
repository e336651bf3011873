"""Tiny random transformers models, and the ways in which trainers shard them.

A model is built from its seed alone, so that every rank, and the process that looks at the result,
has the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import (
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from transformers import PreTrainedModel

# Some shards are uneven: the vocabulary does not divide by 2, the intermediate size not by 4. Heads
# do, since tensor parallelism cuts whole heads.
_SIZES: Mapping[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 46,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# The grouped matrix product of the experts wants rows in multiples of 16 bytes.
_EXPERT_SIZES: Mapping[str, Any] = {
    **_SIZES,
    "intermediate_size": 44,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True, slots=True)
class ModelCase:
    """A model that the tests save."""

    model_class: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]
    dtype: torch.dtype = torch.float32


MODELS: Mapping[str, ModelCase] = {
    "llama": ModelCase(LlamaForCausalLM, lambda: LlamaConfig(**_SIZES)),
    "llama_bf16": ModelCase(LlamaForCausalLM, lambda: LlamaConfig(**_SIZES), torch.bfloat16),
    "llama_tied": ModelCase(
        LlamaForCausalLM, lambda: LlamaConfig(**_SIZES, tie_word_embeddings=True)
    ),
    "qwen2_tied": ModelCase(
        Qwen2ForCausalLM, lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True)
    ),
    "gemma3": ModelCase(Gemma3ForCausalLM, lambda: Gemma3TextConfig(**_SIZES)),
    "gpt_oss": ModelCase(
        GptOssForCausalLM,
        lambda: GptOssConfig(**_EXPERT_SIZES),
    ),
    "olmo2": ModelCase(Olmo2ForCausalLM, lambda: Olmo2Config(**_SIZES)),
}

# Name of a way to shard -> ranks that it takes.
SHARDINGS: Mapping[str, int] = {"fsdp2": 2, "fsdp4": 4, "tp2": 2, "fsdp2_tp2": 4}

_COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_ROWWISE = ("o_proj", "down_proj")


def build_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Make the model of a case with random weights, the same in every process."""
    case = MODELS[name]
    config = case.config()
    # `from_config` would do this; a model that is constructed keeps the dtype of its parameters.
    config.dtype = case.dtype
    torch.manual_seed(seed)
    model = case.model_class(config).to(case.dtype).eval()
    # Norms and biases start as ones and zeros, which would hide a mix-up.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-1, 1)
    return model


def shard(model: PreTrainedModel, sharding: str) -> PreTrainedModel:
    """Shard a model in place over all ranks of the default group; every rank calls it."""
    if sharding.startswith("tp"):
        return tensor_parallel(model, init_device_mesh("cpu", (SHARDINGS[sharding],)))
    if sharding == "fsdp2_tp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        return fsdp(tensor_parallel(model, mesh["tp"]), mesh["fsdp"])
    return fsdp(model, init_device_mesh("cpu", (SHARDINGS[sharding],)))


def fsdp(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Apply FSDP2 to each decoder layer, then to the root.

    The embedding and the head both fall to the root, so that tied ones stay one parameter.
    """
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def tensor_parallel(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Cut the linear layers of attention and MLP; embeddings, norms and experts stay plain."""
    parallelize_module(model, mesh, tensor_parallel_plan(model))
    return model


def tensor_parallel_plan(model: nn.Module) -> dict[str, ColwiseParallel | RowwiseParallel]:
    """Return the plan of `tensor_parallel`, by module name."""
    plan: dict[str, ColwiseParallel | RowwiseParallel] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            suffix = name.rpartition(".")[2]
            if suffix in _COLWISE:
                plan[name] = ColwiseParallel()
            elif suffix in _ROWWISE:
                plan[name] = RowwiseParallel()
    return plan
