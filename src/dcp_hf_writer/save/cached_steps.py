"""Which checkpoints that this process wrote may be in the page cache, and which of them leave it.

The newest published checkpoint stays: a restart on this host reads it from memory. Older ones leave
when the next save writes. The kernel then has memory for the new files that was in use a moment
ago; other memory takes longer to get, and may hold the data set of the training.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_MOST_PARENTS = 8
_MOST_STEPS = 8


class CachedSteps:
    """The files that this process wrote, by directory of the checkpoints and by checkpoint.

    Thread safety: any thread may call it.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._lock = threading.Lock()
        self._written: OrderedDict[str, list[tuple[str, frozenset[str]]]] = OrderedDict()

    def note(self, target: str, names: Iterable[str]) -> None:
        """Remember what this process wrote of a checkpoint.

        Args:
            target: Path of the checkpoint, which may not be published yet.
            names: Its files, relative to it.
        """
        parent = os.path.dirname(target)
        with self._lock:
            # A save that replaces a checkpoint removes the old files, and their pages with them.
            kept = [step for step in self._written.pop(parent, []) if step[0] != target]
            self._written[parent] = [*kept, (target, frozenset(names))][-_MOST_STEPS:]
            if len(self._written) > _MOST_PARENTS:
                self._written.popitem(last=False)

    def take_outdated(self, target: str) -> list[str]:
        """Return the files that may leave the page cache, and forget them.

        Args:
            target: Path of the checkpoint that is written now.

        Returns:
            Paths of what this process wrote of checkpoints in the same directory, before the newest
            of them that is published.
        """
        with self._lock:
            steps = self._written.get(os.path.dirname(target), [])
            published = [i for i, (path, _) in enumerate(steps) if os.path.isdir(path)]
            newest = published[-1] if published else 0
            outdated, steps[:] = steps[:newest], steps[newest:]
        return [os.path.join(path, name) for path, names in outdated for name in sorted(names)]


CACHED_STEPS = CachedSteps()
"""One for the whole process: a program may make a new writer for each step."""
