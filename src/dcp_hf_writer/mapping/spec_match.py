"""Which spec applies to a tensor of the state dict: to parameters, optimizer state and copies.

Pure. A spec names a parameter within the model's entry. It applies to the optimizer state and the
copies of that parameter too, which are cut in the same way; `optimizer_state` finds them. A spec
may also name any tensor by its full dotted path. Such a spec takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.mapping.model_entry import NOT_WEIGHTS, model_prefix, names_in_model
from dcp_hf_writer.mapping.optimizer_state import owner_of_copy, owner_of_state

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    names = model_names(paths, key=key)
    found = {}
    for fqn, path in paths.items():
        match = _match(".".join(map(str, path)), path, names.get(fqn), specs)
        if match is not None:
            found[fqn] = match
    return found


def model_names(paths: Mapping[str, Path], *, key: str | None) -> dict[str, str]:
    """Map the FQN of each tensor of the model to its name within the model.

    Empty if every entry is one that never holds a model, such as `optim`.

    Raises:
        ModelKeyError: If it is not clear which entry holds the model.
    """
    if key is None and all(path[0] in NOT_WEIGHTS for path in paths.values()):
        return {}
    return names_in_model(paths, model_prefix(paths, key=key))


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
