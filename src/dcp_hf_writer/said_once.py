"""Warnings that a process logs once: every save of a run would repeat them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


class SaidOnce:
    """Logs each warning once. One object serves all saves of a process."""

    def __init__(self) -> None:
        """Start with nothing said."""
        self._said: set[str] = set()

    def warn(self, logger: logging.Logger, text: str, *args: object) -> None:
        """Log a warning, unless a warning with this text was logged before.

        Args:
            logger: Logger to use.
            text: The text, with places for `args`; these do not count.
            *args: What to put in the places.
        """
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *args)


SAID_ONCE = SaidOnce()
"""The one object of this process."""
