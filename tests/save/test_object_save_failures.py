"""Saves to object stores that fail, are killed, or meet others: what is left, and what comes next.

Nothing but a prefix with a manifest is a checkpoint, no upload stays open, and the next save of the
same step needs no help.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, verify
from dcp_hf_writer.errors import ConfigError, ExportError
from dcp_hf_writer.save.owner_process import Owner
from dcp_hf_writer.save.store_record import StoreRecord
from dcp_hf_writer.storage.fsspec_store import FsspecStore
from support import shared_store
from support.faults import Strike
from support.ranks import run_ranks, spawn_ranks
from support.store_saves import CONFIG, Store, save_step

if TYPE_CHECKING:
    from support.s3_servers import S3Server

RECORD = ".dcp-hf-save.json"
MANIFEST = "dcp-hf.json"
DIGESTS_FILE = "dcp-hf/digests-00000.safetensors"

OF_THE_COORDINATOR = ("directory made", "headers written", "before manifest", "before rename")
OF_EVERY_RANK = ("local plan", "mid dcp", "before fsync", "after fsync", "before report")
STRIKES = [
    *(Strike(rank=0, point=point, action="raise") for point in OF_THE_COORDINATOR + OF_EVERY_RANK),
    *(Strike(rank=1, point=point, action="raise") for point in OF_EVERY_RANK),
]


def fail_each(
    rank: int, world_size: int, store: Store, root: Path, strikes: list[Strike]
) -> list[tuple[str | None, list[str]]]:
    """Save once for each strike; return the error, and what rank 0 then finds."""
    found = []
    for number, strike in enumerate(strikes):
        with strike.installed(rank, root):
            error = save_step(store, f"step-{number}", 1)
        found.append((error, sorted(store.files(f"step-{number}")) if rank == 0 else []))
    return found


def save_each(rank: int, world_size: int, store: Store, count: int) -> list[str | None]:
    return [save_step(store, f"step-{number}", 2) for number in range(count)]


def check_good(store: Store, name: str, step: int) -> None:
    report = verify(store.at(name), storage_options=dict(store.storage_options))
    assert report.ok, str(report)
    files = store.files(name)
    assert RECORD not in files
    assert json.loads(files[MANIFEST])["target"] == store.at(name)
    assert files["hf/config.json"] == CONFIG
    state: dict[str, Any] = {"step": 0}
    reader = HFDualReader(store.at(name), storage_options=dict(store.storage_options) or None)
    dcp.load(state, storage_reader=reader)
    assert state["step"] == step


@pytest.mark.timeout(240)
def test_failed_save_leaves_its_record_only_and_the_next_one_succeeds(tmp_path: Path) -> None:
    store = Store.shared(tmp_path / "store")
    results = run_ranks(fail_each, 2, store, tmp_path, STRIKES, timeout_s=200)
    for number, strike in enumerate(STRIKES):
        errors = [of_rank[number][0] for of_rank in results]
        assert all(errors), (strike, errors)
        left = results[0][number][1]
        assert left in ([], [RECORD]), (strike, left)
    assert run_ranks(save_each, 3, store, len(STRIKES)) == [[None] * len(STRIKES)] * 3
    check_good(store, "step-0", 2)
    check_good(store, f"step-{len(STRIKES) - 1}", 2)


def test_failed_save_leaves_no_upload_on_s3(tmp_path: Path, moto: S3Server) -> None:
    bucket = moto.new_bucket()
    store = Store.of_bucket(bucket)
    strikes = [
        Strike(rank=0, point="headers written", action="raise"),
        Strike(rank=1, point="before fsync", action="raise"),
        Strike(rank=0, point="before rename", action="raise"),
    ]
    results = run_ranks(fail_each, 2, store, tmp_path, strikes, timeout_s=120)
    for number, strike in enumerate(strikes):
        assert all(of_rank[number][0] for of_rank in results), strike
        assert results[0][number][1] in ([], [RECORD]), strike
    assert bucket.open_uploads() == []
    assert run_ranks(save_each, 2, store, len(strikes)) == [[None] * len(strikes)] * 2
    assert bucket.open_uploads() == []
    check_good(store, "step-2", 2)


@dataclass(frozen=True)
class Kill:
    """Which rank is killed, and where."""

    rank: int
    point: str

    def strike(self) -> Strike:
        return Strike(rank=self.rank, point=self.point, action="kill")


KILLS = [
    *(Kill(0, point) for point in ("headers written", "before report", "before rename")),
    Kill(0, "after rename"),
    Kill(1, "mid dcp"),
    Kill(1, "before report"),
]


def save_and_die(rank: int, world_size: int, store: Store, root: Path, kill: Kill) -> str | None:
    with kill.strike().installed(rank, root):
        return save_step(store, "step-1", 1, timeout_s=12)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["generic", "moto"])
@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill.point}-{kill.rank}")
def test_next_save_succeeds_when_a_rank_was_killed(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, kill: Kill
) -> None:
    bucket = None if kind == "generic" else request.getfixturevalue(kind).new_bucket()
    store = Store.shared(tmp_path / "store") if bucket is None else Store.of_bucket(bucket)
    with spawn_ranks(save_and_die, 2, store, tmp_path, kill, timeout_s=90) as handle:
        outcomes = handle.outcomes()
    assert outcomes[kill.rank].exitcode == -signal.SIGKILL
    files = store.files("step-1")
    if kill.point == "after rename":
        check_published(store, files)
        return
    assert outcomes[1 - kill.rank].value is not None
    assert MANIFEST not in files
    assert run_ranks(save_one, 3, store) == [None] * 3
    check_good(store, "step-1", 2)
    assert not [name for name in store.files("step-1") if "upload" in name]
    if bucket is not None:
        assert bucket.open_uploads() == []


def check_published(store: Store, files: dict[str, bytes]) -> None:
    """A save whose coordinator died after the manifest: a checkpoint, and its record."""
    assert MANIFEST in files
    assert RECORD in files
    assert verify(store.at("step-1"), storage_options=dict(store.storage_options)).ok


def save_one(rank: int, world_size: int, store: Store) -> str | None:
    return save_step(store, "step-1", 2)


# What is there already


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.shared(tmp_path / "store")


def put(store: Store, key: str, data: bytes = b"x") -> None:
    fs = shared_store.SharedDirectory()
    fs.pipe_file(f"{store.at('step-1')}/{key}", data)


def test_checkpoint_is_not_replaced(store: Store) -> None:
    assert save_step(store, "step-1", 1) is None
    before = store.files("step-1")
    error = save_step(store, "step-1", 2)
    assert error is not None
    assert error.startswith("TargetExistsError")
    assert store.files("step-1") == before


@pytest.mark.parametrize("key", ["hf/config.json", "__0_0.distcp", RECORD, ".metadata"])
def test_object_of_others_with_a_key_of_ours_is_an_error(store: Store, key: str) -> None:
    put(store, key)
    error = save_step(store, "step-1", 1)
    assert error is not None
    assert error.startswith("TargetExistsError")
    assert store.files("step-1") == {key: b"x"}


def test_objects_of_others_stay(store: Store) -> None:
    put(store, "notes.txt")
    put(store, "hf/README.md")
    assert save_step(store, "step-1", 1) is None
    assert {"notes.txt", "hf/README.md"} < set(store.files("step-1"))


def record_of(owner: Owner, *files: str) -> StoreRecord:
    return StoreRecord("20260101T000000-x-1-y", "shareddir:///x", owner, 2, files)


def test_save_of_a_live_process_is_left_alone(store: Store) -> None:
    parent = os.getppid()
    alive = Owner.me()
    started = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    owner = Owner(alive.host, alive.boot_id, alive.pid_namespace, parent, started)
    put(store, RECORD, record_of(owner).encode())
    error = save_step(store, "step-1", 1)
    assert error is not None
    assert "another save is writing to this target" in error


def test_leftovers_of_a_dead_save_are_removed_and_nothing_else(store: Store) -> None:
    gone = Owner.me()
    dead = Owner(gone.host, gone.boot_id, gone.pid_namespace, 2**22 - 1, 1)
    put(store, RECORD, record_of(dead, "hf/old.safetensors").encode())
    for key in ("hf/old.safetensors", "__1_0.distcp", ".metadata", "mine.txt"):
        put(store, key)
    assert save_step(store, "step-1", 1) is None
    files = store.files("step-1")
    assert files["mine.txt"] == b"x"
    assert {"hf/old.safetensors", "__1_0.distcp", RECORD}.isdisjoint(files)
    check_good(store, "step-1", 1)


def test_save_gives_up_when_a_newer_one_has_taken_the_prefix(store: Store, tmp_path: Path) -> None:
    newer = record_of(Owner.me())
    strike = Strike(
        rank=0,
        point="before manifest",
        action="call",
        call=lambda _: put(store, RECORD, newer.encode()),
    )
    with strike.installed(0, tmp_path):
        error = save_step(store, "step-1", 1)
    assert error is not None
    assert "a newer save has taken the target over" in error
    files = store.files("step-1")
    assert MANIFEST not in files
    # What is there belongs to the newer save, which cleans it up.
    assert files[RECORD] == newer.encode()


# A failed export


def break_parts(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """Let the store refuse parts of some keys."""
    send = FsspecStore.send_part

    def sent(self: FsspecStore, upload: Any, *args: Any, **options: Any) -> Any:
        if upload.key.endswith(suffix):
            raise self._error("the store refused a request", upload.key, "injected")
        return send(self, upload, *args, **options)

    monkeypatch.setattr(FsspecStore, "send_part", sent)


@pytest.mark.parametrize("suffix", ["model.safetensors", "config.json"])
def test_failed_export_does_not_cost_the_dcp_half(
    store: Store, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    break_parts(monkeypatch, suffix)
    error = save_step(store, "step-1", 1)
    assert error is not None
    assert error.startswith(ExportError.__name__)
    files = store.files("step-1")
    assert sorted(files) == [
        ".metadata",
        "__0_0.distcp",
        MANIFEST,
        "dcp-hf/digests-00000.safetensors",
    ]
    state: dict[str, Any] = {"step": 0}
    dcp.load(state, checkpoint_id=str(store.at("step-1")).removeprefix("shareddir://"))
    assert state["step"] == 1


def test_failure_of_own_tensors_does_not_cost_the_dcp_half(store: Store, tmp_path: Path) -> None:
    """The rank stays in the exchange to its end, and then has no export."""
    strike = Strike(rank=0, point="mid exchange", action="raise")
    with strike.installed(0, tmp_path):
        error = save_step(store, "step-1", 1)
    assert error is not None
    assert error.startswith(ExportError.__name__)
    assert "injected at mid exchange" in error
    assert sorted(store.files("step-1")) == [
        ".metadata",
        "__0_0.distcp",
        MANIFEST,
        DIGESTS_FILE,
    ]


def test_failed_export_publishes_nothing_when_only_it_has_the_weights(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_parts(monkeypatch, "model.safetensors")
    error = save_step(store, "step-1", 1, weights="once")
    assert error is not None
    assert "stored nowhere else" in error
    assert store.files("step-1") == {}


def test_failed_dcp_half_publishes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    break_parts(monkeypatch, ".distcp")
    assert save_step(store, "step-1", 1) is not None
    assert store.files("step-1") == {}


# Options and credentials


def test_credentials_go_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "hidden-key-0123"  # noqa: S105 - of no store
    plain = Store.shared(tmp_path / "store")
    store = Store(plain.url, {"key": secret})
    assert save_step(store, "step-1", 1) is None
    told = [str(save_step(store, "step-1", 2))]
    break_parts(monkeypatch, ".distcp")
    told.append(str(save_step(store, "step-2", 1)))
    writer = HFDualWriter(store.at("step-3"), storage_options=dict(store.storage_options))
    told += [repr(writer), repr(writer._stores), caplog.text]
    assert not [text for text in told if secret in text]
    for name, data in store.files("step-1").items():
        assert secret.encode() not in data, name
    # A checkpointer process needs them.
    assert secret.encode() in pickle.dumps(writer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overwrite": True}, "overwrite=True is for local paths"),
        ({"export": HFExport(checksums="sha256")}, "checksums"),
        ({"dcp_writer": dcp.FileSystemWriter("x")}, "dcp_writer is for local paths"),
    ],
)
def test_option_is_refused_when_it_is_for_local_paths(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HFDualWriter("memory://run/step-1", **options)


def test_reset_to_a_store_checks_the_options_again(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "step-1", overwrite=True)
    with pytest.raises(ConfigError, match="overwrite=True is for local paths"):
        writer.reset("memory://run/step-2")


def save_to_memory(rank: int, world_size: int) -> str | None:
    return save_step(Store("memory://run"), "step-1", 1)


def test_memory_of_one_process_is_refused_for_several_ranks() -> None:
    errors = run_ranks(save_to_memory, 2)
    assert errors[0] is not None
    assert "does not see the store" in str(errors[1])
