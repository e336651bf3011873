"""Live status: what the ranks of a running save tell in files, and that nothing depends on it."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.formats.names_on_disk import HEARTBEATS_NAME
from dcp_hf_writer.manager.saves_in_flight import saves_in_flight
from dcp_hf_writer.save import commit
from dcp_hf_writer.save.progress_heartbeat import Heartbeat
from support.named_bytes import EXPORT, sharded_state
from support.ranks import run_ranks, spawn_ranks
from support.slow_saves import Gate, save_through_gate, wait_for_heartbeats

if TYPE_CHECKING:
    from pathlib import Path

ALONE = {"no_dist": True}


def all_names(root: Path) -> set[str]:
    return {path.name for path in root.rglob("*")}


def test_every_rank_tells_phase_and_bytes_while_it_writes(tmp_path: Path) -> None:
    root, gate = tmp_path / "run", Gate(tmp_path / "gate", "before fsync")
    root.mkdir()
    with spawn_ranks(save_through_gate, 2, root / "step-7", gate) as ranks:
        save = wait_for_heartbeats(root, lambda beats: [b.phase for b in beats] == ["write"] * 2)
        assert save.target == str(root / "step-7")
        assert save.state == "alive"
        for rank, beat in enumerate(save.heartbeats):
            assert (beat.rank, beat.world_size, beat.phase) == (rank, 2, "write")
            assert 0 < beat.done_nbytes == beat.planned_nbytes
            assert beat.began <= beat.news_time <= beat.time
        gate.open()
        ranks.results()
    assert saves_in_flight(str(root)) == []
    assert os.listdir(root) == ["step-7"]
    assert HEARTBEATS_NAME not in all_names(root)


def test_bytes_grow_while_a_rank_writes(tmp_path: Path) -> None:
    root, gate = tmp_path / "run", Gate(tmp_path / "gate", "mid hf")
    root.mkdir()
    with spawn_ranks(save_through_gate, 1, root / "step-1", gate) as ranks:
        (first,) = wait_for_heartbeats(root, lambda beats: len(beats) == 1).heartbeats
        gate.open(once=True)

        def has_more(beats: tuple[Heartbeat, ...]) -> bool:
            return any(beat.done_nbytes > first.done_nbytes for beat in beats)

        (more,) = wait_for_heartbeats(root, has_more).heartbeats
        assert more.phase == "write hf"
        assert first.done_nbytes < more.done_nbytes < more.planned_nbytes
        gate.open()
        ranks.results()


def test_dead_save_leaves_its_last_words_and_the_next_one_removes_them(tmp_path: Path) -> None:
    root, gate = tmp_path / "run", Gate(tmp_path / "gate", "before fsync")
    root.mkdir()
    with spawn_ranks(save_through_gate, 1, root / "step-1", gate) as ranks:
        wait_for_heartbeats(root, lambda beats: len(beats) == 1)
        ranks.kill(0)
        ranks.outcomes()
    (save,) = saves_in_flight(str(root))
    assert (save.state, len(save.heartbeats)) == ("dead", 1)
    dcp.save({"w": torch.ones(3)}, storage_writer=HFDualWriter(root / "step-2"), **ALONE)
    assert os.listdir(root) == ["step-2"]


def save_without_place(rank: int, world_size: int, root: Path) -> list[str]:
    """Save while no heartbeat can be written; return what the log says of it."""
    said: list[str] = []

    class Collects(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("dcp_hf_writer").addHandler(Collects(logging.WARNING))
    is_told = threading.Event()

    def refuse(*_: Any) -> None:
        is_told.set()
        raise PermissionError(13, "refused by the test")

    commit.replace_file = refuse
    from dcp_hf_writer import failpoints

    def wait(point: str) -> None:
        if point == "before fsync":
            assert is_told.wait(60)

    failpoints.set_hook(wait)
    writer = HFDualWriter(root / "step-1", export=EXPORT)
    dcp.save(sharded_state(1), storage_writer=writer)
    return [text for text in said if "live status" in text]


def test_save_goes_on_with_one_line_in_the_log_when_no_heartbeat_can_be_written(
    tmp_path: Path,
) -> None:
    for said in run_ranks(save_without_place, 2, tmp_path):
        (text,) = said
        assert "refused by the test" in text
    assert os.listdir(tmp_path) == ["step-1"]


def test_save_goes_on_when_the_place_of_heartbeats_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith(HEARTBEATS_NAME):
            raise OSError(28, "No space left on device")
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    writer = HFDualWriter(tmp_path / "step-1")
    dcp.save({"w": torch.ones(3)}, storage_writer=writer, **ALONE)
    assert [r.getMessage() for r in caplog.records if "live status" in r.getMessage()]
    assert os.listdir(tmp_path) == ["step-1"]


def test_thread_of_the_heartbeats_ends_with_the_save(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "step-1")
    dcp.async_save({"w": torch.ones(3)}, storage_writer=writer, **ALONE).result(60)
    until = time.monotonic() + 60
    while any(thread.name == "dcp-hf-heartbeat" for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)


BEAT = Heartbeat("id", "/run/step-1", 0, 2, "host", 7, "write hf", 5, 10, 1.0, 3.0, 2.0)


def test_heartbeat_comes_back_from_its_bytes() -> None:
    assert Heartbeat.from_bytes(BEAT.to_bytes()) == BEAT


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"rank": 0', b'"rank": "0"'),
        (b'"rank": 0', b'"rank": true'),
        (b'"rank": 0', b'"rank": -1'),
        (b'"time": 3.0', b'"time": NaN'),
        (b'"version": 1', b'"version": 2'),
        (b'"host": "host", ', b""),
        (b"}", b""),
        (b"{", b"[{"),
        (b"{", b"[" * 100_000 + b"{"),
    ],
)
def test_damaged_heartbeat_is_no_heartbeat(old: bytes, new: bytes) -> None:
    data = BEAT.to_bytes()
    assert old in data
    assert Heartbeat.from_bytes(data.replace(old, new)) is None
