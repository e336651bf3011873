"""Deletions on a store: whatever a crash leaves is no checkpoint, and the next deletion ends it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from dcp_hf_writer.manager.keep_house import Housekeeper
from dcp_hf_writer.manager.retention import Retention
from dcp_hf_writer.save.owner_process import Owner, mark_active, mark_ended, new_save_id
from dcp_hf_writer.save.store_record import StoreRecord
from dcp_hf_writer.storage import s3_store
from dcp_hf_writer.storage.fsspec_store import FsspecStore
from dcp_hf_writer.storage.object_contract import Patience
from support.processes import in_fresh_process
from support.store_runs import (
    manager_on,
    small_state,
    steps_with_objects,
    storage_of,
    store_of,
)
from support.store_saves import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.s3_servers import S3Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class CrashError(BaseException):
    """Stands for the end of the process: no handler of the code under test may catch it."""


def saved(store: Store, steps: tuple[int, ...]) -> None:
    with manager_on(store, save_every=1) as manager:
        for step in steps:
            manager.step(step, small_state(step))


def crash_at(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Crash before the change number `number`; each deleted object is a change of its own."""
    made: list[int] = []

    def counted(change: Any) -> Any:
        def changed(*arguments: Any, **options: Any) -> Any:
            made.append(len(made))
            if len(made) == number:
                raise CrashError
            return change(*arguments, **options)

        return changed

    patch.setattr(FsspecStore, "put", counted(FsspecStore.put))
    patch.setattr(FsspecStore, "_remove", counted(FsspecStore._remove))
    return made


def crashes(tmp_path: Path, act: Any) -> Iterator[Store]:
    """Yield a store with the steps 1 and 2, after a crash at each change of an act."""
    for number in range(1, 100):
        store = store_of("memory", tmp_path / str(number), None)
        saved(store, (1, 2))
        with pytest.MonkeyPatch.context() as patch:
            made = crash_at(patch, number)
            try:
                act(storage_of(store))
            except CrashError:
                pass
            else:
                assert number > 5, "the act makes several changes"
                assert len(made) == number - 1
                return
        yield store


def test_deleted_step_counts_whole_or_not_at_all_after_any_crash(tmp_path: Path) -> None:
    seen = set()
    for store in crashes(tmp_path, lambda run: run.remove(run.look_at(1))):
        run = storage_of(store)
        steps = run.steps()
        assert steps in ([1, 2], [2])
        seen.add(tuple(steps))
        if steps == [2]:
            run.finish_deletions()
            assert sorted(steps_with_objects(store)) == ["step-2"]
        else:
            assert run.remove(run.look_at(1))
            assert sorted(steps_with_objects(store)) == ["step-2"]
    assert seen == {(1, 2), (2,)}


def test_dcp_half_stays_whole_when_deleting_an_export_crashes(tmp_path: Path) -> None:
    for store in crashes(tmp_path, lambda run: run.remove_export(run.look_at(1))):
        run = storage_of(store)
        assert run.steps() == [1, 2]
        begun = run.notes_of(run.look_at(1)).export_leaves is not None
        run.finish_deletions()
        keys = steps_with_objects(store)["step-1"]
        assert begun != any(key.startswith("hf/") for key in keys)
        with manager_on(store) as manager:
            assert manager.restore(small_state(0), step=1) == 1


def test_pinned_step_stays_although_its_notes_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of("memory", tmp_path, None)
    saved(store, (1, 2))
    run = storage_of(store)
    run.pin(1, is_pinned=True, may_write=True)
    read = FsspecStore.read

    def refuse(self: FsspecStore, key: str, **options: Any) -> bytes | None:
        if key.endswith("step-1.json"):
            raise self._refused(PermissionError("no"), key)
        return read(self, key, **options)

    monkeypatch.setattr(FsspecStore, "read", refuse)
    Housekeeper(run, Retention(keep_last=1)).run()
    assert sorted(steps_with_objects(store)) == ["step-1", "step-2"]


def leave_save(store: Store, name: str, owner: Owner, save_id: str, **options: Any) -> None:
    """Leave what a save has before its manifest, and an object of someone else."""
    fs, root = fsspec.core.url_to_fs(store.at(name))
    record = StoreRecord(save_id, store.at(name), owner, 2, ("hf/a.safetensors",))
    fs.pipe_file(f"{root}/.dcp-hf-save.json", replace(record, **options).encode())
    for key in (".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "hf/a.safetensors"):
        fs.pipe_file(f"{root}/{key}", b"x")


THEIRS = {"__2_0.distcp"}
OURS = {".dcp-hf-save.json", ".metadata", "__0_0.distcp", "__1_0.distcp", "hf/a.safetensors"}
ALL = OURS | THEIRS
ELSEWHERE = replace(Owner.me(), host="elsewhere", boot_id="another", pid=1)


def fresh_owner() -> Owner:
    return Owner.me()


def test_leftovers_of_dead_saves_go_and_nothing_else(tmp_path: Path) -> None:
    store = store_of("memory", tmp_path, None)
    saved(store, (1,))
    dead, running, young = in_fresh_process(fresh_owner), new_save_id(), new_save_id()
    old = "20200101T000000-12345678-1-abc"
    mark_active(running, store.url)
    try:
        leave_save(store, "step-2", dead, young)
        leave_save(store, "step-3", Owner.me(), running)
        leave_save(store, "step-4", ELSEWHERE, young)
        leave_save(store, "step-5", ELSEWHERE, old)
        leave_save(store, "step-6", Owner.me(), young, is_over=True)
        leave_save(store, "step-7", dead, old, target="memory://other/run/step-1")
        run = storage_of(store)
        states = {one.name: one.state for one in run.leftovers()}
        run.finish_deletions()
    finally:
        mark_ended(running)
    assert states == {
        "step-2": "dead",
        "step-3": "alive",
        "step-4": "unknown",
        "step-5": "dead",
        "step-6": "dead",
        "step-7": "unknown",
    }
    found = steps_with_objects(store)
    assert found["step-2"] == found["step-5"] == THEIRS
    assert found["step-3"] == found["step-4"] == found["step-7"] == ALL
    # A late rank of this process may still send something: the record stays for it.
    assert found["step-6"] == THEIRS | {".dcp-hf-save.json"}
    assert run.steps() == [1]


def test_uploads_of_dead_saves_are_aborted_page_after_page(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_PAGE", 10)
    bucket = moto.new_bucket()
    store = Store.of_bucket(bucket)
    run = storage_of(store)
    until = Patience(time.monotonic() + 300)
    record = StoreRecord(
        new_save_id(),
        store.at("step-5"),
        in_fresh_process(fresh_owner),
        25,
        tuple(f"hf/{n}" for n in range(3)),
    )
    data = [memoryview(record.encode())]
    run._store.put("step-5/.dcp-hf-save.json", data, token="x", patience=until)  # noqa: S106 - no secret
    client = bucket.client()
    for n in range(25):
        client.put_object(Bucket=bucket.name, Key=f"run/step-5/__{n}_0.distcp", Body=b"x")
    for key in ("step-5/hf/1", "step-5/mine", "step-6/hf/1", "step-55/hf/1"):
        run._store.begin_upload(key, token="x", patience=until)  # noqa: S106 - no secret
    assert sum(len(keys) for keys in run.tree().values()) == 26
    run.finish_deletions()
    assert run.tree() == {}
    left = {key for key, _ in bucket.open_uploads()}
    assert left == {"run/step-5/mine", "run/step-6/hf/1", "run/step-55/hf/1"}
    run.close()
