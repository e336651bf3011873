"""`CheckpointManager(mirror=...)`: each step of a local run goes to a store, and comes back."""

from __future__ import annotations

import contextlib
import queue
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer import CheckpointManager, FinishedMirror, HFExport, MirrorTo
from dcp_hf_writer.errors import ConfigError
from support.ranks import run_ranks
from support.store_runs import (
    Counter,
    small_state,
    step_held,
    steps_with_objects,
    storage_of,
    store_of,
)
from support.store_saves import CONFIG, Store, state_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.s3_servers import S3Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

# Far more than it takes on a busy machine.
WAIT_S = 120


class MirroredRun:
    """A local run whose steps go to a store; counts the uploads that ended."""

    def __init__(self, root: Path, store: Store) -> None:
        self.root, self.store = root, store
        self.ended: queue.SimpleQueue[FinishedMirror] = queue.SimpleQueue()

    def manager(self, **options: Any) -> CheckpointManager:
        """Make a manager."""
        to = MirrorTo(
            self.store.url, self.store.storage_options, timeout_s=120, report_to=self.ended.put
        )
        given: dict[str, Any] = {
            "export": HFExport(assets={"config.json": CONFIG}),
            "timeout_s": 60,
            "host_budget_bytes": 1 << 20,
            "save_rng": False,
            "mirror": to,
        }
        return CheckpointManager(self.root, **{**given, **options})

    def outcome(self) -> str:
        """Wait for the end of an upload; return how it went."""
        return self.ended.get(timeout=WAIT_S).outcome

    def settles(self, *steps: str) -> bool:
        """Wait until the mirror holds these steps and nothing else: its retention takes a while."""
        until = time.monotonic() + WAIT_S
        run = storage_of(self.store)
        while time.monotonic() < until:
            # A key may be deleted between the listing and the reading of its content.
            with contextlib.suppress(FileNotFoundError):
                if {name for name in run.tree() if name.startswith("step-")} == set(steps):
                    return True
            time.sleep(0.1)
        return False

    def files(self, step: int) -> dict[str, bytes]:
        """Return the files of a local step."""
        below = self.root / f"step-{step}"
        found = (path for path in below.rglob("*") if path.is_file())
        return {str(path.relative_to(below)): path.read_bytes() for path in found}


@pytest.fixture(params=("memory", "moto"))
def run(request: pytest.FixtureRequest, tmp_path: Path) -> MirroredRun:
    kind = request.param
    store = store_of(kind, tmp_path, request.getfixturevalue(kind) if kind == "moto" else None)
    return MirroredRun(tmp_path / "run", store)


@pytest.fixture
def on_moto(tmp_path: Path, moto: S3Server) -> MirroredRun:
    return MirroredRun(tmp_path / "run", store_of("moto", tmp_path, moto))


def test_each_step_is_mirrored_and_the_retention_applies_to_both(run: MirroredRun) -> None:
    options: dict[str, Any] = {"keep_last": 2, "keep_best": ("loss", "min")}
    with run.manager(save_every=1, **options) as manager:
        assert manager.restore(small_state(0)) is None
        for step in range(1, 6):
            manager.step(step, small_state(step), metrics={"loss": abs(step - 2)})
            manager.wait()
            assert run.outcome() == "published"
        manager.wait()
        assert manager.steps() == [2, 4, 5]
        # The best step stays in both places, because its metric goes to the mirror too.
        assert run.settles("step-2", "step-4", "step-5")
    for step in (2, 4, 5):
        assert run.store.files(f"step-{step}") == run.files(step)


def test_restore_on_an_empty_disk_takes_the_newest_step_of_the_mirror(
    on_moto: MirroredRun,
) -> None:
    run = on_moto
    with run.manager(save_every=1, rank_state={"loader": Counter(7)}) as manager:
        for step in (1, 2):
            manager.step(step, small_state(step))
            manager.wait()
            assert run.outcome() == "published"
    shutil.rmtree(run.root)
    loader = Counter()
    with run.manager(save_every=1, rank_state={"loader": loader}) as manager:
        state = small_state(0)
        assert manager.restore(state, verify=True) == 2
        assert manager.restored is not None
        assert manager.restored.path == run.store.at("step-2")
        assert (step_held(state), loader.count) == (2.0, 7)
        manager.step(3, small_state(3))
        manager.wait()
        assert run.outcome() == "published"
        assert manager.steps() == [3]
    assert sorted(steps_with_objects(run.store)) == ["step-1", "step-2", "step-3"]


def test_run_that_goes_back_replaces_the_steps_of_the_mirror(on_moto: MirroredRun) -> None:
    run = on_moto
    with run.manager(save_every=1) as manager:
        for step in (1, 2):
            manager.step(step, small_state(step))
            manager.wait()
            assert run.outcome() == "published"
    with run.manager(save_every=1) as manager:
        assert manager.restore(small_state(0), step=1) == 1
        manager.step(2, small_state(20))
        manager.wait()
        assert run.outcome() == "published"
    assert run.store.files("step-2") == run.files(2)


def test_local_step_stays_until_its_mirror_is_published_and_the_next_run_goes_on(
    on_moto: MirroredRun,
) -> None:
    run = on_moto
    good = run.store
    options = {**good.storage_options, "endpoint_url": "http://127.0.0.1:9"}
    run.store = Store(good.url, options)
    with run.manager(save_every=1, keep_last=1, mirror=_short(run)) as manager:
        for step in (1, 2):
            manager.step(step, small_state(step))
            manager.wait()
            assert run.outcome() == "failed"
        manager.wait()
        assert manager.steps() == [1, 2]
    run.store = good
    with run.manager(save_every=1, keep_last=1) as manager:
        assert {run.outcome(), run.outcome()} == {"published"}
        manager.step(3, small_state(3))
        manager.wait()
        assert run.outcome() == "published"
        manager.wait()
        assert manager.steps() == [3]
        assert run.settles("step-3")
    assert [one.name for one in run.root.glob(".mirror-*")] == []


def _short(run: MirroredRun) -> MirrorTo:
    return MirrorTo(run.store.url, run.store.storage_options, timeout_s=1, report_to=run.ended.put)


def test_restore_uses_the_local_steps_when_the_mirror_does_not_answer(
    on_moto: MirroredRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = on_moto
    with CheckpointManager(run.root, save_every=1, save_rng=False) as manager:
        manager.step(1, small_state(1))
    run.store = Store(f"s3://no-{run.store.url[5:]}", run.store.storage_options)
    with run.manager(save_every=1) as manager:
        state = small_state(0)
        assert manager.restore(state) == 1
        assert step_held(state) == 1.0
    assert "cannot be listed" in caplog.text


def test_snapshots_are_not_mirrored(on_moto: MirroredRun) -> None:
    run = on_moto
    with run.manager(save_every=2, snapshot_every=1) as manager:
        manager.step(1, small_state(1))
        manager.wait()
        assert (run.root / "snapshot-1").is_dir()
        manager.step(2, small_state(2))
        manager.wait()
        assert run.outcome() == "published"
    assert sorted(steps_with_objects(run.store)) == ["step-2"]


def save_and_restore(rank: int, world_size: int, root: Path, store: Store) -> Any:
    run = MirroredRun(root, store)
    with run.manager(save_every=1, save_rng=True) as manager:
        manager.step(1, state_of(1, is_sharded=True))
        manager.wait()
        # Only rank 0 gets the report.
        outcome = run.outcome() if rank == 0 else "published"
    empty = MirroredRun(root.with_name("empty"), store)
    with empty.manager(save_every=1, save_rng=True) as manager:
        state = state_of(0, is_sharded=True)
        restored = manager.restore(state, verify=True)
    return outcome, restored, state["step"]


def test_ranks_share_the_mirror_and_restore_from_it(tmp_path: Path, moto: S3Server) -> None:
    store = store_of("moto", tmp_path, moto)
    found = run_ranks(save_and_restore, 2, tmp_path / "run", store)
    assert found == [("published", 1, 1)] * 2


def test_mirror_of_a_run_on_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no mirror"):
        CheckpointManager("memory://run", mirror="s3://bucket/run")
    with pytest.raises(ConfigError, match="a mirror must be the URL"):
        CheckpointManager(tmp_path, mirror=str(tmp_path / "other"))


def test_export_with_a_place_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used with CheckpointManager"):
        CheckpointManager(tmp_path, export=HFExport(path="s3://bucket/serve/step-1"))
