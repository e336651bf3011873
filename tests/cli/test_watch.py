"""`watch`: the real command looks at real saves on real ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer.cli.json_schemas import SCHEMAS
from dcp_hf_writer.cli.watch_command import watch
from dcp_hf_writer.errors import ConfigError
from support.json_schema import schema_fault
from support.ranks import spawn_ranks
from support.slow_saves import Gate, save_through_gate, wait_for_heartbeats

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Some tests start several processes that import torch.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


@contextmanager
def watching(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Run `dcp-hf watch` beside the test, which reads what it prints."""
    command = [sys.executable, "-m", "dcp_hf_writer.cli.entry_point", "watch"]
    env = {**os.environ, "NO_COLOR": "1"}
    with subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def updates(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for text in process.stdout:
        value = json.loads(text)
        assert schema_fault(value, SCHEMAS["watch"]) is None
        yield value


def look(path: str | Path, *, as_json: bool = False) -> int:
    """Run the command in this process."""
    return watch(str(path), is_following=False, every_s=0.1, late_s=10, as_json=as_json)


def test_updates_tell_phase_bytes_and_the_late_rank_and_end_with_the_save(
    root: Path, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate", "before fsync", only=1)
    with (
        spawn_ranks(save_through_gate, 2, root / "step-7", gate) as ranks,
        watching(root, "--json", "--every", "0.2", "--late", "0.5", "--follow") as process,
    ):
        for update in updates(process):
            (save,) = update["saves"] or ({"ranks": []},)
            late = {rank["rank"]: rank["late"] for rank in save["ranks"] if rank["late"]}
            # Between two heartbeats, which come once a second, it may be late for want of news.
            is_stuck = list(late) == [1] and late[1].startswith("no progress")
            if len(save["ranks"]) == 2 and is_stuck and save["ranks"][0]["phase"] == "written":
                break
        assert save["path"] == f"{root}/step-7"
        assert (save["state"], save["phase"], save["world_size"]) == ("alive", "write", 2)
        assert save["done_nbytes"] == save["planned_nbytes"] > 0
        assert save["ranks"][1]["late"].startswith("no progress for")
        gate.open()
        ended = next(update["ended"] for update in updates(process) if update["ended"])
        ranks.results()
    (one,) = ended
    assert (one["outcome"], one["path"]) == ("published", f"{root}/step-7")
    assert one["has_export"]
    manifest = json.loads((root / "step-7" / "dcp-hf.json").read_text())
    assert one["nbytes"] == sum(manifest["nbytes"].values())
    assert one["seconds"] == round(manifest["timings"]["coordinator"]["total"], 3)


def test_pipe_gets_a_line_for_each_change_and_the_command_ends_with_the_save(
    root: Path, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "gate", "before fsync")
    with spawn_ranks(save_through_gate, 1, root / "step-7", gate) as ranks:
        wait_for_heartbeats(root, lambda beats: [b.phase for b in beats] == ["write"])
        with watching(root / "step-7", "--every", "0.2") as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            gate.open()
            rest = process.stdout.read().splitlines()
            assert process.wait(60) == 0
        ranks.results()
    assert first.startswith("step-7  write  ")
    assert "(100 %)" in first
    assert first.endswith("  1 rank\n")
    assert rest[-1].startswith(f"published {root}/step-7: ")


def test_dead_save_ends_the_watch_with_exit_code_1(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate(tmp_path / "gate", "before fsync")
    with spawn_ranks(save_through_gate, 1, root / "step-7", gate) as ranks:
        wait_for_heartbeats(root, lambda beats: len(beats) == 1)
        pid = ranks.pids[0]
        ranks.kill(0)
        ranks.outcomes()
    assert look(root) == 1
    text = capsys.readouterr().out
    assert text.startswith("dead step-7: nobody works on it any more")
    assert f"process {pid} on " in text


def test_nothing_in_flight_is_said_and_is_no_error(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert look(root) == 0
    text = f"no save is in flight in {root}; --follow waits for one\n"
    assert capsys.readouterr().out == text
    assert look(root, as_json=True) == 0
    (update,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert update["saves"] == update["ended"] == []


def test_wrong_places_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="no save to this path is in flight"):
        look(root / "nowhere")
    with pytest.raises(ConfigError, match="no file system is known"):
        look("nowhere://bucket/run")
