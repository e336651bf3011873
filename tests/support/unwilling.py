"""An asset of an export that cannot be saved."""

from __future__ import annotations


class Unwilling:
    """Stands for a tokenizer whose `save_pretrained` fails."""

    def save_pretrained(self, directory: str) -> None:
        """Refuse."""
        msg = "no vocabulary"
        raise ValueError(msg, directory)
