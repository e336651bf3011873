"""Commands read a run behind a URL, and change it: `ls`, `latest`, `verify`, `gc`, `pin`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.cli.app import app
from dcp_hf_writer.cli.json_schemas import SCHEMAS
from dcp_hf_writer.save.owner_process import Owner
from dcp_hf_writer.save.store_record import StoreRecord
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


def test_pin_and_unpin_work_on_a_url(copied: str) -> None:
    assert answer("pin", copied, "3")["is_pinned"] is True
    pinned = [one["step"] for one in answer("ls", copied)["steps"] if one["is_pinned"]]
    assert pinned == [2, 3]
    assert answer("unpin", copied, "3")["is_pinned"] is False
    code, printed = invoke("pin", copied, "99")
    assert code == 2
    assert f"{ROOT}/step-99" in printed


def test_gc_of_a_url_deletes_what_the_limits_give_up(tmp_path: Path) -> None:
    root = f"memory://gc{tmp_path}/run"
    memory = fsspec.filesystem("memory")
    state = {"model": {"w": torch.ones(4)}}
    for step in (1, 2, 3):
        dcp.save(state, storage_writer=HFDualWriter(f"{root}/step-{step}"), no_dist=True)
    dead = StoreRecord(
        "20200101T000000-00000000-1-x", f"{root}/step-9", Owner.me(), 1, ("hf/a.safetensors",)
    )
    memory.pipe_file(f"{root}/step-9/.dcp-hf-save.json", dead.encode())
    memory.pipe_file(f"{root}/step-9/hf/a.safetensors", b"left")
    memory.pipe_file(f"{root}/step-9/mine.txt", b"another's")
    planned = answer("gc", root, "--keep-last", "1", "--dry-run")
    assert (planned["steps"], planned["remaining"]) == ([1, 2], [])
    assert [(one["name"], one["state"]) for one in planned["leftovers"]] == [("step-9", "dead")]
    assert [one["step"] for one in answer("ls", root)["steps"]] == [1, 2, 3, 9]
    done = answer("gc", root, "--keep-last", "1")
    assert (done["steps"], done["remaining"]) == ([1, 2], [])
    assert done["nbytes"] == planned["nbytes"] > 0
    assert answer("latest", root)["step"] == 3
    below = root.partition("://")[2]
    left = [name.partition(below)[2] for name in memory.find(f"/{below}")]
    assert {name.split("/")[1] for name in left} == {"step-3", "step-9"}
    assert "/step-9/mine.txt" in left
    assert not [name for name in left if "step-9/hf" in name or name.endswith("save.json")]


@pytest.mark.parametrize("url", ["memory://nothing/here", "nonsense://a/b"])
def test_url_without_a_run_is_an_error(url: str) -> None:
    for command in ("ls", "latest"):
        code, printed = invoke(command, url)
        assert code in {2, 3}
        assert url.partition("://")[2] in printed
