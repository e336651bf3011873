"""Export the adapter of a PEFT model, or the model with its adapter merged in.

PEFT itself decides which tensors belong to an adapter and what they are called: its own function
runs once, on tensors without data.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.integrations.state_of_training import set_state, state_of
from dcp_hf_writer.integrations.unsharded_meta_model import listed
from dcp_hf_writer.mapping.hf_export import HFExport
from dcp_hf_writer.mapping.specs_from_function import derive

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.mapping.load_spec import LoadSpec

WEIGHTS_NAME = "adapter_model.safetensors"
"""The file of an adapter; PEFT defines the name."""
CONFIG_NAME = "adapter_config.json"
"""The config of an adapter; PEFT defines the name."""

_BASE = "base_model.model."
_WRAPPED = ".base_layer."


def is_peft_model(model: Any) -> bool:
    """Whether a model is a `PeftModel`. Does not import PEFT."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapter_state(
    model: Any, optimizer: torch.optim.Optimizer | None, *, adapter: str = "default"
) -> dict[str, Any]:
    """Return what a run needs to resume: `{"model": ..., "optim": ...}` without the frozen weights.

    The entry `"model"` holds the parameters that are trained, and what else PEFT saves of the
    adapter, such as an embedding that it wraps. Build the model from the same base model before you
    load it, and set it with `set_adapter_state`. All ranks call it together.

    Args:
        model: A `PeftModel`, sharded or not.
        optimizer: Its optimizer; `None` leaves out the entry `"optim"`.
        adapter: Name of the adapter.

    Raises:
        ConfigError: If the model is no `PeftModel`, or has no such adapter.
    """
    state = state_of(model, optimizer, without_frozen=True)
    whole = state_of(model, None)["model"]
    kept = {*state["model"], *_exported(model, whole, adapter).names}
    state["model"] = {fqn: one for fqn, one in whole.items() if fqn in kept}
    return state


def set_adapter_state(
    model: Any, optimizer: torch.optim.Optimizer | None, state: Mapping[str, Any]
) -> None:
    """Set a model and its optimizer to what a load put into the result of `adapter_state`."""
    set_state(model, optimizer, state, without_frozen=True)


def adapter_export(
    model: Any, state_dict: Mapping[str, Any], *, adapter: str = "default", **options: Any
) -> HFExport:
    """Make options for an export equal to what `PeftModel.save_pretrained` writes of an adapter.

    The export holds `adapter_model.safetensors` and `adapter_config.json`. `PeftModel.
    from_pretrained(base, path)` loads it. Every rank calls this function.

    Args:
        model: A `PeftModel`, sharded or not.
        state_dict: What will be saved of the model, by FQN: the entry `"model"` of `adapter_state`,
            or the whole state dict of the model. Only names matter.
        adapter: Name of the adapter.
        **options: Options of `HFExport`, which replace what this function finds.

    Raises:
        ConfigError: If the model is no `PeftModel`, has no such adapter, or the state dict lacks
            tensors that PEFT saves.
        SpecError: If PEFT does more than rearrange the tensors of the adapter.
    """
    found = _exported(model, state_of(model, None)["model"], adapter)
    lacking = sorted(found.names - state_dict.keys())
    if lacking:
        raise ConfigError(
            "the state dict lacks tensors of the adapter",
            expected=f"the tensors that PEFT saves of the adapter {adapter!r}",
            found=f"no {listed(lacking)}",
            hint="pass the entry 'model' of adapter_state(model, optimizer)",
        )
    given: dict[str, Any] = {
        "specs": {fqn: spec for fqn, spec in found.specs.items() if fqn in state_dict},
        "expect_keys": found.keys,
        "single_file": WEIGHTS_NAME,
        "assets": ({CONFIG_NAME: _config(model, adapter)},),
        "order": "state_dict",
        "tied": {},
    }
    return HFExport(**{**given, **options})


@dataclass(frozen=True)
class _Exported:
    """What PEFT saves of an adapter."""

    specs: Mapping[str, LoadSpec]
    """A spec for each tensor of the model, by FQN."""
    names: frozenset[str]
    """FQNs of the tensors that PEFT saves."""
    keys: frozenset[str]
    """The names that PEFT gives them."""


def _exported(model: Any, state_dict: Mapping[str, Any], adapter: str) -> _Exported:
    _check(model, adapter)
    # Import on the call only: this package works without PEFT.
    from peft import get_peft_model_state_dict  # noqa: PLC0415

    tensors = {fqn: one for fqn, one in state_dict.items() if isinstance(one, torch.Tensor)}
    found = derive(
        lambda symbols: get_peft_model_state_dict(model, state_dict=symbols, adapter_name=adapter),
        tensors,
    )
    names = frozenset(fqn for fqn, spec in found.specs.items() if spec.hf_keys)
    return _Exported(found.specs, names, frozenset(found.hf))


def merged_weights(model: Any, *, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Return the state dict of the base model with a LoRA adapter merged in, as new tensors.

    The model itself does not change. Tensors that the adapter does not touch share the memory of
    the model. Sharded tensors stay sharded; all ranks call it together, because merging them needs
    collectives.

    Args:
        model: A `PeftModel` with a LoRA adapter.
        adapter: Name of the adapter.

    Raises:
        ConfigError: If the adapter does more than add a product to a weight, as DoRA does, or
            trains biases of its own.
    """
    _check(model, adapter)
    _check_only_adds(model, adapter)
    found = {}
    with torch.no_grad():
        for fqn, tensor in model.state_dict().items():
            place = fqn.removeprefix(_BASE)
            if place == fqn or _is_added(model, fqn):
                continue
            owner, _, rest = place.rpartition(_WRAPPED)
            layer: Any = model.get_base_model().get_submodule(owner) if owner else None
            if rest == "weight" and adapter in getattr(layer, "lora_A", ()):
                delta = layer.get_delta_weight(adapter).to(tensor.dtype)
                tensor = tensor + delta  # noqa: PLW2901 - the merged tensor takes its place
            found[f"{owner}.{rest}" if owner else place] = tensor.detach()
    return found


def merged_export(model: Any, tokenizer: Any = None, **options: Any) -> HFExport:
    """Make options for the export of what `merged_weights` returns.

    The export is the model that `merge_and_unload().save_pretrained` writes.

    Args:
        model: A `PeftModel`.
        tokenizer: A tokenizer or processor to save beside the weights.
        **options: As of `HFExport.from_transformers`.

    Raises:
        ConfigError: If the model is no `PeftModel` of a transformers model.
    """
    _check(model, None)
    base = model.get_base_model()
    with torch.device("meta"):
        twin = type(base)(base.config)
    twin.generation_config = base.generation_config
    twin.tie_weights()
    for name in ("_weight_conversions", "name_or_path"):
        if hasattr(base, name):
            setattr(twin, name, getattr(base, name))
    return HFExport.from_transformers(twin.to(base.dtype), tokenizer, **options)


def _check(model: Any, adapter: str | None) -> None:
    if not is_peft_model(model):
        raise ConfigError(
            "the model has no adapter", expected="a PeftModel", found=type(model).__name__
        )
    if adapter is not None and adapter not in model.peft_config:
        raise ConfigError(
            "the model has no adapter of this name",
            expected=f"one of {sorted(model.peft_config)}",
            found=repr(adapter),
        )


def _check_only_adds(model: Any, adapter: str) -> None:
    config = model.peft_config[adapter]
    problems = {
        f"PEFT type {config.peft_type.value}": config.peft_type.value != "LORA",
        "modules_to_save": bool(getattr(config, "modules_to_save", None)),
        f"bias={getattr(config, 'bias', 'none')!r}": getattr(config, "bias", "none") != "none",
        "trainable tokens": bool(getattr(config, "trainable_token_indices", None)),
        "target_parameters": bool(getattr(config, "target_parameters", None)),
    }
    for name, module in model.named_modules():
        variants: Any = getattr(module, "lora_variant", None)
        problems[f"a LoRA variant in {name}"] = adapter in (variants or ())
        problems[f"{name} is merged already"] = bool(getattr(module, "merged", False))
    found = [name for name, is_there in problems.items() if is_there]
    if found:
        raise ConfigError(
            "this adapter cannot be merged without changing the model",
            expected="LoRA that only adds to weights",
            found=", ".join(found[:3]),
            hint="save a copy of the model that PEFT has merged, with merge_and_unload()",
        )


def _is_added(model: Any, fqn: str) -> bool:
    """Whether a tensor belongs to an adapter and not to the base model."""
    return f".{model.base_model.prefix}" in fqn


def _config(model: Any, adapter: str) -> bytes:
    """Return the config as PEFT writes it beside the weights."""
    config = copy.deepcopy(model.peft_config[adapter])
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    config.inference_mode = True
    mapping = None
    if config.task_type is None:
        mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory, auto_mapping_dict=mapping)
        return (Path(directory) / CONFIG_NAME).read_bytes()
