"""The page `docs/cli.md` and the commands: neither has options or commands that the other lacks."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from dcp_hf_writer.cli import exit_codes
from dcp_hf_writer.cli.app import app
from dcp_hf_writer.cli.json_schemas import SCHEMAS

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def commands() -> dict[str, set[str]]:
    """Return the options of each command."""
    found = {}
    for name, command in get_command(app).commands.items():
        options = {one for parameter in command.params for one in parameter.opts}
        found[name] = {one for one in options if one.startswith("--")}
    return found


def test_page_shows_every_command_and_option_and_no_other() -> None:
    options = set().union(*commands().values(), {"--version"}) - {"--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--help"} == options
    assert set(re.findall(r"dcp-hf ([a-z]+)", PAGE)) - {"schema"} <= commands().keys()
    for name in commands():
        assert re.search(rf"dcp-hf {name}\b|`{name}`", PAGE), name


def test_every_command_but_schema_has_json_with_a_schema() -> None:
    with_json = {name for name, options in commands().items() if "--json" in options}
    assert with_json == SCHEMAS.keys() == commands().keys() - {"schema"}
    assert all("--debug" in options for options in commands().values())


def test_page_lists_the_exit_codes() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert listed == {value for name, value in vars(exit_codes).items() if name.isupper()}
