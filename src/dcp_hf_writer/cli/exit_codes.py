"""The exit codes of `dcp-hf`, which scripts may rely on."""

from __future__ import annotations

from typing import Final

OK: Final = 0
"""The command did what it was asked to do, and found no problem."""
PROBLEM: Final = 1
"""The check found a problem: damage, a difference, no checkpoint."""
WRONG_USE: Final = 2
"""An argument or option cannot be used as given; nothing was done."""
FAILED: Final = 3
"""The command could not do its work: the storage refused, or a checkpoint is damaged."""
BUG: Final = 70
"""An error that the command does not expect; `--debug` shows where (EX_SOFTWARE of sysexits)."""
INTERRUPTED: Final = 130
"""Ctrl-C."""
