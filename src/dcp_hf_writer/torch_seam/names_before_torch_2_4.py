"""The FQNs that torch before 2.4 gave to values; `mapping.flattening` has the current FQNs.

Mechanism: `traverse_state_dict_v_2_3`. torch's load planner calls it if a checkpoint lacks the
current FQNs.

Looked at: torch 2.10 to 2.15, `_traverse.py`. When torch changes: the import fails.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint._traverse import traverse_state_dict_v_2_3

from dcp_hf_writer.mapping.flattening import fqn_of


def names_before_2_4(state_dict: dict[str, Any]) -> set[str]:
    """Return the FQNs that torch before 2.4 gave to the values of a nested state dict."""
    names: set[str] = set()
    traverse_state_dict_v_2_3(state_dict, lambda path, _: names.add(fqn_of(path)))
    return names
