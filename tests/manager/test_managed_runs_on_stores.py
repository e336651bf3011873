"""A manager whose run lies on a store: cadence, retention, restore, and what it leaves there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from dcp_hf_writer import CheckpointManager, verify
from dcp_hf_writer.errors import ConfigError, NodeLocalPathError, TargetExistsError
from support.ranks import run_ranks
from support.store_runs import (
    SINGLE_KINDS,
    Counter,
    manager_on,
    pointer,
    small_state,
    step_held,
    steps_with_objects,
    store_of,
)
from support.store_saves import Store, state_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.s3_servers import S3Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture(params=SINGLE_KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    kind = request.param
    is_s3 = kind in {"moto", "rclone"}
    return store_of(kind, tmp_path, request.getfixturevalue(kind) if is_s3 else None)


@pytest.fixture
def memory(tmp_path: Path) -> Store:
    return store_of("memory", tmp_path, None)


def test_run_keeps_what_it_should_and_resumes(store: Store) -> None:
    told: list[tuple[str, int]] = []
    progress = {"tokens": 0}
    options: dict[str, Any] = {"keep_last": 2, "keep_best": ("loss", "min"), "export_keep_last": 1}
    manager = manager_on(
        store,
        save_every=1,
        export_every=2,
        trainer_state=lambda: progress,
        rank_state={"loader": Counter(7)},
        on_saved=lambda step, path, _: told.append((path, step)),
        **options,
    )
    assert manager.restore(small_state(0)) is None
    for step in range(1, 8):
        progress["tokens"] = step * 10
        manager.step(step, small_state(step), metrics={"loss": abs(step - 2)})
        manager.wait()
        if step == 3:
            manager.pin(3)
        assert pointer(store, "latest")["step"] == manager.latest() == step
    manager.close()
    assert told == [(f"{store.url}/step-{step}", step) for step in range(1, 8)]
    found = steps_with_objects(store)
    # 2 is the best, 3 is pinned; the newest export is that of 6.
    assert sorted(found) == ["step-2", "step-3", "step-6", "step-7"]
    with_export = {name for name, keys in found.items() if any(k.startswith("hf/") for k in keys)}
    assert with_export == {"step-6"}
    assert pointer(store, "hf-latest")["path"] == "step-6/hf"
    for name in found:
        report = verify(store.at(name), storage_options=dict(store.storage_options))
        assert report.ok, str(report)
    loader = Counter()
    with manager_on(store, rank_state={"loader": loader}, **options) as second:
        assert second.steps() == [2, 3, 6, 7]
        state = small_state(0)
        assert second.restore(state, verify=True) == 7
        assert second.restored is not None
        assert (step_held(state), loader.count) == (7.0, 7)
        assert second.restored.trainer_state == {"tokens": 70}
        second.pin(3, keep=False)
        second.save(8, small_state(8), wait=True)
        assert second.steps() == [2, 7, 8]


def test_snapshot_is_replaced_by_the_next_checkpoint(store: Store) -> None:
    with manager_on(store, save_every=4, snapshot_every=1) as manager:
        for step in range(1, 7):
            manager.step(step, small_state(step))
            manager.wait()
    assert sorted(steps_with_objects(store)) == ["snapshot-6", "step-4"]


def test_damaged_step_is_passed_over_and_named(memory: Store, caplog: Any) -> None:
    with manager_on(memory, save_every=1) as manager:
        for step in (1, 2):
            manager.step(step, small_state(step))
    fs, root = fsspec.core.url_to_fs(memory.at("step-2"))
    whole = fs.cat_file(f"{root}/__0_0.distcp")
    fs.pipe_file(f"{root}/__0_0.distcp", whole[:-1])
    with manager_on(memory) as manager:
        state = small_state(0)
        assert manager.restore(state) == 1
        assert step_held(state) == 1
    assert "step-2: __0_0.distcp has" in caplog.text


def test_future_that_the_run_left_is_replaced(store: Store) -> None:
    with manager_on(store, save_every=1) as manager:
        for step in (1, 2, 3):
            manager.step(step, small_state(step))
    with manager_on(store, save_every=1) as manager:
        assert manager.restore(small_state(0), step=1) == 1
        manager.step(2, small_state(20))
        manager.wait()
        state = small_state(0)
        assert manager.restore(state, step=2) == 2
        assert step_held(state) == 20
        with pytest.raises(TargetExistsError):
            manager.save(1, small_state(9), wait=True)


def test_only_checkpoint_is_not_deleted_to_make_way(memory: Store) -> None:
    with manager_on(memory, snapshot_every=1) as manager:
        manager.step(1, small_state(1))
    with manager_on(memory, snapshot_every=1) as manager:
        with pytest.raises(TargetExistsError, match="the only checkpoint"):
            manager.step(1, small_state(2))
        assert manager.steps() == [1]


def test_options_of_a_url_are_checked() -> None:
    with pytest.raises(ConfigError, match="no file system is known"):
        CheckpointManager("nonsense://bucket/run")
    with pytest.raises(ConfigError, match="query"):
        CheckpointManager("memory://run?x=1")
    with pytest.raises(ConfigError, match="storage_options"):
        CheckpointManager("runs/a", storage_options={"key": "x"})


def run_on_rank(
    rank: int, world_size: int, store: Store, first: int, checkpointer: str = "thread"
) -> list[Any]:
    """Resume, save two steps, and tell what was seen."""
    loader = Counter()
    options: dict[str, Any] = {"save_every": 1, "keep_last": 2, "rank_state": {"loader": loader}}
    # torch starts its process at the first save, which takes long on a busy machine.
    options |= {
        "checkpointer": checkpointer,
        "timeout_s": 150.0 if checkpointer != "thread" else 60,
    }
    with manager_on(store, trainer_state={"n": first}, **options) as manager:
        state = state_of(0, is_sharded=True)
        start = manager.restore(state, verify=True)
        seen: list[Any] = [start, loader.count]
        if start is not None:
            wanted = state_of(start, is_sharded=True)["model"]
            for name, value in state["model"].items():
                local = value.to_local() if hasattr(value, "to_local") else value
                other = (
                    wanted[name].to_local() if hasattr(wanted[name], "to_local") else wanted[name]
                )
                assert local.equal(other), name
        for step in range(first, first + 2):
            loader.count = 100 * rank + step
            manager.step(step, state_of(step, is_sharded=True))
        manager.wait()
        return [*seen, manager.steps()]


def test_two_ranks_save_to_s3_and_resume(tmp_path: Path, s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    store = Store.of_bucket(bucket)
    first = run_ranks(run_on_rank, 2, store, 1)
    assert [one[:2] for one in first] == [[None, 0]] * 2
    second = run_ranks(run_on_rank, 2, store, 3)
    assert [one[:2] for one in second] == [[2, 2], [2, 102]]
    assert second[0][2] == [3, 4]
    assert sorted(steps_with_objects(store)) == ["step-3", "step-4"]
    assert bucket.open_uploads() == []


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["rclone", pytest.param("moto", marks=pytest.mark.slow)])
def test_checkpointer_process_saves_a_run_on_a_store(
    request: pytest.FixtureRequest, kind: str
) -> None:
    bucket = request.getfixturevalue(kind).new_bucket()
    store = Store.of_bucket(bucket)
    first = run_ranks(run_on_rank, 2, store, 1, "process", timeout_s=180)
    assert [one[:2] for one in first] == [[None, 0]] * 2
    assert first[0][2] == [1, 2]
    second = run_ranks(run_on_rank, 2, store, 3)
    assert [one[:2] for one in second] == [[2, 2], [2, 102]]
    assert sorted(steps_with_objects(store)) == ["step-3", "step-4"]
    assert pointer(store, "latest")["step"] == 4
    assert bucket.open_uploads() == []


def make_in_memory(rank: int, world_size: int) -> str:
    try:
        CheckpointManager("memory://run/of-one-process")
    except NodeLocalPathError as error:
        return str(error)
    return "no error"


def test_ranks_that_do_not_share_the_store_are_told(tmp_path: Path) -> None:
    for text in run_ranks(make_in_memory, 2):
        assert "ranks [1] do not see what rank 0 wrote there" in text
