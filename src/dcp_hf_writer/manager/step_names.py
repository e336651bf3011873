"""Names of the step directories of a run. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dcp_hf_writer.errors import ConfigError

LATEST = "latest"
"""Name of the link to the newest checkpoint."""
HF_LATEST = "hf-latest"
"""Name of the link to the newest export."""
DELETED_PREFIX = ".deleted-"
"""Prefix of what is being deleted. It holds no step number: trainers search names for one."""
NOTES = ".dcp-hf-manager"
"""Directory of a run with what the manager notes beside the checkpoints."""
SNAPSHOT_PREFIX = "snapshot-"
"""Prefix of the snapshot slot."""

_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9_.]*[-_]")


@dataclass(frozen=True, slots=True)
class StepNames:
    """How a run names the directories of its steps: a prefix and the number, `step-100`."""

    prefix: str = "step-"
    """What comes before the number; ends with `-` or `_`."""

    def __post_init__(self) -> None:
        """Check the prefix."""
        if not _PREFIX.fullmatch(self.prefix) or self.prefix == SNAPSHOT_PREFIX:
            raise ConfigError(
                "the prefix of step directories cannot be used",
                expected="letters and digits that end with '-' or '_', such as 'step-'",
                found=repr(self.prefix),
            )

    def name_of(self, step: int) -> str:
        """Return the name of the directory of a step."""
        return f"{self.prefix}{step}"

    def step_of(self, name: str) -> int | None:
        """Return the step that a directory is named for; `None` if it is no step directory."""
        return _number_after(self.prefix, name)

    def snapshot_name_of(self, step: int) -> str:
        """Return the name of the directory of a snapshot."""
        return f"{SNAPSHOT_PREFIX}{step}"

    def snapshot_step_of(self, name: str) -> int | None:
        """Return the step of a snapshot; `None` if the directory is no snapshot."""
        return _number_after(SNAPSHOT_PREFIX, name)


def _number_after(prefix: str, name: str) -> int | None:
    digits = name.removeprefix(prefix)
    if digits == name or not digits.isascii() or not digits.isdigit():
        return None
    # A name such as "step-007" is not ours: two names for one step would be ambiguous.
    return int(digits) if str(int(digits)) == digits else None
