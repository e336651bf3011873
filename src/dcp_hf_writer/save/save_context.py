"""What is fixed of one save on one rank: frozen values, each known from one step on."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcp_hf_writer.staging.same_memory import memory_of, tied_groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.errors import CheckpointError
    from dcp_hf_writer.save.rendezvous import Rendezvous
    from dcp_hf_writer.staging.slab import StagedInfo
    from dcp_hf_writer.torch_seam.frames import Planned


@dataclass(frozen=True, slots=True)
class SaveContext:
    """A save as it begins, in the thread that runs it."""

    target: str
    """Path of the checkpoint."""
    deadline: float
    """`time.monotonic()` by which it must be done."""
    staged: StagedInfo | None = None
    """What staging found out; `None` for a synchronous save."""
    refusal: CheckpointError | None = None
    """Why it cannot go on; raised where torch tells all ranks."""
    began: float = field(default_factory=time.monotonic)
    """`time.monotonic()` at its begin."""
    thread: threading.Thread = field(default_factory=threading.current_thread)
    """The thread that runs it."""

    def left_s(self) -> float:
        """Return the seconds to the deadline, not below zero."""
        return max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True, slots=True)
class Membership:
    """This rank's part in a save, as torch tells it."""

    rank: int = 0
    """Rank within the process group of the save."""
    is_coordinator: bool = True
    """Whether it plans globally and commits."""
    rendezvous: Rendezvous | None = None
    """Records of the ranks; `None` where there is nobody else."""
    count: int = 0
    """Number of saves that the process has begun."""


@dataclass(frozen=True, slots=True)
class RankView:
    """What a rank is to save, before its plan is made."""

    planned: Planned
    """The planner, and its flat state dict."""
    memory: Mapping[str, int]
    """Number of the memory that each tensor is, by FQN; equal for tied ones."""

    @classmethod
    def of(cls, planned: Planned, staged: StagedInfo | None) -> RankView:
        """Take the memory that staging has found, or else that of the planned tensors."""
        return cls(planned, memory_of(planned.state_dict) if staged is None else staged.memory)

    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Return the groups of FQNs that are the same memory."""
        return tied_groups(self.memory)


@dataclass(frozen=True, slots=True)
class SentFacts:
    """What the coordinator can tell the facts of this save by, should it be shown older ones."""

    stamp: str = ""
    """Of the `LocalFacts` that the local plan carries."""
    withheld_samples: bytes | None = None
    """Their samples, if DCP does not send the plan."""
