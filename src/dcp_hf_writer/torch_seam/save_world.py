"""The world of a save: its process group as staging saw it, and whether the save still has it.

The usual last lines of a script destroy the process group. If a save is in flight, torch then takes
each rank for a run of one: it would publish the part of one rank as the whole checkpoint, or go on
in a group that was made later. So staging records the world, and the save compares.

Mechanism: `torch.distributed` keeps one default store for each initialisation, so another store
means another initialisation. `get_rank(group)` raises `ValueError` for a group that was destroyed.

Looked at: torch 2.10 to 2.15. When torch changes: `default_store` raises, so saves of several ranks
fail.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dcp_hf_writer.errors import SaveAbortedError
from dcp_hf_writer.torch_seam.caller_frames import is_no_dist_given
from dcp_hf_writer.torch_seam.default_store import default_store, has_default_group

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcp_hf_writer.torch_seam.caller_frames import TorchAsyncSave

PROBLEM = "the process group of this save was destroyed before the save was over"
WAIT_HINT = (
    "wait for the result of the future that async_save returns before you call "
    "destroy_process_group(), on every rank"
)


@dataclass(frozen=True)
class SaveWorld:
    """The ranks of a save as one process sees them."""

    size: int
    """Number of ranks; 1 if the save uses no process group."""
    rank: int
    """This rank within the process group of the save."""
    is_alone: bool
    """Whether the save uses no process group."""
    is_certain: bool
    """Whether torch said which group the save will use; otherwise it is the writer's."""
    group: Callable[[], dist.ProcessGroup | None] | None = None
    """Weak reference to the process group; `None` for the default group."""
    store: Any = None
    """The default store; it tells one initialisation of `torch.distributed` from the next."""
    pid: int = 0
    """The process that the group and the store belong to."""

    @classmethod
    def at_staging(cls, call: TorchAsyncSave | None, group: dist.ProcessGroup | None) -> SaveWorld:
        """Return the world of the save that the staged copy is for.

        Args:
            call: The call of `async_save`; `None` if it is not among the callers.
            group: Process group of the writer, which is used then.
        """
        if call is None:
            return cls.of(group, is_distributed=has_default_group(), is_certain=False)
        is_distributed = has_default_group() and not call.no_dist
        return cls.of(call.group, is_distributed=is_distributed)

    @classmethod
    def of(
        cls, group: dist.ProcessGroup | None, *, is_distributed: bool, is_certain: bool = True
    ) -> SaveWorld:
        """Return the world of a save that uses `group` now."""
        if not is_distributed:
            return cls(1, 0, is_alone=True, is_certain=is_certain)
        return cls(
            *_size_and_rank(group),
            is_alone=False,
            is_certain=is_certain,
            group=None if group is None else weakref.ref(group),
            store=_store(),
            pid=os.getpid(),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A checkpointer process has a group of its own, with the same ranks.
        return SaveWorld, (self.size, self.rank, self.is_alone, self.is_certain)

    @property
    def is_here(self) -> bool:
        """Whether the process group is one of this process."""
        return self.pid == os.getpid()

    def check_before(self, *, target: str) -> None:
        """Check the world before torch looks for the process group of the save.

        Raises:
            SaveAbortedError: If the process group was destroyed since staging.
        """
        if self.is_certain and not self.is_alone:
            group = None if self.group is None else self.group()
            self.check(group, is_distributed=has_default_group(), target=target, phase="plan")

    def check(
        self, group: dist.ProcessGroup | None, *, is_distributed: bool, target: str, phase: str
    ) -> None:
        """Check that a save with `group` runs in this world.

        Args:
            group: Process group of the save; `None` for the default group.
            is_distributed: Whether torch uses a process group for the save.
            target: Path of the checkpoint, for the message.
            phase: Phase of the save, for the message.

        Raises:
            SaveAbortedError: If it runs in another world.
        """
        found = self._difference(group, is_distributed=is_distributed)
        if found is not None:
            raise self._lost(found, target, phase, "")

    def check_unstaged(self, *, target: str) -> None:
        """Check an asynchronous save without a process group that another stager staged.

        Called for the world in which its writer was made, as nobody saw the staging.

        Raises:
            SaveAbortedError: If there is no process group any more.
        """
        if self.size > 1 and not has_default_group() and not is_no_dist_given():
            error = self._lost("no process group", target, "plan", "")
            error.hint = f"{WAIT_HINT}; or pass no_dist=True to save this rank alone"
            raise error

    def is_lost(self) -> bool:
        """Whether the process group of a save that has begun was destroyed."""
        return self._now() is not None

    def lost(self, *, target: str, phase: str, outcome: str = "") -> SaveAbortedError:
        """Make the error for a save that has begun and whose process group was destroyed.

        Args:
            target: Path of the checkpoint.
            phase: Phase of the save.
            outcome: Whether the checkpoint is committed, in words, if that is known.
        """
        return self._lost(self._now() or "no process group", target, phase, outcome)

    def _now(self) -> str | None:
        if self.is_alone:
            return None
        group = None if self.group is None else self.group()
        if group is None and self.group is not None:
            # torch holds a group for as long as it knows it.
            return "no process group"
        return self._difference(group, is_distributed=True)

    def _lost(self, found: str, target: str, phase: str, outcome: str) -> SaveAbortedError:
        return SaveAbortedError(
            "a process group was initialised while this save was in flight"
            if self.is_alone
            else PROBLEM,
            rank=self.rank,
            phase=phase,
            path=target,
            expected=_described(self),
            found=found + (f"; {outcome}" if outcome else ""),
            hint="initialise it before async_save, or pass no_dist=True"
            if self.is_alone
            else WAIT_HINT,
        )

    def _difference(self, group: dist.ProcessGroup | None, *, is_distributed: bool) -> str | None:
        """Return in words how the world of a save differs from this one; `None` if it does not."""
        store = _store()
        if self.is_here and store is not None and store is not self.store:
            return "a process group that was initialised later"
        if not is_distributed:
            # The caller may have passed `no_dist=True` to a save of what was staged by hand.
            is_asked_for = not self.is_certain and has_default_group()
            return None if self.size == 1 or is_asked_for else "no process group"
        if not has_default_group():
            return "no process group"
        now = SaveWorld.of(group, is_distributed=True)
        if now.rank < 0:
            return "a process group that torch does not know any more"
        is_equal = (now.size, now.rank) == (self.size, self.rank)
        return None if is_equal or not self.is_certain else _described(now)


def _described(world: SaveWorld) -> str:
    if world.is_alone:
        return "a save without a process group"
    return f"the process group of rank {world.rank} of {world.size}"


def _store() -> Any:
    """Return the default store; `None` if there is no default group."""
    try:
        return default_store() if has_default_group() else None
    except ValueError:
        # Another thread has destroyed the group in this moment.
        return None


def _size_and_rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the size of a group and this process's rank in it; -1 for a group that is gone."""
    try:
        return dist.get_world_size(group), dist.get_rank(group)
    except ValueError:
        return -1, -1
