"""`ls`, `latest` and `verify` read a run behind a URL; commands that change one refuse it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
from typer.testing import CliRunner

from dcp_hf_writer.cli.app import app
from dcp_hf_writer.cli.json_schemas import SCHEMAS
from support.json_schema import schema_fault

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROOT = "memory://bucket/run"


@pytest.fixture(scope="module")
def copied(run: Path) -> Iterator[str]:
    """Copy the run to the memory of this process, as `rclone` would copy it to a store."""
    memory = fsspec.filesystem("memory")
    for path in run.rglob("*"):
        if path.is_file() and not path.is_symlink():
            memory.pipe_file(f"/bucket/run/{path.relative_to(run)}", path.read_bytes())
    memory.pipe_file("/bucket/run/.incomplete-x/file", b"1")
    yield ROOT
    memory.rm("/bucket", recursive=True)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def answer(*arguments: str) -> dict[str, Any]:
    code, printed = invoke(*arguments, "--json")
    assert code == 0, printed
    value = json.loads(printed)
    assert schema_fault(value, SCHEMAS[arguments[0]]) is None
    return dict(value)


def test_ls_of_a_url_says_what_it_says_of_the_directory(copied: str, run: Path) -> None:
    found, local = answer("ls", copied), answer("ls", str(run))
    assert found["latest"] == local["latest"] == 4
    assert found["leftovers"] == [".incomplete-x"]
    for one, other in zip(found["steps"], local["steps"], strict=True):
        assert one["path"] == f"{ROOT}/step-{one['step']}"
        assert one["age_s"] is None
        same = one.keys() - {"path", "age_s"}
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
    assert [one["step"] for one in found["steps"] if one["is_pinned"]] == [2]
    code, printed = invoke("ls", f"{copied}/")
    assert code == 0
    assert "unverified" in printed


def test_latest_of_a_url_is_a_path_that_other_commands_take(copied: str) -> None:
    code, printed = invoke("latest", copied)
    assert (code, printed) == (0, f"{ROOT}/step-4\n")
    assert invoke("inspect", printed.strip())[0] == 0


def test_latest_passes_over_a_damaged_step(copied: str) -> None:
    memory = fsspec.filesystem("memory")
    whole = memory.cat_file("/bucket/run/step-4/.metadata")
    memory.pipe_file("/bucket/run/step-4/.metadata", whole[:-10])
    try:
        assert answer("latest", copied)["step"] == 3
    finally:
        memory.pipe_file("/bucket/run/step-4/.metadata", whole)


def test_latest_finds_metadata_that_was_changed_in_place(copied: str) -> None:
    memory = fsspec.filesystem("memory")
    place = "/bucket/run/step-3/.metadata"
    whole = memory.cat_file(place)
    memory.pipe_file(place, whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    try:
        step = answer("ls", copied)["steps"][2]
    finally:
        memory.pipe_file(place, whole)
    assert (step["step"], step["state"]) == (3, "incomplete")
    assert "digest" in step["problem"]


def test_verify_of_a_url_checks_every_step(copied: str, run: Path) -> None:
    code, printed = invoke("verify", copied, "--json")
    _, of_directory = invoke("verify", str(run), "--json")
    found, local = json.loads(printed)["checkpoints"], json.loads(of_directory)["checkpoints"]
    assert code == 1
    assert [(one["ok"], one["checked"]) for one in found] == [
        (one["ok"], one["checked"]) for one in local
    ]
    assert found[0]["path"] == f"{ROOT}/step-1"


@pytest.mark.parametrize("command", [("gc",), ("pin", "1"), ("unpin", "1")], ids=lambda c: c[0])
def test_command_that_changes_a_run_refuses_a_url(copied: str, command: tuple[str, ...]) -> None:
    name, *rest = command
    code, printed = invoke(name, copied, *rest)
    assert code == 2
    assert "does not work on URLs" in printed
    assert "ls, latest and verify read URLs" in printed


@pytest.mark.parametrize("url", ["memory://nothing/here", "nonsense://a/b"])
def test_url_without_a_run_is_an_error(url: str) -> None:
    for command in ("ls", "latest"):
        code, printed = invoke(command, url)
        assert code in {2, 3}
        assert url.partition("://")[2] in printed
