"""Heartbeats of saves to stores: seen while a save runs, gone when it is over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer import failpoints
from dcp_hf_writer.formats.names_on_disk import HEARTBEATS_NAME
from dcp_hf_writer.manager.saves_on_store import SavesOnStore
from dcp_hf_writer.manager.watch_saves import SaveWatch
from support import shared_store
from support.ranks import run_ranks, spawn_ranks
from support.slow_saves import LIMIT_S, Gate
from support.store_saves import Store, save_step

if TYPE_CHECKING:
    from pathlib import Path

    from dcp_hf_writer.manager.saves_in_flight import SaveInFlight


def save_through_gate(rank: int, world_size: int, store: Store, gate: Gate) -> str | None:
    shared_store.register()
    failpoints.set_hook(lambda reached: gate.wait() if reached == gate.point else None)
    return save_step(store, "step-1", 1, timeout_s=60)


def save_again(rank: int, world_size: int, store: Store) -> str | None:
    return save_step(store, "step-1", 2)


def wait_for_ranks(source: SavesOnStore, count: int) -> SaveInFlight:
    """Wait until so many ranks of the only save have told something."""
    until = time.monotonic() + LIMIT_S
    while True:
        for save in source.in_flight():
            if len(save.heartbeats) == count:
                return save
        assert time.monotonic() < until, "no such heartbeats came"
        time.sleep(0.1)


def live_objects(store: Store) -> list[str]:
    return [name for name in store.files("step-1") if name.startswith(HEARTBEATS_NAME)]


@pytest.mark.timeout(180)
def test_watch_follows_a_save_to_a_store_and_nothing_of_it_stays(tmp_path: Path) -> None:
    store = Store.shared(tmp_path / "store")
    gate = Gate(tmp_path / "gate", "before fsync")
    watch = SaveWatch(store.url, target=None, late_s=60)
    with spawn_ranks(save_through_gate, 2, store, gate, timeout_s=120) as handle:
        save = wait_for_ranks(SavesOnStore(store.url), 2)
        assert save.target == store.at("step-1")
        assert [beat.rank for beat in save.heartbeats] == [0, 1]
        assert all(beat.planned_nbytes > 0 for beat in save.heartbeats)
        # The URL of the checkpoint will do, too.
        (alone,) = SavesOnStore(store.at("step-1")).in_flight()
        assert (alone.save_id, alone.target) == (save.save_id, save.target)
        look = watch.look()
        assert [one.save.save_id for one in look.saves] == [save.save_id]
        gate.open()
        assert [one.value for one in handle.outcomes()] == [None, None]
    (ended,) = watch.look().ended
    assert ended.outcome == "published"
    assert live_objects(store) == []


@pytest.mark.timeout(180)
def test_heartbeats_of_a_killed_save_go_with_its_other_objects(tmp_path: Path) -> None:
    store = Store.shared(tmp_path / "store")
    gate = Gate(tmp_path / "gate", "before fsync")
    with spawn_ranks(save_through_gate, 2, store, gate, timeout_s=120) as handle:
        wait_for_ranks(SavesOnStore(store.url), 2)
        for rank in range(2):
            handle.kill(rank)
        handle.outcomes()
    assert len(live_objects(store)) == 2
    assert run_ranks(save_again, 2, store) == [None, None]
    assert live_objects(store) == []
