"""The table of `docs/drop-in.md`; run this file to write it, with `src` and `tests` on the path."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from support.drop_in import WAYS, outcomes_of
from support.drop_in_rows import RANK_ROWS, ROWS, WORLD_SIZE
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

# Busy machines take ten times as long as idle ones.
TIMEOUT_S = 280

Outcomes = dict[str, dict[str, str]]


def run_rows(root: Path) -> Outcomes:
    """Run all rows; return what each way of each row came to, on the ranks that differ most."""
    per_rank = run_ranks(run_on_rank, WORLD_SIZE, root / "ranks", timeout_s=TIMEOUT_S)
    found = {
        name: {way: _joined([one[name][way] for one in per_rank]) for way in WAYS}
        for name in RANK_ROWS
    }
    return found | outcomes_of(ROWS, root / "alone")


def run_on_rank(_: int, __: int, root: Path) -> Outcomes:
    """Run the rows of several ranks on one of them."""
    return outcomes_of(RANK_ROWS, root)


def _joined(said: list[str]) -> str:
    bad = [text for text in said if text not in {"equal", "ran"}]
    return bad[0] if bad else said[0]


def table(outcomes: Mapping[str, Mapping[str, str]]) -> str:
    """Make the table."""
    ways = [way for way in WAYS if way != "torch"]
    lines = [f"| program | ranks | {' | '.join(f'`{way}`' for way in ways)} |", "|---" * 5 + "|"]
    for name, each in outcomes.items():
        ranks = WORLD_SIZE if name in RANK_ROWS else 1
        # Of an error, its class: the rest names paths.
        cells = [each[way].partition(":")[0] for way in ways]
        lines.append(f"| {name} | {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def written_table() -> str:
    """Return the table that stands in the page."""
    return PAGE.read_text().split(BEGIN)[1].split(END)[0].strip()


def main() -> None:
    """Write the table anew, and print it."""
    with tempfile.TemporaryDirectory() as root:
        text = table(run_rows(Path(root)))
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
