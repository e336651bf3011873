"""The process group of the saves: gloo, with its own timeout, apart from the training group."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from dcp_hf_writer.errors import RankLostError

if TYPE_CHECKING:
    from dcp_hf_writer.manager.rank_messages import Messages, World

_log = logging.getLogger(__name__)

ROLL_CALL_S = 30.0
"""How long the ranks may take to answer before a lost group is replaced."""


class OwnGroup:
    """A gloo group for the collectives of saves and loads; replaced after it lost a rank.

    All ranks make it, in the same order as their other groups.
    """

    def __init__(self, world: World, *, timeout_s: float) -> None:
        """Make the group and connect its ranks, so that a problem shows now.

        Args:
            world: The ranks.
            timeout_s: Timeout of each collective, in seconds.
        """
        self._world = world
        self._timeout = timedelta(seconds=timeout_s)
        self._is_lost = False
        self._group = self._made()

    @property
    def current(self) -> dist.ProcessGroup | None:
        """The group; `None` if this rank is alone."""
        return self._group

    @property
    def is_lost(self) -> bool:
        """Whether a rank did not answer in the group, so that it cannot be used again."""
        return self._is_lost

    def give_up(self) -> None:
        """Note that the group cannot be used again: a thread may wait in it for a lost rank."""
        self._is_lost = True

    def _made(self) -> dist.ProcessGroup | None:
        if self._world.is_alone:
            return None
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=self._timeout)
        dist.barrier(group=group)
        return group

    def answer_roll_call(self, messages: Messages, key: str) -> None:
        """Tell the coordinator that this rank is there, if the group was lost."""
        if self._is_lost and not self._world.is_alone:
            messages.put(f"{key}/here/{self._world.rank}", value=True)

    def roll_call(self, messages: Messages, key: str) -> RankLostError | None:
        """Wait until all ranks have answered, if the group was lost (coordinator).

        Returns:
            The error if a rank does not answer, so that the group cannot be replaced.
        """
        if not self._is_lost or self._world.is_alone:
            return None
        ranks = range(self._world.size)
        found = messages.collect(f"{key}/here", ranks, timeout_s=ROLL_CALL_S)
        for rank in found:
            messages.drop(f"{key}/here/{rank}")
        missing = [rank for rank in ranks if rank not in found]
        if not missing:
            return None
        return RankLostError(
            "the process group of the saves lost a rank and cannot be replaced",
            rank=self._world.rank,
            phase="plan",
            expected=f"an answer from every rank within {ROLL_CALL_S:.0f} s",
            found=f"no answer from ranks {missing}",
            hint="restart the run; it resumes from its newest checkpoint",
        )

    def renew(self) -> None:
        """Replace a lost group; all ranks call it, after the roll call. Else does nothing."""
        if self._is_lost:
            _log.info("all ranks answer again: making a new process group for saves")
            self._group, self._is_lost = self._made(), False

    def close(self) -> None:
        """Give the group back, unless a thread may still wait in it."""
        if self._group is not None and not self._is_lost and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None
