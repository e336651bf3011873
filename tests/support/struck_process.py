"""A planner that strikes torch's checkpointer process in the midst of the writing."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from support.faults import note_hit

if TYPE_CHECKING:
    import signal
    from pathlib import Path


class StruckPlanner(DefaultSavePlanner):
    """Travels to the checkpointer process and strikes it in the midst of the writing.

    Without a signal it does nothing, but the process has then imported this module.
    """

    def __init__(self, root: Path, sig: signal.Signals | None, until: float = math.inf) -> None:
        """Strike with `sig`, unless `time.monotonic()` has passed `until`."""
        super().__init__()
        self.root, self.sig, self.until = root, sig, until

    def resolve_data(self, write_item: Any) -> Any:
        """Strike at the first tensor of the optimizer."""
        is_meant = self.sig is not None and write_item.index.fqn == "optim.embed"
        if is_meant and time.monotonic() < self.until:
            note_hit(self.root, f"{os.getpid()}")
            os.kill(os.getpid(), self.sig)
        return super().resolve_data(write_item)
