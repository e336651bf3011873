"""Which parameter an optimizer state or a copy of a parameter belongs to.

Pure. A parameter is cut in one way, and so is what a trainer keeps beside it:

- optimizer state: `[...].state.<name>.<one more key>`, as one dotted key or as nested entries, such
  as `optim.state.layers.0.w.exp_avg`;
- a copy in another entry: `<entry>.<name>` or `<entry>.<entry>.<name>`, such as `ema.<name>`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.mapping.model_entry import Path

_STATE = "state"

# Depths at which an entry may hold a copy of the model: `ema`, or `ema.model`.
_COPY_DEPTHS = (1, 2)


def owner_of_state(parts: Sequence[str], specs: Mapping[str, LoadSpec]) -> LoadSpec | None:
    """Return the spec of the parameter that a tensor is optimizer state of.

    Args:
        parts: Dotted path of the tensor, split at the dots.
        specs: Specs by name.

    Returns:
        `None` if the path does not have the form of optimizer state, or names no spec.
    """
    starts = (i + 1 for i, part in enumerate(parts) if part == _STATE)
    found = (specs.get(".".join(parts[start:-1])) for start in starts)
    return next(filter(None, found), None)


def owner_of_copy(path: Path, specs: Mapping[str, LoadSpec]) -> LoadSpec | None:
    """Return the spec of the parameter that a tensor in another entry is a copy of.

    Args:
        path: Path of the tensor within the state dict.
        specs: Specs by name.

    Returns:
        `None` if the path below its entry names no spec.
    """
    found = (specs.get(".".join(map(str, path[depth:]))) for depth in _COPY_DEPTHS)
    return next(filter(None, found), None)
