"""Run one command: its result as a table or as JSON, its errors as text, its exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dcp_hf_writer.cli import exit_codes
from dcp_hf_writer.cli.plain_text import printable
from dcp_hf_writer.errors import FACTS, CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_Answer = TypeVar("_Answer")

_WIDTH_OF_PIPE = 160
"""Columns of tables that do not go to a terminal; a log must not cut names at 80."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command found."""

    value: dict[str, Any]
    """The answer as JSON values; `json_schemas` describes it."""
    code: int = exit_codes.OK
    """Exit code."""


def run(
    name: str,
    work: Callable[[], Outcome],
    show: Callable[[Any, Console], None],
    *,
    as_json: bool,
    debug: bool,
) -> NoReturn:
    """Do the work of a command, print the answer, and exit.

    Args:
        name: Name of the command.
        work: Finds the answer.
        show: Prints the value of the answer for people.
        as_json: Print the value itself, as one JSON object on stdout.
        debug: Show the traceback of an error.

    Raises:
        typer.Exit: Always, with the exit code.
    """
    outcome = _done(name, work, as_json=as_json, debug=debug)
    if as_json:
        _print_json({"command": name, "version": 1, **outcome.value})
    else:
        show(outcome.value, screen())
    raise typer.Exit(outcome.code)


def run_updates(name: str, work: Callable[[], int], *, as_json: bool, debug: bool) -> NoReturn:
    """Run a command that prints its answers itself while it works, and exit.

    Args:
        name: Name of the command.
        work: Prints the answers; returns the exit code.
        as_json: Print an error as JSON.
        debug: Show the traceback of an error.

    Raises:
        typer.Exit: Always, with the exit code.
    """
    raise typer.Exit(_done(name, work, as_json=as_json, debug=debug))


def _done(name: str, work: Callable[[], _Answer], *, as_json: bool, debug: bool) -> _Answer:
    try:
        return work()
    except KeyboardInterrupt:
        raise typer.Exit(exit_codes.INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001 - the command ends here, whatever it is
        if debug:
            traceback.print_exc()
        _print_error(name, error, as_json=as_json)
        raise typer.Exit(_code_of(error)) from None


def screen() -> Console:
    """Return the console on stdout; text from storage is never markup."""
    is_fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if is_fixed else _WIDTH_OF_PIPE
    return Console(width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """Return an empty table. Columns in `numbers` are right-aligned and never broken.

    The last column takes what width is left, and breaks long names instead of cutting them.
    """
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        is_number = column in numbers
        made.add_column(
            column,
            justify="right" if is_number else "left",
            no_wrap=is_number,
            min_width=max(map(len, column.split()), default=0),
            overflow="fold",
        )
    return made


def print_table(console: Console, made: Table) -> None:
    """Print a table without cutting a number, however narrow the terminal is.

    If the table is too wide, the heads of its numbers take several lines. If that is not enough,
    its lines are longer than those of the terminal.
    """
    if console.measure(made).maximum >= console.width:
        for column in made.columns:
            if column.no_wrap:
                column.header = str(column.header).replace(" ", "\n")
    console.print(made, crop=False)


def row(into: Table, *cells: object, style: str = "") -> None:
    """Add a row; text from storage cannot control the terminal."""
    texts = [Text(printable(str(cell)), style=style) for cell in cells]
    for column, text in zip(into.columns, texts, strict=True):
        if column.no_wrap:
            column.min_width = max(column.min_width or 0, text.cell_len)
    into.add_row(*texts)


def line(console: Console, text: str, style: str = "") -> None:
    """Print a line of text."""
    console.print(Text(printable(text), style=style), soft_wrap=True)


def line_of_rest(console: Console, found: Sequence[object], shown: int, what: str) -> None:
    """Print how many of `found` a table of the first `shown` leaves out, if any."""
    if len(found) > shown:
        line(console, f"... and {len(found) - shown} more {what}; --json lists all")


def print_json_line(value: dict[str, Any]) -> None:
    """Print a value as one line of JSON, at once also into a pipe."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _print_error(name: str, error: Exception, *, as_json: bool) -> None:
    if as_json:
        facts = {
            fact: None if (found := getattr(error, fact, None)) is None else str(found)
            for fact in FACTS
        }
        problem = error.problem if isinstance(error, CheckpointError) else str(error)
        what = {"type": type(error).__name__, "problem": problem, **facts}
        _print_json({"command": name, "version": 1, "error": what})
        return
    text = str(error)
    if not isinstance(error, (CheckpointError, OSError)):
        text = f"{type(error).__name__}: {text}; --debug shows where"
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    console.print(
        Text(f"dcp-hf {name}: ", style="bold red") + Text(printable(text)), soft_wrap=True
    )


def _code_of(error: Exception) -> int:
    if isinstance(error, ConfigError):
        return exit_codes.WRONG_USE
    if isinstance(error, (CheckpointError, OSError)):
        return exit_codes.FAILED
    return exit_codes.BUG
