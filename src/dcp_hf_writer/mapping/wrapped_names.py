"""Remove what wrappers put before the names of a model's tensors.

Pure. Some wrappers put a part of their own into a name: `torch.compile` adds `_orig_mod`,
activation checkpointing adds `_checkpoint_wrapped_module`, FSDP1 adds `_fsdp_wrapped_module`. No
module of a model has such a name, so these parts are always removed. Other wrappers hold the model
as an attribute with an ordinary name, such as `module`. Only the names that the model should have
can show that this is a prefix.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

_PARTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

# PEFT; TRL's value head; SentenceTransformer; DistributedDataParallel and DeepSpeed.
WRAPPERS = {
    re.compile(r"base_model\.model\."): "copy.deepcopy(model).merge_and_unload().state_dict()",
    re.compile(r"pretrained_model\."): "model.pretrained_model.state_dict()",
    re.compile(r"(\d+)\.auto_model\."): "model[{0}].auto_model.state_dict()",
    re.compile(r"module\."): "model.module.state_dict()",
}
"""The call that saves the model without a known wrapper, by the prefix of that wrapper."""

_PREFIX = re.compile(f"(?:{'|'.join(pattern.pattern for pattern in WRAPPERS)})+")


def without_wrappers(name: str) -> str:
    """Remove the parts of a name that only wrappers of modules add."""
    if not any(part in name for part in _PARTS):
        return name
    return ".".join(part for part in name.split(".") if part not in _PARTS)


def unwrapped_names(names: Mapping[str, str], wanted: Collection[str]) -> dict[str, str]:
    """Remove what wrappers add to the names of a model's tensors.

    The names stay as they are if they would collide.

    Args:
        names: Name of each tensor within the model's entry, by FQN.
        wanted: Names that specs and ties declare. A declared name is never changed. If all names
            begin with the prefix of a known wrapper, and declared names fit only without it, it is
            removed.

    Returns:
        The names by FQN, in the same order.
    """
    found = {fqn: name if name in wanted else without_wrappers(name) for fqn, name in names.items()}
    if len(set(found.values())) < len(found):
        return dict(names)
    prefix = _declared_prefix(found.values(), wanted)
    return {fqn: name.removeprefix(prefix) for fqn, name in found.items()}


def _declared_prefix(names: Collection[str], wanted: Collection[str]) -> str:
    if not wanted or not names or any(name in wanted for name in names):
        return ""
    match = _PREFIX.match(next(iter(names)))
    prefix = "" if match is None else match[0]
    is_uniform = all(name.startswith(prefix) for name in names)
    is_declared = any(name.removeprefix(prefix) in wanted for name in names)
    return prefix if is_uniform and is_declared else ""


def shared_prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes that all names have, from none to the longest; each ends with a dot."""
    every = list(names)
    if not every:
        return [""]
    first, last = min(every).split(".")[:-1], max(every).split(".")[:-1]
    found = [""]
    for one, other in zip(first, last, strict=False):
        if one != other:
            break
        found.append(f"{found[-1]}{one}.")
    return found
