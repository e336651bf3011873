"""Serve loads by key: `_load_state_dict_from_keys`, which builds a state dict from the metadata.

Mechanism: torch's `_EmptyStateDictLoadPlanner` takes each entry of the metadata whose FQN, or the
start of whose path, is one of its `keys`. The paths are the `planner_data` of the metadata. The
planner puts each value where its path leads.

Looked at: torch 2.10 to 2.15, `_should_include_key` and `set_element`. When torch changes: a load
by key takes other entries than the keys name, and the tests of keyed loads fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import LoadPlanner
    from typing_extensions import Self


class FlatPath(tuple[str, ...]):
    """The path of a value that lies at the top of a state dict, under its whole FQN.

    A HuggingFace directory has no nested entries, but its names have parts. torch's planner first
    iterates over a path to compare it with the keys of a load, and then indexes it to place the
    value. So iteration yields the parts of the name, and the only index leads to the whole name.
    """

    __slots__ = ()

    def __new__(cls, fqn: str) -> Self:
        """Make the path of the value that is called `fqn`."""
        return super().__new__(cls, (fqn,))

    def __iter__(self) -> Iterator[str]:
        """Yield the parts of the name."""
        return iter(self[0].split("."))


def paths_of_fqns(fqns: Iterable[str]) -> dict[str, FlatPath]:
    """Return the `planner_data` of values that all lie at the top of a state dict."""
    return {fqn: FlatPath(fqn) for fqn in fqns}


def keys_without_values(planner: LoadPlanner, metadata: Metadata) -> list[str]:
    """Return the keys of a load by key that name nothing in the checkpoint; sorted.

    torch leaves them out without a word. A load that is not by key has none.
    """
    keys: Any = getattr(planner, "keys", None)
    if not isinstance(planner, _EmptyStateDictLoadPlanner) or not isinstance(keys, (set, list)):
        return []
    paths = metadata.planner_data or {}
    known = set(metadata.state_dict_metadata)
    for fqn in metadata.state_dict_metadata:
        start = ""
        for part in paths.get(fqn, ()):
            start = f"{start}.{part}" if start else str(part)
            known.add(start)
    return sorted(str(key) for key in keys if key not in known)
