"""The unsharded twin of a live transformers model, on the meta device, and what the two must share.

After `fully_shard` the class of a model is no longer one of transformers, and transformers would
then overlook, silently, that its layout differs from the hub's. The twin is of the class that the
model was made as, and has no data.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dcp_hf_writer.errors import ConfigError, SpecError
from dcp_hf_writer.excerpts import some_of

if TYPE_CHECKING:
    from collections.abc import Mapping

# What wrappers of single modules put into names; `get_model_state_dict` takes it out too.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")

_MANY = 10
"""How many names an error lists."""


def unwrapped(model: Any) -> Any:
    """Return the transformers model within `torch.compile` and `DistributedDataParallel`.

    Raises:
        ConfigError: If there is none.
    """
    # Late: this package works without it.
    from transformers import PreTrainedModel  # noqa: PLC0415

    while not isinstance(model, PreTrainedModel):
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # noqa: SLF001 - what torch.compile keeps the model as
        else:
            raise ConfigError(
                "the layout can be asked of a transformers model only",
                expected="a PreTrainedModel, sharded or not",
                found=type(model).__name__,
                hint="merge adapters first, or give specs: specs_from_function derives them from a "
                "function",
            )
    return model


def runtime_name(name: str) -> str:
    """Return the name that a tensor has without the wrappers around single modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def runtime_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's state dict, by the names of `get_model_state_dict`."""
    return {
        runtime_name(name): value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def unsharded_twin(model: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Build a model of the same class and config on the meta device.

    Args:
        model: As `unwrapped` returns it.
        tensors: Its `runtime_tensors`.

    Raises:
        SpecError: If the twin has other tensors than the model.
    """
    unsharded: Any = next(one for one in type(model).__mro__ if not issubclass(one, FSDPModule))
    config = copy.deepcopy(model.config)
    # The twin computes nothing, so it needs none of the kernels that the model may use.
    config._attn_implementation = "eager"  # noqa: SLF001 - the name that transformers documents
    # A save must not change what the training draws next.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = unsharded(config)
    _check_same(
        {name: tuple(one.shape) for name, one in tensors.items()},
        {name: tuple(one.shape) for name, one in twin.state_dict().items()},
        unsharded.__name__,
    )
    return twin


def _check_same(
    live: Mapping[str, tuple[int, ...]], twin: Mapping[str, tuple[int, ...]], name: str
) -> None:
    missing, added = sorted(twin.keys() - live.keys()), sorted(live.keys() - twin.keys())
    if missing or added:
        raise SpecError(
            f"the model has other tensors than a new {name} of its config",
            phase="plan",
            expected=f"also {listed(missing)}" if missing else None,
            found=f"also {listed(added)}" if added else None,
            hint="give HFExport(specs=...) for what was changed by hand, or merge adapters first",
        )
    for key, shape in live.items():
        if shape != twin[key]:
            raise SpecError(
                f"a tensor has another shape than in a new {name} of the model's config",
                phase="plan",
                fqn=key,
                expected=f"shape {list(twin[key])}",
                found=f"shape {list(shape)}",
                hint="a tensor that is sharded must be a DTensor, or have a LoadSpec with shards; "
                "the config must say what was resized",
            )


def tied_names(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return `{dropped: kept}` names of tied tensors, by what transformers holds to be tied.

    Storage says nothing here: what was one parameter is often two once a model is sharded.
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
    """Return names for an error, not all of them if there are many."""
    return some_of(map(repr, names), most=_MANY)
