"""The folders of the package, leaves first: the one list that the architecture is checked against.

Run as a script, it writes the table of folders into `docs/design.md`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dcp_hf_writer"
DESIGN = ROOT / "docs" / "design.md"

LEAVES = ("errors", "excerpts", "failpoints", "said_once")
"""Modules at the top that every other may import; they import none."""

FOLDERS = (
    *("tensors", "mapping", "formats", "storage", "plan", "digests", "torch_seam", "staging"),
    *("save", "preflight", "load", "stream", "check", "manager", "integrations"),
    *("convert", "cli"),
)
"""A module may import from its own folder and from those before it."""

ENTRIES = ("writer", "reader", "hf_loader", "run_writers", "checkpoint_manager")
"""Modules at the top that may import from every folder; only the package imports them."""

PURE = ("tensors", "mapping", "formats", "plan")
"""Folders whose modules touch no file, no process and no other rank."""

BEGIN, END = "<!-- folders: begin -->", "<!-- folders: end -->"


def table() -> str:
    """Make the table of folders from the docstrings of their `__init__`."""
    rows = ["| folder | owns | rule |", "|---|---|---|"]
    rows.append(f"| (top) | {_names(LEAVES)}: what every module may import | they import nothing |")
    for name in FOLDERS:
        tree = ast.parse((SOURCE / name / "__init__.py").read_text())
        owns, _, rule = (ast.get_docstring(tree) or "").partition("\n\n")
        rows.append(f"| `{name}/` | {owns} | {' '.join(rule.split())} |")
    rows.append(f"| (top) | {_names(ENTRIES)}: the entry points | they wire, and decide nothing |")
    return "\n".join(rows)


def written_table() -> str:
    """Return the table that stands in the design document."""
    return DESIGN.read_text().split(BEGIN)[1].split(END)[0].strip()


def _names(modules: tuple[str, ...]) -> str:
    return ", ".join(f"`{module}`" for module in modules)


def main() -> None:
    """Write the table anew."""
    before, rest = DESIGN.read_text().split(BEGIN)
    after = rest.split(END)[1]
    DESIGN.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
    sys.stdout.write(table() + "\n")


if __name__ == "__main__":
    main()
