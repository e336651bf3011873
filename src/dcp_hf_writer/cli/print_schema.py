"""`schema`: print the JSON schema of the answer of a command."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.cli.json_schemas import ERROR, SCHEMAS
from dcp_hf_writer.cli.run_command import Outcome
from dcp_hf_writer.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def find(name: str) -> Outcome:
    """Return the schema of a command, or of its errors.

    Raises:
        ConfigError: If no command has this name.
    """
    known = {**SCHEMAS, "error": ERROR}
    if name not in known:
        msg = "no command with --json has this name"
        raise ConfigError(msg, expected=", ".join(known), found=repr(name))
    return Outcome(known[name])


def show(value: dict[str, Any], console: Console) -> None:
    """Print the schema as it is."""
    console.out(json.dumps(value, indent=2), highlight=False)
