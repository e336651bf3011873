"""What a process logs once: every save of a run would repeat it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


class SaidOnce:
    """Remembers what was logged. One object serves all saves of a process."""

    def __init__(self) -> None:
        """Start with nothing said."""
        self._said: set[str] = set()

    def warn(self, logger: logging.Logger, text: str, *args: object) -> None:
        """Log a warning, unless a warning with this text was logged before.

        Args:
            logger: Logger to use.
            text: The text, with places for `args`. Two warnings that differ only in `args` count as
                one.
            *args: What to put in the places.
        """
        if self.is_new(text):
            logger.warning(text, *args)

    def is_new(self, text: str) -> bool:
        """Whether a text was not said before; from now on it counts as said."""
        is_new = text not in self._said
        self._said.add(text)
        return is_new


SAID_ONCE = SaidOnce()
"""The one object of this process."""
