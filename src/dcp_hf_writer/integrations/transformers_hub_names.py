"""Find what each tensor of a transformers model is loaded from, as `from_pretrained` finds it.

A directory may hold other names than `save_pretrained` writes today: without or with the prefix of
the base model, or from the time before a model was renamed. `from_pretrained` renames and converts
such tensors. The same renaming and conversion runs here, on tensors without data.

Source:
    transformers, `core_model_loading.convert_and_load_state_dict_in_model`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.integrations.unsharded_meta_model import (
    runtime_tensors,
    tied_names,
    unsharded_twin,
    unwrapped,
)
from dcp_hf_writer.mapping.load_spec import LoadSpec, Piece
from dcp_hf_writer.mapping.specs_from_function import side_of
from dcp_hf_writer.mapping.symbolic_tensors import symbolic_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from dcp_hf_writer.mapping.specs_from_function import HFSide


@dataclass(frozen=True, slots=True)
class HubNames:
    """What the tensors of a model are loaded from in one directory."""

    specs: dict[str, LoadSpec]
    """A spec for each runtime tensor that the directory holds, by FQN."""
    absent: frozenset[str]
    """FQNs of the runtime tensors that the directory does not hold."""
    failed: dict[str, str]
    """Why transformers cannot convert the stored tensors to a runtime tensor, by FQN."""
    unused: dict[str, str]
    """Key of each stored tensor that no runtime tensor is loaded from -> its runtime name."""


def hub_names(model: Any, stored: Mapping[str, torch.Tensor]) -> HubNames:
    """Find what each tensor of a model is loaded from in a directory.

    Args:
        model: A transformers model, sharded or not.
        stored: The tensors of the directory, by key; only their shapes and dtypes matter.

    Raises:
        ConfigError: If `model` is not a transformers model.
        SpecError: If the model does not have the tensors that its config says.
    """
    model = unwrapped(model)
    tensors = runtime_tensors(model)
    plan = _conversions(unsharded_twin(model, tensors), stored)
    specs = {name: LoadSpec(name, key, stored[key].shape) for name, key in plan.renamed.items()}
    failed: dict[str, str] = {}
    for first, conversion in plan.converted.items():
        try:
            made = conversion.convert(first, model=plan.twin, config=plan.twin.config)
            for name, value in made.items():
                one = value[0] if isinstance(value, list) else value
                specs.setdefault(name, _spec_of(name, side_of(name, one), stored))
        except (SpecError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            failed[first] = f"its conversion fails: {error}"
    _tie(specs, tied_names(model, tensors))
    specs = {name: spec for name, spec in specs.items() if name in tensors}
    absent = frozenset(tensors.keys() - specs.keys() - failed.keys())
    return HubNames(specs, absent, failed, plan.unused)


@dataclass(frozen=True, slots=True)
class _Conversions:
    """What `from_pretrained` does with each stored tensor."""

    twin: Any
    renamed: dict[str, str]
    """FQN of a tensor that is loaded as it is stored -> its key."""
    converted: dict[str, Any]
    """First FQN that a conversion makes -> the conversion, with its stored tensors."""
    unused: dict[str, str]
    """As in `HubNames`."""


def _conversions(twin: Any, stored: Mapping[str, torch.Tensor]) -> _Conversions:
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415
    from transformers.core_model_loading import (  # noqa: PLC0415
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    every = get_model_conversion_mapping(twin, add_legacy=True)
    renamings = [one for one in every if isinstance(one, WeightRenaming)]
    converters = [one for one in every if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    own = twin.state_dict()
    # An empty prefix would match every name.
    prefix = getattr(twin, "base_model_prefix", None) or None
    symbolic = symbolic_tensors(stored)
    found = _Conversions(twin, {}, {}, {})
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], prefix, own)
        if (
            name not in own
            or name in found.renamed
            or (pattern is None and name in found.converted)
        ):
            found.unused[key] = name
        elif pattern is None:
            found.renamed[name] = key
        else:
            if name not in found.converted:
                found.converted[name] = copy.deepcopy(of_pattern[pattern])
            found.converted[name].add_tensor(name, key, pattern, symbolic[key])
    return found


def _spec_of(name: str, side: HFSide, stored: Mapping[str, torch.Tensor]) -> LoadSpec:
    """Return the spec of a runtime tensor that a conversion makes of stored tensors.

    Here the stored tensors are the sources of the runs, and the runtime tensor is what they fill.
    """
    pieces = [
        Piece(
            run.source,
            tuple(stored[run.source].shape),
            tuple((extent, in_stored, at) for extent, at, in_stored in run.loops),
            run.start,
            run.at,
        )
        for run in side.runs
    ]
    return LoadSpec(name, (), side.shape, pieces=pieces)


def _tie(specs: dict[str, LoadSpec], tied: Mapping[str, str]) -> None:
    """Load each tied tensor that is not stored from a tensor of its group that is.

    A directory may hold any tensor of a group, not only the one that transformers keeps today.
    """
    groups: dict[str, list[str]] = {}
    for name, kept in tied.items():
        groups.setdefault(kept, [kept]).append(name)
    for group in groups.values():
        source = next((specs[name] for name in group if name in specs), None)
        if source is None:
            continue
        for name in group:
            if name not in specs:
                shape, pieces = source.global_shape, source.pieces
                specs[name] = LoadSpec(name, source.hf_keys, shape, pieces=pieces)
