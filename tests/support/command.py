"""The command `dcp-hf` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Completed:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def dcp_hf(*arguments: str | Path, columns: int = 80, cwd: Path | None = None) -> Completed:
    """Run a command to its end."""
    command = [sys.executable, "-m", "dcp_hf_writer.cli.entry_point", *map(str, arguments)]
    env = {**os.environ, "COLUMNS": str(columns), "NO_COLOR": "1"}
    found = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=cwd, timeout=300, check=False
    )
    return Completed(found.returncode, found.stdout, found.stderr)


def answer(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """Run a command with `--json`; return its answer, which must fit the schema of the command."""
    from dcp_hf_writer.cli.json_schemas import ERROR, SCHEMAS
    from support.json_schema import schema_fault

    found = dcp_hf(*arguments, "--json")
    assert found.code == code, found.err + found.out
    assert found.err == ""
    value = json.loads(found.out)
    schema = ERROR if "error" in value else SCHEMAS[str(arguments[0])]
    assert schema_fault(value, schema) is None
    return dict(value)
