"""A progress bar with rate and time left, for work that takes over a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_DELAY_S = 1.0


class ByteProgress:
    """Call it with the bytes done and the total bytes; a context manager that ends the bar.

    The bar appears on stderr after a second, if stderr is a terminal.
    """

    def __init__(self, what: str) -> None:
        """Prepare a bar with `what` before it; shows nothing yet."""
        self._what = what
        self._began = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        """Return the bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar from the screen."""
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show the bytes done out of `total`."""
        if self._bar is None:
            if not self._console.is_terminal or time.monotonic() - self._began < _DELAY_S:
                return
            self._bar = self._started()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def _started(self) -> Progress:
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            expand=True,
        )
        bar.start()
        bar.add_task(self._what, total=None)
        return bar
