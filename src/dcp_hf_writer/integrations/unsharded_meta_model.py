"""Build an unsharded twin of a live transformers model on the meta device, and compare the two.

`fully_shard` replaces the class of a model by one that transformers does not recognise.
transformers then skips its conversions to the layout of the hub, without an error. The twin has the
class that the model had before, and no data.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dcp_hf_writer.errors import ConfigError, SpecError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.mapping.model_entry import is_extra_state
from dcp_hf_writer.mapping.wrapped_names import without_wrappers

if TYPE_CHECKING:
    from collections.abc import Mapping

_MANY = 10
"""How many names an error lists."""


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside `torch.compile` and `DistributedDataParallel`.

    Raises:
        ConfigError: If there is no transformers model inside.
    """
    # Import on the call only: this package works without transformers.
    from transformers import PreTrainedModel  # noqa: PLC0415

    while not isinstance(model, PreTrainedModel):
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # noqa: SLF001 - torch.compile keeps the model there
        else:
            raise ConfigError(
                "model must be a transformers model",
                expected="a PreTrainedModel, sharded or not",
                found=type(model).__name__,
                hint="merge adapters such as LoRA first, or pass specs, which specs_from_function "
                "derives from a function",
            )
    return model


def runtime_name(name: str) -> str:
    """Return the name that `get_model_state_dict` gives to a tensor of a wrapped model."""
    return without_wrappers(name)


def runtime_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model, by their names in `get_model_state_dict`; no extra state."""
    return {
        runtime_name(name): value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not is_extra_state((name,))
    }


def unsharded_twin(model: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Build a model of the same class and config on the meta device.

    Args:
        model: A model, as `unwrapped` returns it.
        tensors: The tensors of the model, as `runtime_tensors` returns them.

    Raises:
        SpecError: If the twin has tensors with other names or shapes than the model.
    """
    unsharded = unsharded_class(model)
    twin = on_meta_device(unsharded, copy.deepcopy(model.config))
    _check_same(
        {name: tuple(one.shape) for name, one in tensors.items()},
        {name: tuple(one.shape) for name, one in twin.state_dict().items()},
        unsharded.__name__,
    )
    return twin


def unsharded_class(model: Any) -> Any:
    """Return the class that a model had before `fully_shard` replaced it."""
    return next(one for one in type(model).__mro__ if not issubclass(one, FSDPModule))


def on_meta_device(kind: Any, config: Any) -> Any:
    """Build a model without data.

    Args:
        kind: Class of the model.
        config: Config of the model; it is changed.
    """
    # The model computes nothing, so it does not need the attention kernels of a real one.
    config._attn_implementation = "eager"  # noqa: SLF001 - transformers documents this name
    # A save must not change the random numbers that training draws next.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return kind(config)


def _check_same(
    live: Mapping[str, tuple[int, ...]], twin: Mapping[str, tuple[int, ...]], name: str
) -> None:
    missing, added = sorted(twin.keys() - live.keys()), sorted(live.keys() - twin.keys())
    if missing or added:
        raise SpecError(
            f"the model has other tensors than a new {name} with its config",
            phase="plan",
            expected=f"also the tensors {listed(missing)}" if missing else None,
            found=f"also the tensors {listed(added)}" if added else None,
            hint="pass HFExport(specs=...) for layers changed by hand; merge adapters such as LoRA",
        )
    for key, shape in live.items():
        if shape != twin[key]:
            raise SpecError(
                f"a tensor has another shape than in a new {name} with the model's config",
                phase="plan",
                fqn=key,
                expected=f"shape {list(twin[key])}",
                found=f"shape {list(shape)}",
                hint="a sharded tensor must be a DTensor, or have a LoadSpec with shards; after a "
                "resize, the config must have the new size",
            )


def tied_names(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return `{dropped: kept}` names of the tensors that transformers declares as tied.

    Shared storage is no test: sharding often turns one tied parameter into two.
    """
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {}
    for target, source in declared.items():
        kept = source
        while kept in declared and declared[kept] != target:
            kept = declared[kept]
        if target in tensors and kept in tensors and target != kept:
            tied[target] = kept
    return tied


def parted_names(model: Any, tied: Mapping[str, str]) -> list[str]:
    """Return the tied names whose tensors are no longer one parameter in the live model."""
    live = {runtime_name(name): one for name, one in model.named_parameters(remove_duplicate=False)}
    return sorted(name for name, kept in tied.items() if live.get(name) is not live.get(kept))


def listed(names: list[str]) -> str:
    """Join names for a message; of many names, only the first are listed."""
    return some_of(map(repr, names), most=_MANY)
