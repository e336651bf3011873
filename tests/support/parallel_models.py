"""Ways in which four ranks hold the models of `hf_models`: by FSDP2, and as transformers does.

The weights are the same, whether a model is made from its config or loaded from a checkpoint.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from support.hf_models import build

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

WORLD_SIZE = 4

# Sizes of transformers' own `DistributedConfig`. Where experts are parallel, each pair of ranks
# holds all of them, and the pairs share each expert by FSDP.
DISTRIBUTED: Mapping[str, Mapping[str, int]] = {
    "tp": {"tp_size": 4},
    "fsdp_tp": {"fsdp_size": 2, "tp_size": 2},
    "ep_fsdp": {"ep_size": 2, "fsdp_size": 4},
    "ep_fsdp_tp": {"ep_size": 2, "fsdp_size": 2, "tp_size": 2},
}
# FSDP2 by hand: of the layers and the root; also of the model between them; within two replicas.
PARALLELISMS = ("fsdp", "fsdp_inner", "hsdp", *DISTRIBUTED)

# Models in bfloat16, and whether transformers keeps a part of them in float32.
HALF: Mapping[str, bool] = {
    "llama_tied": False,
    "mixtral": False,
    "deepseek_v3": True,
    "glm4_moe": True,
    "ernie4_5_vl_moe": True,
}

WITH_EXPERTS = (
    *("gpt_oss", "qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3", "glm4_moe", "olmoe", "phimoe"),
    *("granitemoe", "llama4", "ernie4_5_vl_moe", "qwen3_vl_moe", "qwen3_vl_moe_wide"),
)

# What transformers cannot load sharded so: it cuts a tensor before it transposes it.
_LOADED_WHOLE: Mapping[str, tuple[str, ...]] = {
    "ernie4_5_vl_moe": ("fsdp_tp", "ep_fsdp", "ep_fsdp_tp"),
    "qwen3_vl_moe_wide": tuple(DISTRIBUTED),
}
# Models with experts for which transformers has no plan.
_BY_HAND = ("llama4",)


def unsharded(name: str, *, saved: Path | None = None) -> PreTrainedModel:
    """Make a model in one piece.

    Args:
        name: One of `hf_models.MODELS`.
        saved: Directory to load it from; `None` makes it from its config.
    """
    model = build(name)
    if saved is not None:
        loaded: PreTrainedModel = type(model).from_pretrained(saved)
        return loaded.eval()
    if name in HALF:
        kept = re.compile("|".join(model._keep_in_fp32_modules_strict) or "(?!)")
        # As `from_pretrained` does it: only what is stored, and not all of that.
        for key, tensor in model.state_dict(keep_vars=True).items():
            if not kept.search(key):
                tensor.data = tensor.data.bfloat16()
        model.config.dtype = torch.bfloat16
    return model


def parallel_model(name: str, parallelism: str, *, saved: Path | None) -> PreTrainedModel:
    """Make a model that is held by four ranks; every rank calls it.

    Args:
        name: One of `hf_models.MODELS`.
        parallelism: One of `PARALLELISMS`.
        saved: Directory to load it from; `None` makes it from its config.
    """
    if parallelism not in DISTRIBUTED:
        return fully_sharded(unsharded(name, saved=saved), how=parallelism)
    if not is_distributed(name, parallelism):
        return _expert_parallel(unsharded(name, saved=saved))
    _share_meshes()
    if saved is None or parallelism in _LOADED_WHOLE.get(name, ()):
        return _distributed(unsharded(name, saved=saved), **DISTRIBUTED[parallelism])
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**DISTRIBUTED[parallelism])
    model: PreTrainedModel = type(build(name)).from_pretrained(saved, distributed_config=config)
    return model


def is_applicable(name: str, parallelism: str) -> bool:
    """Whether a model can be held so: only experts can be parallel."""
    if name in _BY_HAND:
        return parallelism != "ep_fsdp_tp"
    return name in WITH_EXPERTS or not parallelism.startswith("ep_")


def is_fused(name: str, parallelism: str) -> bool:
    """Whether a rank holds two blocks of a tensor: TP cuts gate and up, which are one.

    transformers has no plan for gpt_oss, so that its experts stay whole.
    """
    return parallelism in {"tp", "fsdp_tp"} and name in WITH_EXPERTS and name != "gpt_oss"


def is_distributed(name: str, parallelism: str) -> bool:
    """Whether it is transformers that makes a model so."""
    return parallelism in DISTRIBUTED and not (parallelism == "ep_fsdp" and name in _BY_HAND)


def can_distribute() -> bool:
    """Whether transformers can do so here: it puts each rank on a GPU if there is one."""
    return has_distributed_sizes() and not torch.accelerator.is_available()


def has_distributed_sizes() -> bool:
    """Whether transformers takes the sizes of `DISTRIBUTED`.

    It cuts a vocabulary of any size since 5.21, and asks for accelerate.
    """
    import transformers

    is_new = Version(transformers.__version__) >= Version("5.21")
    return is_new and importlib.util.find_spec("accelerate") is not None


def fully_sharded(model: PreTrainedModel, how: str = "fsdp") -> PreTrainedModel:
    """Apply FSDP2 by hand."""
    mesh = _mesh("replica", "shard") if how == "hsdp" else _mesh("shard")
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    if how == "fsdp_inner":
        fully_shard(model.model, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@functools.cache
def _mesh(*names: str) -> DeviceMesh:
    """Return a mesh of all ranks; two dimensions are of two each."""
    shape = (2, 2) if len(names) > 1 else (WORLD_SIZE,)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _expert_parallel(model: PreTrainedModel) -> PreTrainedModel:
    """Do as transformers does for `ep_size=2`, whatever the sizes of the rest."""
    meshes = _mesh("efsdp", "ep")
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            for key, value in list(module.named_parameters(recurse=False)):
                cut = distribute_tensor(value.data, meshes["ep"], [Shard(0)], src_data_rank=None)
                setattr(module, key, torch.nn.Parameter(cut))
            fully_shard(module, mesh=meshes["efsdp"])
    return fully_sharded(model)


def _layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield the layers of all towers."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.endswith((".layers", ".blocks")):
            yield from module


def _distributed(model: PreTrainedModel, **sizes: int) -> PreTrainedModel:
    """Do what `from_pretrained` does before it loads to a model that has its weights."""
    from transformers.distributed import DistributedConfig

    # Models are distributed before they are tied.
    for target in model.all_tied_weights_keys:
        module, _, name = target.rpartition(".")
        setattr(model.get_submodule(module), name, _parted(model.get_parameter(target)))
    config, _, meshes = model.prepare_distribute_model(DistributedConfig(**sizes))
    made: PreTrainedModel = model.maybe_distribute_model(model, config, meshes)
    made.tie_weights()
    return made


def _parted(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


@functools.cache
def _share_meshes() -> None:
    """Let all models of this process have the same meshes.

    transformers makes new ones for each, of a dozen groups with threads of their own, which for
    many models come to thousands.
    """
    from transformers.distributed import mixin

    make = mixin.initialize_distributed_mesh
    kept: dict[str, Any] = {}

    def kept_mesh(config: Any) -> Any:
        text = config.to_json_string()
        if text not in kept:
            kept[text] = make(config)
        return kept[text]

    mixin.initialize_distributed_mesh = kept_mesh
