"""Preemption: a signal calls for a last save, within a budget of seconds."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OnSignal:
    """What signals do to a run. Signals go to any rank; all ranks act on them."""

    stop: tuple[int, ...] = (signal.SIGTERM,)
    """Save once more at the next step, then end with `SystemExit(128 + number)`."""
    save: tuple[int, ...] = (signal.SIGUSR1,)
    """Save at the next step and go on."""
    grace_s: float = 30.0
    """Seconds from a `stop` signal to the end of the process, finished or not."""
    last_save: bool = True
    """Whether a `stop` signal takes one more save. Without, it waits for the save in flight."""

    def __post_init__(self) -> None:
        """Check the signals and the budget."""
        for number in (*self.stop, *self.save):
            if number in {signal.SIGKILL, signal.SIGSTOP}:
                msg = "no process can handle this signal"
                raise ConfigError(msg, expected="for example SIGTERM", found=repr(number))
        if set(self.stop) & set(self.save):
            raise ConfigError("a signal can stop a run or save it, not both", found=repr(self))
        if not self.grace_s > 0:
            msg = "grace_s must be above zero"
            raise ConfigError(msg, expected="seconds", found=repr(self.grace_s))


class SignalHandlers:
    """The installed handlers of a run. Made and closed in the main thread."""

    def __init__(self, on_signal: OnSignal, wish: Callable[[str, int | None], None]) -> None:
        """Install the handlers.

        Args:
            on_signal: What the signals do.
            wish: Called with the reason, and the number of a stop signal.

        Raises:
            ConfigError: If this is not the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            msg = "signals can be handled in the main thread only"
            raise ConfigError(
                msg, expected="the manager made in the main thread", hint="pass on_signal=None"
            )
        self._on_signal, self._wish = on_signal, wish
        self._timer: threading.Timer | None = None
        self._old: dict[int, Any] = {}
        for number in (*on_signal.stop, *on_signal.save):
            self._old[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        if number in self._on_signal.save:
            self._wish(name, None)
            return
        self.start_budget(number)
        self._wish(name, number)

    def start_budget(self, number: int) -> None:
        """Start the seconds until the process ends; does nothing if they have started."""
        if self._timer is None:
            grace_s = self._on_signal.grace_s
            self._timer = threading.Timer(grace_s, self._end, (number,))
            self._timer.daemon = True
            self._timer.start()

    def _end(self, number: int) -> None:
        _log.error(
            "the run did not end within %.0f s of %s; the save in flight is given up",
            self._on_signal.grace_s,
            signal.Signals(number).name,
        )
        # Only the main thread can change a handler, and it may be stuck: end the process at once.
        # The unfinished save stays invisible, and the next save removes it.
        os._exit(128 + number)

    def close(self) -> None:
        """Put the old handlers back."""
        if self._timer is not None:
            self._timer.cancel()
        if threading.current_thread() is not threading.main_thread():
            return
        for number, old in self._old.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, signal.SIG_DFL if old is None else old)
        self._old = {}


def stop_process_group() -> None:
    """Send SIGTERM to the process group of this process, which ends the run on this host."""
    os.killpg(os.getpgid(0), signal.SIGTERM)
