"""One entry of a report on a damaged checkpoint.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dcp_hf_writer.formats.strict_json import shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcp_hf_writer.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with a checkpoint, and where."""

    file: str
    """Path within the checkpoint; `""` for the checkpoint as a whole."""
    what: str
    """What is wrong, in one clause."""
    key: str | None = None
    """HuggingFace name of the tensor concerned."""
    fqn: str | None = None
    """FQN of the tensor concerned."""
    start: int | None = None
    """Offset of the first byte concerned, from the start of the file."""
    stop: int | None = None
    """One past the last byte concerned."""
    rank: int | None = None
    """Rank that wrote the bytes."""
    expected: str | None = None
    """What should have been there."""
    found: str | None = None
    """What was there."""
    hint: str | None = None
    """What the caller can do."""

    @classmethod
    def of(cls, error: CheckpointError, file: str) -> Problem:
        """Turn an error about a file into a problem."""
        return cls(
            file=file,
            what=error.problem,
            key=error.key,
            fqn=error.fqn,
            expected=None if error.expected is None else str(error.expected),
            found=None if error.found is None else str(error.found),
            hint=error.hint,
        )

    def below(self, directory: str) -> Problem:
        """Return the problem with `directory` put in front of its file."""
        if not directory:
            return self
        return replace(self, file=f"{directory}/{self.file}" if self.file else directory)

    def __str__(self) -> str:
        subjects = [
            shortened(self.file).strip("'") or "checkpoint",
            "" if self.key is None else f"key {shortened(self.key)}",
            "" if self.fqn is None else f"tensor {shortened(self.fqn)}",
            "" if self.start is None else f"bytes {self.start} to {self.stop}",
            "" if self.rank is None else f"written by rank {self.rank}",
        ]
        text = f"{', '.join(filter(None, subjects))}: {self.what}"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.found is not None:
            text += f"; found {self.found}"
        return text + (f"; {self.hint}" if self.hint else "")


def first_of(problems: Sequence[Problem]) -> str:
    """Return the first problem as text, with the number of the others."""
    others = len(problems) - 1
    return str(problems[0]) + (f" (and {others} more problems)" if others else "")
