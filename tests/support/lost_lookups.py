"""Takes lookups in torch away, one at a time, and saves in every way that torch has."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from dcp_hf_writer.errors import UnsupportedTorchError
from dcp_hf_writer.torch_seam import caller_frames, future_guard, plan_cache
from dcp_hf_writer.torch_seam.future_guard import own_error
from support.small_states import leftovers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dcp_hf_writer import HFDualWriter

# Each lookup, as the one function that makes it.
LOOKUPS: dict[str, tuple[Any, str]] = {
    "planner": (caller_frames, "_locals_of_torch"),
    "future": (future_guard, "current_future"),
    "caches": (plan_cache, "torch_cache"),
}
KINDS = ("sync", "thread", "process")


@contextlib.contextmanager
def without(lookup: str | None) -> Iterator[None]:
    """Let a lookup find nothing for a while; nothing is taken away for `None`."""
    if lookup is None:
        yield
        return
    module, name = LOOKUPS[lookup]
    kept = getattr(module, name)
    setattr(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(module, name, kept)


class LostInTheChild:
    """Takes a lookup away in the process that it is sent to, for the save that it is sent with."""

    def __init__(self, lookup: str) -> None:
        self.lookup = lookup

    def __reduce__(self) -> tuple[Any, ...]:
        return _set, (self.lookup,)


_kept: dict[str, Any] = {}


def _set(lookup: str | None) -> None:
    for name, found in _kept.items():
        setattr(*LOOKUPS[name], found)
    _kept.clear()
    if lookup is not None:
        module, name = LOOKUPS[lookup]
        _kept[lookup] = getattr(module, name)
        setattr(module, name, lambda *_, **__: None)


class Restored:
    """Gives lookups back in the process that it is sent to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _set, (None,)


class CarryingPlanner(DefaultSavePlanner):
    """torch's planner, with something to carry to a checkpointer process."""

    def __init__(self, carried: object = None, **options: Any) -> None:
        super().__init__(**options)
        self.carried = carried


def save(kind: str, state: dict[str, Any], writer: HFDualWriter, **options: Any) -> None:
    """Save in one of the ways that torch has; raises our own error where there is one."""
    try:
        if kind == "sync":
            dcp.save(state, storage_writer=writer, **options)
            return
        how = AsyncCheckpointerType.PROCESS if kind == "process" else AsyncCheckpointerType.THREAD
        dcp.async_save(
            state, storage_writer=writer, async_checkpointer_type=how, **options
        ).result()
    except BaseException as error:
        own = own_error(error)
        if own is None:
            raise
        raise own from None


def refusal(kind: str, state: dict[str, Any], writer: HFDualWriter, **options: Any) -> str | None:
    """Return what a save that is refused for its torch says; `None` if it is not refused."""
    try:
        save(kind, state, writer, **options)
    except UnsupportedTorchError as error:
        return _checked(error)
    return None


def _checked(error: UnsupportedTorchError) -> str:
    assert torch.__version__ in str(error)
    assert error.hint is not None
    return str(error)


def assert_nothing_is_there(root: Path, *names: str) -> None:
    """Check that neither checkpoints nor leftovers are there, once torch's frames are gone."""
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
    assert leftovers(root) == []
    assert not [name for name in names if (root / name).exists()]
