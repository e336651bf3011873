"""Which spec applies to a tensor of the state dict: to parameters, optimizer state and copies.

Pure. A spec names a parameter within the model's entry. It applies to the optimizer state and the
copies of that parameter too, which are cut in the same way; `optimizer_state` finds them. A spec
may also name any tensor by its full dotted path. Such a spec takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.mapping.model_entry import holds_weights, model_prefix, names_in_model
from dcp_hf_writer.mapping.optimizer_state import owner_of_copy, owner_of_state
from dcp_hf_writer.mapping.wrapped_names import unwrapped_names

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.mapping.model_entry import Path


@dataclass(frozen=True, slots=True)
class Match:
    """The spec that applies to a tensor."""

    spec: LoadSpec
    is_kept_beside: bool
    """Whether the tensor is optimizer state or a copy, not the tensor that the spec names."""


def match_specs(
    paths: Mapping[str, Path], specs: Mapping[str, LoadSpec], *, key: str | None
) -> dict[str, Match]:
    """Find the spec that applies to each tensor, by FQN; tensors without a spec are left out.

    Args:
        paths: Path of each tensor of the state dict, by FQN.
        specs: Specs by name.
        key: Entry that holds the model, as in `HFExport.key`.

    Raises:
        ModelKeyError: If it is not clear which entry holds the model.
    """
    return _matches(paths, specs, model_names(paths, key=key, wanted=specs.keys()))


def match_copies(paths: Mapping[str, Path], specs: Mapping[str, LoadSpec]) -> dict[str, Match]:
    """Find the spec of each tensor if it is not clear which entry holds the model, by FQN.

    Then every entry may hold a copy of it.

    Args:
        paths: Path of each tensor of the state dict, by FQN.
        specs: Specs by name.
    """
    return _matches(paths, specs, {})


def _matches(
    paths: Mapping[str, Path], specs: Mapping[str, LoadSpec], names: Mapping[str, str]
) -> dict[str, Match]:
    found = {}
    for fqn, path in paths.items():
        match = _match(".".join(map(str, path)), path, names.get(fqn), specs)
        if match is not None:
            found[fqn] = match
    return found


def model_names(
    paths: Mapping[str, Path], *, key: str | None, wanted: Collection[str] = ()
) -> dict[str, str]:
    """Map the FQN of each tensor of the model to its name within the model, without wrappers.

    Empty if every entry is one that never holds a model, such as `optim`.

    Args:
        paths: Path of each tensor of the state dict, by FQN.
        key: Entry that holds the model, as in `HFExport.key`.
        wanted: Names that the export declares, from `HFExport.declared_names`.

    Raises:
        ModelKeyError: If it is not clear which entry holds the model.
    """
    if key is None and not holds_weights(paths):
        return {}
    return unwrapped_names(names_in_model(paths, model_prefix(paths, key=key)), wanted)


def _match(
    dotted: str, path: Path, name: str | None, specs: Mapping[str, LoadSpec]
) -> Match | None:
    named = specs.get(dotted) or (None if name is None else specs.get(name))
    if named is not None:
        return Match(named, is_kept_beside=False)
    owner = None
    # In a flat state dict, only its name tells optimizer state from a tensor of the model.
    if name is None or len(path) == 1:
        owner = owner_of_state(dotted.split("."), specs)
    if name is None and owner is None:
        owner = owner_of_copy(path, specs)
    return None if owner is None else Match(owner, is_kept_beside=True)
