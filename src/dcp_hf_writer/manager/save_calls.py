"""Saves that the clock or a signal calls for: one rank decides, and all save at the same step.

The ranks do not run in step. So a rank that calls for a save opens a round. A thread of each rank
answers with the step that its training reached, and from then on its training waits at the next
step. The coordinator names the step after the highest of these, and all ranks save there. Training
waits only for this short exchange, and no rank waits for another rank's training: a rank that is
held may be the one that others wait for in a collective of the next step, but the answers come from
threads that take part in no collective.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CheckpointError, RankLostError
from dcp_hf_writer.torch_seam.calls_until_exit import CALLS_UNTIL_EXIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcp_hf_writer.manager.cadence import Cadence
    from dcp_hf_writer.manager.rank_messages import Messages, World

_log = logging.getLogger(__name__)

POLL_S = 0.1
"""How often the thread looks at the clock and at the store, in seconds."""
ROUND_S = 30.0
"""How long the ranks may take to answer in a round, in seconds."""


@dataclass(frozen=True, slots=True)
class SaveCall:
    """A save that the clock or a signal called for."""

    from_step: int
    """The save is due at the first step with this number or a higher one."""
    reason: str
    """Why, in words."""
    stop_signal: int | None = None
    """Signal after which the run ends, once the save is done; `None` to go on."""


@dataclass(frozen=True, slots=True)
class _Wish:
    reason: str
    stop_signal: int | None = None


class SaveCalls:
    """The rounds of one run on one rank. `due_at` belongs to the training thread."""

    def __init__(
        self,
        world: World,
        cadence: Cadence,
        connect: Callable[[], Messages],
        *,
        listens: bool,
    ) -> None:
        """Begin to listen, if there is anything to listen for.

        Args:
            world: The ranks.
            cadence: Says when the clock calls for a save.
            connect: Makes the messages of the thread.
            listens: Whether signals may call for a save.
        """
        self._world, self._cadence = world, cadence
        self._changed = threading.Condition()
        self._wish: _Wish | None = None
        # In order: a slow rank may learn of a second call before it has reached the first.
        self._calls: deque[SaveCall] = deque()
        self._is_held = False
        self._is_closed = False
        self._last_step = -1
        self._error: CheckpointError | None = None
        self._last_save = time.monotonic()
        self._thread: threading.Thread | None = None
        if not world.is_alone and (cadence.uses_clock or listens):
            self._thread = threading.Thread(
                target=self._listen, args=(connect(),), name="dcp-hf-save-calls", daemon=True
            )
            self._thread.start()

    def wish(self, reason: str, stop_signal: int | None = None) -> None:
        """Call for a save on all ranks. A signal handler may call it: it takes no lock."""
        if self._wish is None or self._wish.stop_signal is None:
            self._wish = _Wish(reason, stop_signal)

    def note_save(self) -> None:
        """Note that a save begins now: the clock starts anew."""
        self._last_save = time.monotonic()

    def due_at(self, step: int) -> SaveCall | None:
        """Return the call for a save at this step, once; `None` if there is none.

        Waits while a round is open, which takes a moment.

        Raises:
            RankLostError: If a rank did not answer in the round.
        """
        if self._world.is_alone:
            return self._due_alone(step)
        until = time.monotonic() + 2 * ROUND_S
        with self._changed:
            while self._is_held and self._error is None and time.monotonic() < until:
                self._changed.wait(POLL_S)
            if self._error is not None:
                error, self._error, self._is_held = self._error, None, False
                raise error
            if self._is_held:
                raise _no_answer([0])
            self._last_step = step
            if not self._calls or step < self._calls[0].from_step:
                return None
            return self._calls.popleft()

    def _due_alone(self, step: int) -> SaveCall | None:
        wish = self._next_wish()
        if wish is None:
            return None
        self._wish = None
        return SaveCall(step, wish.reason, wish.stop_signal)

    def _next_wish(self) -> _Wish | None:
        if self._wish is not None:
            return self._wish
        seconds = time.monotonic() - self._last_save
        if self._world.is_coordinator and self._cadence.is_due_after(seconds):
            return _Wish(f"{seconds:.0f} s since the last save")
        return None

    def close(self) -> None:
        """End the thread."""
        self._is_closed = True
        if self._thread is not None:
            self._thread.join()

    def _listen(self, messages: Messages) -> None:
        number = 1
        while not self._is_closed:
            try:
                with CALLS_UNTIL_EXIT.call():
                    number += self._round(messages, f"call/{number}")
            except CheckpointError as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                _log.warning("ranks cannot call for saves any more: %s", error)
                return
            time.sleep(POLL_S)

    def _round(self, messages: Messages, key: str) -> bool:
        """Take part in a round if one is open; returns whether it is over."""
        wish = None if self._calls else self._next_wish()
        if wish is not None and not messages.has(f"{key}/open"):
            messages.put(f"{key}/open", (wish.reason, wish.stop_signal))
        if not messages.has(f"{key}/open"):
            return False
        with self._changed:
            self._is_held = True
            last = self._last_step
        messages.put(f"{key}/last/{self._world.rank}", last)
        call = self._decided(messages, key)
        with self._changed:
            self._calls.append(call)
            self._is_held = False
            if self._wish is not None and self._wish.stop_signal in {None, call.stop_signal}:
                self._wish = None
            self._changed.notify_all()
        return True

    def _decided(self, messages: Messages, key: str) -> SaveCall:
        if self._world.is_coordinator:
            ranks = range(self._world.size)
            found = messages.collect(f"{key}/last", ranks, timeout_s=ROUND_S)
            missing = [rank for rank in ranks if rank not in found]
            if missing:
                messages.put(f"{key}/decision", _no_answer(missing))
            else:
                reason, stop_signal = messages.take_from_coordinator(
                    f"{key}/open", timeout_s=1, doing="plan"
                )
                messages.put(
                    f"{key}/decision", SaveCall(max(found.values()) + 1, reason, stop_signal)
                )
        decision = messages.take_from_coordinator(
            f"{key}/decision", timeout_s=ROUND_S + 5, doing="plan"
        )
        if isinstance(decision, CheckpointError):
            raise decision
        assert isinstance(decision, SaveCall)
        return decision


def _no_answer(missing: list[int]) -> RankLostError:
    return RankLostError(
        "the ranks could not agree on the step of a save",
        phase="plan",
        expected=f"an answer from every rank within {ROUND_S:.0f} s",
        found=f"no answer from ranks {missing}",
        hint="look at the logs of these ranks",
    )
