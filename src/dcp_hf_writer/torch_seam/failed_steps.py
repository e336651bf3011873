"""Learn at once that a step of a synchronous save has failed on some rank.

A synchronous save has no future, and torch tells a storage writer nothing when another rank failed.
The error that the caller catches keeps torch's frames alive, and with them everything that the save
holds: open files, and the directory of the save.

Mechanism: torch runs the steps of a save through a `_DistWrapper`. Each step ends with a call of
its `scatter_object` or `broadcast_object`, which returns torch's `CheckpointException` on every
rank if the step failed on one. This module replaces both, and `gather_object`, on that one object.

Looked at: torch 2.10 to 2.15. When torch changes: nothing is called here, and the save gives its
resources back when its error is freed, as `guard_save` says.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

if TYPE_CHECKING:
    from collections.abc import Callable

_CALLS = ("gather_object", "scatter_object", "broadcast_object")


def call_when_a_step_fails(ranks: _DistWrapper, call: Callable[[], None]) -> None:
    """Call `call` as soon as a step of the save that `ranks` belongs to fails.

    Args:
        ranks: The ranks of the save; torch makes one such object for each save.
        call: Called in the thread of the save, before torch raises its error. It may be called more
            than once, and must not refer to `ranks`.
    """
    # A strong reference would make a cycle, and only a garbage collection would free the object.
    itself = weakref.ref(ranks)
    for name in _CALLS:
        if hasattr(_DistWrapper, name):
            setattr(ranks, name, _watched(itself, name, call))


def _watched(
    itself: weakref.ref[_DistWrapper], name: str, call: Callable[[], None]
) -> Callable[[Any], Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        ranks = itself()
        assert ranks is not None
        try:
            result = getattr(type(ranks), name)(ranks, *args, **kwargs)
        except BaseException:
            call()
            raise
        if isinstance(result, CheckpointException):
            call()
        return result

    return watched
