"""The fixed facts of one save on one rank: frozen values, each set by one step of the save."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from dcp_hf_writer.staging.same_memory import memory_of, tied_groups
from dcp_hf_writer.torch_seam.save_world import SaveWorld

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.distributed.checkpoint.utils import _DistWrapper

    from dcp_hf_writer.errors import CheckpointError
    from dcp_hf_writer.save.finished_save import ReportHook
    from dcp_hf_writer.save.progress_heartbeat import Pace
    from dcp_hf_writer.save.rank_progress import Rendezvous
    from dcp_hf_writer.staging.slab import StagedInfo
    from dcp_hf_writer.torch_seam.caller_frames import Planned, RunningSave


class PlaceOfSave(Protocol):
    """What a running save must be able to do with the place that it writes to."""

    save_id: str
    """Id of the save."""
    target: str
    """The checkpoint: an absolute path, or a URL without credentials."""

    @property
    def pace(self) -> Pace:
        """How often a rank writes its heartbeat."""

    def heartbeat_of(self, rank: int) -> Callable[[bytes], None] | None:
        """Return the function that replaces the heartbeat of a rank; it may raise `OSError`.

        `None` if the place keeps no heartbeats.
        """

    def is_committed(self) -> bool:
        """Whether this save's checkpoint is visible."""

    def remove(self) -> None:
        """Remove what an unpublished save wrote (coordinator); safe to call twice."""


@dataclass(frozen=True, slots=True)
class SaveContext:
    """The facts of a save that are fixed when it begins, in the thread that runs it."""

    target: str
    """Path of the checkpoint."""
    deadline: float
    """`time.monotonic()` by which the save must be done."""
    staged: StagedInfo | None = None
    """What staging found out; `None` for a synchronous save."""
    staged_at: float = field(default_factory=time.monotonic)
    """`time.monotonic()` when staging began; without staging, when the save began."""
    is_sent: bool = False
    """Whether a parent process staged it and waits for the outcome."""
    is_background: bool = False
    """Whether training may go on meanwhile."""
    world: SaveWorld = field(default_factory=lambda: SaveWorld.of(None, is_distributed=False))
    """The ranks of the save as it began."""
    running: RunningSave | None = None
    """The call of torch's that is the save; `None` if it could not be found."""
    refusal: CheckpointError | None = None
    """Why the save cannot go on; the writer raises it where torch passes it on to all ranks."""
    report_to: tuple[ReportHook, ...] = ()
    """Functions of the user that get the report of the save, on rank 0."""
    began: float = field(default_factory=time.monotonic)
    """`time.monotonic()` when the save began."""
    thread: threading.Thread = field(default_factory=threading.current_thread)
    """The thread that runs the save."""

    def left_s(self) -> float:
        """Return the seconds until the deadline; 0 if it has passed."""
        return max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True, slots=True)
class Membership:
    """This rank's part in a save, as torch reports it."""

    rank: int = 0
    """Rank within the process group of the save."""
    world_size: int = 1
    """Number of ranks of the save."""
    is_coordinator: bool = True
    """Whether this rank plans globally and commits."""
    rendezvous: Rendezvous | None = None
    """Records of the ranks; `None` if no other rank takes part."""
    count: int = 0
    """Number of saves that this process has begun."""

    @classmethod
    def of(
        cls,
        ranks: _DistWrapper,
        is_coordinator: bool,  # noqa: FBT001 - torch's
        rendezvous: Rendezvous | None,
        count: int,
    ) -> Membership:
        """Make it from the ranks of the save, as torch's frames show them.

        torch also passes the rank to the writer, but only if the method's signature has `**kwargs`.
        A subclass or a decorator may lack that.
        """
        return cls(ranks.get_rank(), ranks.get_world_size(), is_coordinator, rendezvous, count)


@dataclass(frozen=True, slots=True)
class RankView:
    """What a rank is to save, as known before its plan is made."""

    planned: Planned
    """The planner, and its flat state dict."""
    memory: Mapping[str, int]
    """Number of each tensor's memory, by FQN; tied tensors have equal numbers."""

    @classmethod
    def of(cls, planned: Planned) -> RankView:
        """Make the view of what a planner was given; staged tensors are tied as the originals."""
        # Not from what staging found: other code may change the state dict after staging.
        return cls(planned, memory_of(planned.state_dict))

    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Return the groups of FQNs whose tensors share one memory."""
        return tied_groups(self.memory)


@dataclass(frozen=True, slots=True)
class SentFacts:
    """What a rank's report repeats, so that the coordinator can recognise facts of an older save.

    DCP's plan cache may show the coordinator an older plan of this rank.
    """

    stamp: str = ""
    """Stamp of the `LocalFacts` in this rank's local plan."""
    withheld_samples: bytes | None = None
    """Samples of those facts if DCP does not send the plan; `None` if it does."""
