"""Follow saves in flight from look to look: rate, time left, ranks that are late, how they end."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dcp_hf_writer.manager.saves_in_flight import LocalSaves
from dcp_hf_writer.manager.saves_on_store import SavesOnStore
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcp_hf_writer.manager.saves_in_flight import PublishedSave, SaveInFlight
    from dcp_hf_writer.save.progress_heartbeat import Heartbeat

EndedAs = Literal["published", "failed", "dead"]

# A rank goes through these in this order; the save as a whole is where its slowest rank is.
_PHASES = (
    *("plan", "prepare", "write", "reuse", "row wait", "slot wait"),
    *("write dcp", "write hf", "sync", "written"),
    *("finish", "checksums", "metadata", "failed"),
)
_DONE = frozenset({"written", "finish", "checksums", "metadata", "failed"})
# A rank that waits for its turn, or for others, makes no progress of its own.
_MAY_REST = _DONE | {"reuse", "row wait", "slot wait"}

# The rate is that of the last seconds: a device has bursts and pauses.
_WINDOW_S = 5.0
# A save whose process cannot be seen from here counts as dead after so long without any news.
_DEAD_S = 60.0
# A rank is far behind with less than half of what the median rank has written.
_BEHIND = 0.5
_BEHIND_FROM = 0.2


@dataclass(frozen=True, slots=True)
class WatchedRank:
    """One rank of a save, at one look."""

    heartbeat: Heartbeat
    """What it told last."""
    silent_s: float
    """Seconds since it told anything."""
    idle_s: float
    """Seconds since phase or bytes changed."""
    late: str | None
    """Why it counts as late; `None` if it does not."""


@dataclass(frozen=True, slots=True)
class WatchedSave:
    """One save in flight, at one look."""

    save: SaveInFlight
    """Its record."""
    phase: str
    """Phase of its slowest rank; `start` before any rank told one."""
    done_nbytes: int
    """Bytes that its ranks have written."""
    planned_nbytes: int
    """Bytes that the ranks which told something will write."""
    nbytes_per_s: float | None
    """Rate of the last seconds; `None` if it is not known."""
    left_s: float | None
    """Seconds until all bytes are written at that rate; `None` if that is not known."""
    seconds: float | None
    """Seconds since the first heartbeat's rank began to write; `None` without a heartbeat."""
    world_size: int | None
    """Number of its ranks; `None` before any rank told it."""
    ranks: tuple[WatchedRank, ...]
    """The ranks that told something, by rank."""
    missing: tuple[int, ...]
    """Ranks that have told nothing."""


@dataclass(frozen=True, slots=True)
class EndedSave:
    """A save that was in flight and is not any more."""

    save: SaveInFlight
    """Its last record."""
    outcome: EndedAs
    """`failed`: its directory is gone without a checkpoint; `dead`: nobody works on it."""
    published: PublishedSave | None
    """What it published."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found."""

    saves: tuple[WatchedSave, ...]
    """Saves in flight, the oldest first."""
    ended: tuple[EndedSave, ...]
    """Saves that have ended since the look before."""


@dataclass(slots=True)
class _Seen:
    """What is remembered of a rank between looks; times are the watcher's own."""

    told: float
    latest_told: float
    moved: float
    latest_moved: float


@dataclass(slots=True)
class _Known:
    """What is remembered of a save between looks."""

    save: SaveInFlight
    samples: deque[tuple[float, int]] = field(default_factory=deque)
    ranks: dict[int, _Seen] = field(default_factory=dict)
    news_at: float = field(default_factory=time.monotonic)


class SaveWatch:
    """Watches the saves of a directory. Reads only; not thread-safe."""

    def __init__(self, root: str, *, target: str | None, late_s: float) -> None:
        """Watch all saves in `root`, or only those to `target`.

        Args:
            root: The directory that holds the checkpoints; absolute, or a URL.
            target: A checkpoint in it; `None` for all.
            late_s: Seconds after which a rank without news or progress is late.

        Raises:
            ConfigError: If the store of a URL cannot be opened.
        """
        self._source = SavesOnStore(root) if is_url(root) else LocalSaves(root)
        self.root, self._target, self._late_s = root, target, late_s
        self._known: dict[str, _Known] = {}
        self._dead: set[str] = set()

    def look(self) -> Look:
        """Look at the directory once.

        Raises:
            ReadError: If it cannot be listed.
        """
        now = time.monotonic()
        found = {
            save.save_id: save
            for save in self._source.in_flight()
            if self._target in {None, save.target} and save.save_id not in self._dead
        }
        for save_id, save in found.items():
            known = self._known.setdefault(save_id, _Known(save))
            known.save = save
            self._remember(known, now)
        ended = [one for known in self._known.values() if (one := self._end_of(known, found, now))]
        for one in ended:
            del self._known[one.save.save_id]
            self._dead.add(one.save.save_id)
        watched = (self._watched(known, now) for known in self._known.values())
        return Look(tuple(watched), tuple(ended))

    def _end_of(
        self, known: _Known, found: dict[str, SaveInFlight], now: float
    ) -> EndedSave | None:
        save = known.save
        state = save.state
        is_silent = state == "unknown" and now - known.news_at > _DEAD_S
        is_there = save.save_id in found or self._source.is_there(save)
        # Looked for last: a save may publish between these lines, and its process may then end.
        published = self._source.published(save)
        if published is not None:
            return EndedSave(save, "published", published)
        if not is_there:
            return EndedSave(save, "failed", None)
        # The record goes a moment before the checkpoint gets its name.
        if state == "dead" or (save.save_id in found and is_silent):
            return EndedSave(save, "dead", None)
        return None

    def _remember(self, known: _Known, now: float) -> None:
        for beat in known.save.heartbeats:
            seen = known.ranks.get(beat.rank)
            if seen is None:
                # Only for the first one do the clocks of two hosts meet.
                wall = time.time()
                told, moved = max(wall - beat.time, 0.0), max(wall - beat.news_time, 0.0)
                seen = _Seen(now - told, beat.time, now - moved, beat.news_time)
                known.ranks[beat.rank] = seen
            if beat.time != seen.latest_told:
                seen.told, seen.latest_told = now, beat.time
            if beat.news_time != seen.latest_moved:
                seen.moved, seen.latest_moved = now, beat.news_time
            known.news_at = max(known.news_at, seen.told)
        done = sum(beat.done_nbytes for beat in known.save.heartbeats)
        samples = known.samples
        samples.append((now, done))
        while len(samples) > 2 and samples[1][0] < now - _WINDOW_S:  # noqa: PLR2004 - two points
            samples.popleft()

    def _watched(self, known: _Known, now: float) -> WatchedSave:
        beats = known.save.heartbeats
        done, planned = sum(b.done_nbytes for b in beats), sum(b.planned_nbytes for b in beats)
        rate = _rate_of(known.samples)
        world_size = beats[0].world_size if beats else None
        told = {beat.rank for beat in beats}
        missing = tuple(n for n in range(world_size or 0) if n not in told)
        is_known = bool(rate) and planned > 0 and not missing
        return WatchedSave(
            save=known.save,
            phase=_phase_of(beats),
            done_nbytes=done,
            planned_nbytes=planned,
            nbytes_per_s=rate,
            left_s=(planned - done) / rate if rate and is_known else None,
            seconds=max(time.time() - min(b.began for b in beats), 0.0) if beats else None,
            world_size=world_size,
            ranks=tuple(self._rank(known, beat, now) for beat in beats),
            missing=missing,
        )

    def _rank(self, known: _Known, beat: Heartbeat, now: float) -> WatchedRank:
        seen = known.ranks[beat.rank]
        silent, idle = now - seen.told, now - seen.moved
        return WatchedRank(beat, silent, idle, self._late(known, beat, silent, idle))

    def _late(self, known: _Known, beat: Heartbeat, silent: float, idle: float) -> str | None:
        if silent > self._late_s:
            return f"no news for {silent:.0f} s"
        if idle > self._late_s and beat.phase not in _MAY_REST:
            return f"no progress for {idle:.0f} s"
        median = statistics.median(map(_share, known.save.heartbeats))
        if beat.phase not in _DONE and median >= _BEHIND_FROM and _share(beat) < _BEHIND * median:
            return "far behind the others"
        return None


def _share(beat: Heartbeat) -> float:
    """Return how much of its bytes a rank has written, from 0 to 1."""
    if beat.phase in _DONE:
        return 1.0
    return beat.done_nbytes / beat.planned_nbytes if beat.planned_nbytes else 0.0


def _rate_of(samples: Sequence[tuple[float, int]]) -> float | None:
    (began, first), (ended, last) = samples[0], samples[-1]
    return (last - first) / (ended - began) if ended > began else None


def _phase_of(beats: Sequence[Heartbeat]) -> str:
    """Return the phase of the slowest rank, or of the coordinator when all have written."""
    if not beats:
        return "start"
    phases = {beat.phase for beat in beats}
    if phases <= _DONE:
        return max(phases, key=_order)
    return min(phases - _DONE, key=_order)


def _order(phase: str) -> int:
    return _PHASES.index(phase) if phase in _PHASES else 0
