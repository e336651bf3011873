"""Which checkpoints that this process wrote may be in the page cache, and which of them leave it.

The newest published checkpoint stays: a restart on this host reads it from memory. Older ones leave
when the next save writes. The kernel then has memory for the new files that was in use a moment
ago; other memory takes longer to get, and may hold the data set of the training.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.storage.page_cache import drop_from_page_cache

if TYPE_CHECKING:
    from collections.abc import Iterable

_log = logging.getLogger(__name__)

_MOST_SERIES = 8
_MOST_STEPS = 8


class Series(NamedTuple):
    """Checkpoints of which the newer ones make the older ones unimportant."""

    parent: str
    """Their directory."""
    is_export: bool
    """Whether they are exports that lie apart from the DCP half, maybe in the same directory."""


class _Step(NamedTuple):
    path: str
    names: frozenset[str]


class CachedSteps:
    """The files that this process wrote, by series and by checkpoint.

    Thread safety: any thread may call it.
    """

    def __init__(self) -> None:
        """Start with none."""
        self.reset()

    def reset(self) -> None:
        """Forget everything: a forked child wrote nothing, and nobody there frees a held lock."""
        self._lock = threading.Lock()
        self._written: OrderedDict[Series, list[_Step]] = OrderedDict()
        self._dropping: threading.Thread | None = None

    def note(self, target: str, names: Iterable[str], *, is_export: bool = False) -> None:
        """Remember what this process wrote of a checkpoint.

        Args:
            target: Path of the checkpoint, which may not be published yet.
            names: Its files, relative to it.
            is_export: As in `Series`.
        """
        series = Series(os.path.dirname(target), is_export)
        step = _Step(target, frozenset(names))
        with self._lock:
            # A save that replaces a checkpoint removes the old files, and their pages with them.
            kept = [one for one in self._written.pop(series, []) if one.path != target]
            self._written[series] = [*kept, step][-_MOST_STEPS:]
            if len(self._written) > _MOST_SERIES:
                self._written.popitem(last=False)

    def drop_outdated(self, target: str, *, is_export: bool = False) -> None:
        """Let outdated files leave the page cache, in a thread of its own; nobody waits for it.

        So a file system that does not answer keeps no save waiting. As long as an earlier call is
        not done, nothing begins: a later save drops what is left.

        Args:
            target: Path of the checkpoint that is written now.
            is_export: As in `Series`.
        """
        series = Series(os.path.dirname(target), is_export)
        with self._lock:
            is_busy = self._dropping is not None and self._dropping.is_alive()
            if is_busy or not self._written.get(series, [])[1:]:
                return
            self._dropping = threading.Thread(
                target=self._drop, args=(series,), name="dcp-hf-drop", daemon=True
            )
            try:
                self._dropping.start()
            except RuntimeError:
                # The interpreter is exiting, or the system allows no more threads. A later save
                # tries again.
                self._dropping = None

    def _drop(self, series: Series) -> None:
        for path in self.take_outdated(series):
            try:
                drop_from_page_cache(path)
            except OSError as error:
                _log.info("%s stays in the page cache: %s", path, error)

    def take_outdated(self, series: Series) -> list[str]:
        """Return the files that may leave the page cache, and forget them.

        Args:
            series: The checkpoints to look at.

        Returns:
            Paths of what this process wrote of those before the newest one that is published.
        """
        with self._lock:
            steps = list(self._written.get(series, ()))
        # Without the lock: the file system may not answer, and others save elsewhere.
        published = [i for i, step in enumerate(steps) if _is_published(step.path)]
        outdated = steps[: published[-1]] if published else []
        with self._lock:
            left = self._written.get(series, [])
            left[:] = [step for step in left if step not in outdated]
        return [os.path.join(path, name) for path, names in outdated for name in sorted(names)]


def _is_published(path: str) -> bool:
    # The directory alone says nothing: the target of a save may exist before.
    return os.path.exists(os.path.join(path, MANIFEST_NAME))


CACHED_STEPS = CachedSteps()
"""One for the whole process: a program may make a new writer for each step."""
os.register_at_fork(after_in_child=CACHED_STEPS.reset)
