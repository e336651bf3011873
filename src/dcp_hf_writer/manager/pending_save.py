"""One save of a run, from staging to the callbacks, followed by a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError, ExportError
from dcp_hf_writer.manager.agree_on_outcome import Committed, Verdict, agree
from dcp_hf_writer.manager.save_report import SaveReport
from dcp_hf_writer.save.owner_process import is_from_here

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.manager.rank_messages import Messages
    from dcp_hf_writer.manager.run_storage import RunStorage, StoredStep

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """What one save is to do; the same on every rank."""

    number: int
    """How many saves this run has begun, this one included."""
    step: int
    """Step of the save."""
    path: str
    """Path of the checkpoint."""
    is_snapshot: bool
    """Whether the save goes into the snapshot slot."""
    has_export: bool
    """Whether the save writes a HuggingFace half."""
    metrics: Mapping[str, float] | None = None
    """Metrics to note with the step."""


Launch = Callable[[], Future[Any]]
"""Begins one try at a save and returns its future; the first try stages the state dict."""


@dataclass(frozen=True, slots=True)
class SaveTools:
    """What a save needs from the manager."""

    directory: RunStorage
    """The storage of the run."""
    messages: Messages
    """Messages of the thread that follows the save."""
    timeout_s: float
    """Deadline of each try, in seconds."""
    pause: Callable[[BaseException, int], float | None]
    """Returns the pause before the next try, from the error and the number of tries so far."""
    still_running: Callable[[SaveRequest, float], None]
    """Called now and then while the save runs, with the seconds since it began."""
    on_end: Callable[[SaveRequest, Verdict, SaveReport | None, int], None]
    """Called on every rank with the outcome, the report if committed, and the number of tries."""
    in_process: bool
    """Whether torch's checkpointer process runs the saves."""


class PendingSave:
    """A save in flight. The training thread begins it; a thread of its own follows it to the end.

    The thread is not a daemon: at exit, the interpreter waits for the save.
    """

    def __init__(self, request: SaveRequest, tools: SaveTools, *, waited_s: float) -> None:
        """Prepare the save; nothing begins.

        Args:
            request: What to save.
            tools: What the manager provides.
            waited_s: Seconds that training waited for the save before.
        """
        self.request = request
        self._tools = tools
        self._waited_s = waited_s
        self._stall_s = 0.0
        self._attempts = 0
        self._began = time.monotonic()
        self._before = self._save_id()
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None
        """What broke the thread itself, which never happens unless there is a bug."""
        self.report: SaveReport | None = None
        """The report of the committed save; `None` while it runs, or if it failed."""

    def begin(self, launch: Launch) -> None:
        """Stage the state dict in the calling thread, and follow the save in another."""
        future = self._launched(launch)
        self._stall_s = time.monotonic() - self._began
        self._thread = threading.Thread(
            target=self._follow, args=(future, launch), name="dcp-hf-manager"
        )
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the save and its callbacks are over; returns whether they are."""
        if self._thread is None or self._thread is threading.current_thread():
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_over(self) -> bool:
        """Whether the save and its callbacks are over."""
        return self._thread is None or not self._thread.is_alive()

    def _launched(self, launch: Launch) -> Future[Any]:
        self._attempts += 1
        try:
            return launch()
        except Exception as error:  # noqa: BLE001 - all ranks agree on it, as on any other error
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def _follow(self, future: Future[Any], launch: Launch) -> None:
        try:
            verdict = self._agreed(future)
            while verdict.pause_s is not None:
                _log.warning(
                    "save of step %d failed and is tried again in %.1f s: %s",
                    self.request.step,
                    verdict.pause_s,
                    verdict.error,
                )
                time.sleep(verdict.pause_s)
                future = self._launched(launch)
                verdict = self._agreed(future)
            self.report = self._report(verdict)
            self._tools.on_end(self.request, verdict, self.report, self._attempts)
        except BaseException as error:  # noqa: BLE001 - the manager raises it in the training thread
            self.error = error

    def _agreed(self, future: Future[Any]) -> Verdict:
        began, tools, attempts = time.monotonic(), self._tools, self._attempts
        return agree(
            future,
            tools.messages,
            key=f"save/{self.request.number}/{attempts}",
            deadline=began + tools.timeout_s,
            look=self._committed,
            pause=lambda error: tools.pause(error, attempts),
            still_running=lambda: tools.still_running(self.request, time.monotonic() - began),
        )

    def _look(self) -> StoredStep:
        request = self.request
        return self._tools.directory.look_at(request.step, is_snapshot=request.is_snapshot)

    def _save_id(self) -> str | None:
        try:
            facts = self._look().facts
        except CheckpointError as error:
            # A store does not answer. There, a save never replaces a checkpoint in place.
            _log.warning("could not look for a checkpoint before the save: %s", error)
            return None
        return None if facts is None else facts.save_id

    def _committed(self) -> Committed | None:
        facts = self._look().facts
        if facts is None or facts.save_id is None or facts.save_id == self._before:
            return None
        tools = self._tools
        if tools.messages.world.is_coordinator and not is_from_here(
            facts.save_id, with_children=tools.in_process
        ):
            # Another job that shares the directory was faster.
            return None
        return Committed(facts.save_id, facts.nbytes)

    def _report(self, verdict: Verdict) -> SaveReport | None:
        if verdict.save_id is None:
            return None
        error = verdict.error if isinstance(verdict.error, ExportError) else None
        return SaveReport(
            step=self.request.step,
            path=self.request.path,
            save_id=verdict.save_id,
            nbytes=verdict.nbytes,
            has_export=self.request.has_export and error is None,
            export_error=error,
            attempts=self._attempts,
            waited_s=self._waited_s,
            stall_s=self._stall_s,
            seconds=time.monotonic() - self._began,
        )
