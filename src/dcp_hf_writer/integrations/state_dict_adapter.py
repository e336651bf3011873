"""Export options for trainers that have a `StateDictAdapter`, such as torchtitan.

This module does not import torchtitan. It uses the attributes of the adapter: `to_hf(state_dict)
-> dict`, and `hf_assets_path` and `fqn_to_index_mapping`, which locate the files of the base model.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.integrations.unsharded_meta_model import listed
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.mapping.specs_from_function import derive
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.torch_seam.dtensor import local_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


def export_options(
    adapter: Any, state_dict: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the `HFExport` options for an adapter; see `HFExport.from_state_dict_adapter`.

    Raises:
        ConfigError: If `adapter` has no `to_hf`, or the state dict holds no tensors.
        SpecError: If the adapter does more than rearrange and cast tensors.
    """
    if not callable(getattr(adapter, "to_hf", None)):
        raise ConfigError(
            "adapter must be a state-dict adapter",
            expected="an object with to_hf(state_dict), such as torchtitan's StateDictAdapter",
            found=type(adapter).__name__,
        )
    tensors = {name: one for name, one in state_dict.items() if isinstance(one, torch.Tensor)}
    if not tensors:
        raise ConfigError(
            "the state dict holds no tensors",
            expected="the model's state dict, {FQN: tensor}",
            found=", ".join(map(repr, list(state_dict)[:5])) or "an empty state dict",
        )
    derived = derive(adapter.to_hf, tensors)
    specs = derived.specs | _aliases(derived.specs, tensors)
    _warn_of_gaps(specs, derived.hf.keys(), getattr(adapter, "fqn_to_index_mapping", None) or {})
    return {
        "specs": specs,
        # One group per key, in the order of the adapter: tensors that share storage may go to
        # different files.
        "groups": tuple((key,) for key in derived.hf),
        "expect_keys": frozenset(derived.hf),
        **_files(adapter, options),
        **options,
    }


def _warn_of_gaps(
    specs: Mapping[str, LoadSpec], keys: Collection[str], expected: Iterable[str]
) -> None:
    """Warn about tensors that the adapter leaves out.

    An adapter may leave out buffers on purpose. If it leaves out a weight, for example because the
    model renamed its experts, that is a mistake.
    """
    left = [name for name, spec in specs.items() if not spec.hf_keys]
    lacking = [key for key in expected if key not in keys]
    for names, why in (
        (left, "the adapter leaves tensors of the model out of the export"),
        (lacking, "the export lacks tensors that the index at hf_assets_path has"),
    ):
        if names:
            warnings.warn(f"{why}: {listed(names)}", stacklevel=4)


def _aliases(
    specs: Mapping[str, LoadSpec], tensors: Mapping[str, torch.Tensor]
) -> dict[str, LoadSpec]:
    """Return alias specs of left-out tensors that share memory with an exported tensor."""
    kept: dict[object, str] = {}
    for name, spec in specs.items():
        if len(spec.hf_keys) == 1 and (memory := _memory(tensors[name])) is not None:
            kept.setdefault(memory, spec.hf_keys[0])
    found = {}
    for name, spec in specs.items():
        key = None if spec.hf_keys else kept.get(_memory(tensors[name]))
        if key is not None:
            found[name] = LoadSpec(name, name, spec.global_shape, alias_of=key)
    return found


def _memory(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """Return a value that only tied tensors share; `None` for a tensor without memory here."""
    local = local_of(tensor)
    if local.is_meta or not local.numel():
        return None
    return local.device, local.data_ptr(), tuple(local.shape), tuple(tensor.shape)


def _files(adapter: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say where assets come from, and which file holds which key."""
    path = getattr(adapter, "hf_assets_path", None)
    if not path or "like" in options or "assets" in options:
        return {}
    path = plain_path(path, option="hf_assets_path")
    if not Path(path).is_dir():
        return {}
    # The adapter sets this mapping if the directory has an index.
    if getattr(adapter, "fqn_to_index_mapping", None):
        return {"like": path}
    return {"assets": (path,)}
