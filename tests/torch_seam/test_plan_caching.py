"""`enable_plan_caching=True`: torch sends no plan that did not change; each checkpoint is right."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import CheckpointError, ExportError, PlanningError, TargetExistsError
from dcp_hf_writer.plan import global_plan
from support.compare import tensor_difference
from support.plan_caches import clear_caches, held_by_torch, is_cached
from support.rank_process import Raised
from support.ranks import run_ranks
from support.small_states import (
    dcp_difference,
    difference,
    leftovers,
    model_of,
    spoil,
    state_of,
    take_name,
)
from support.stock_readers import load_hf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh


class OtherPlanner(DefaultSavePlanner):
    """A class of its own has a cache of its own."""


class Saver:
    """Saves with a new planner each time, as trainers do, and overwrites what was saved."""

    def __init__(self, root: Path, mesh: DeviceMesh, kind: AsyncCheckpointerType) -> None:
        self.root, self.mesh, self.kind = root, mesh, kind

    def state(self, step: int) -> dict[str, Any]:
        return state_of(step, self.mesh)

    def save(
        self,
        name: str,
        state: dict[str, Any],
        *,
        planner: type[DefaultSavePlanner] = DefaultSavePlanner,
        **options: Any,
    ) -> None:
        future = dcp.async_save(
            state,
            storage_writer=HFDualWriter(self.root / name, **options),
            planner=planner(enable_plan_caching=True),
            async_checkpointer_type=self.kind,
        )
        spoil(state)
        future.result()

    def refused(self, name: str, state: dict[str, Any], **options: Any) -> BaseException | None:
        try:
            self.save(name, state, **options)
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            return error
        return None


def unchanged_plans(saver: Saver) -> None:
    """Nothing is planned after the first save: what would caching be for."""
    planned: list[str] = []
    plan_globally = global_plan.plan_globally

    def counted(*args: Any, **kwargs: Any) -> Any:
        planned.append("once more")
        return plan_globally(*args, **kwargs)

    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(global_plan, "plan_globally", counted)
        for step in (1, 2, 3):
            saver.save(f"same-{step}", saver.state(step))
    in_this_process = saver.kind is AsyncCheckpointerType.THREAD and dist.get_rank() == 0
    assert len(planned) == int(in_this_process)


def plan_of_one_rank_changes(saver: Saver) -> None:
    for step in (4, 5, 6, 7):
        state = saver.state(step)
        if step in (5, 6) and dist.get_rank() == dist.get_world_size() - 1:
            # A tensor that only this rank has.
            state["model"]["only here"] = torch.full((3,), float(step))
        saver.save(f"one-{step}", state)


def options_of_the_export_change(saver: Saver) -> None:
    exports = {
        8: HFExport(),
        9: HFExport(dtype=torch.bfloat16),
        10: HFExport(dtype=torch.bfloat16),
        11: HFExport(specs=[LoadSpec("embed", "renamed", (7, 4))]),
        12: HFExport(max_shard_size=100),
        13: None,
        14: HFExport(),
    }
    for step, export in exports.items():
        saver.save(f"options-{step}", saver.state(step), export=export)


def two_planners_take_turns(saver: Saver) -> None:
    for step in (15, 16, 17, 18):
        state = saver.state(step)
        planner = DefaultSavePlanner
        if step % 2:
            planner = OtherPlanner
            state = {"model": {"critic": state["model"]["embed"]}}
        saver.save(f"turns-{step}", state, planner=planner)


def save_fails_in_the_plan(saver: Saver) -> None:
    """The target of a save is taken; then the same save, under another name."""
    take_name(saver.root / "taken")
    dist.barrier()
    for step in (19, 20):
        clear_caches()
        if step == 20:
            # The caches are those of an earlier save with another plan.
            state = saver.state(step)
            del state["model"]["norm"]
            saver.save("before-20", state)
        assert isinstance(saver.refused("taken", saver.state(step)), TargetExistsError)
        saver.save(f"failed-{step}", saver.state(step))
        saver.save(f"failed-{step + 10}", saver.state(step + 10))


def export_is_refused(saver: Saver) -> None:
    """What fails is the planning of the export; the plans that torch keeps have none."""
    clear_caches()
    export = HFExport(expect_keys=["nothing"])
    assert isinstance(saver.refused("refused", saver.state(21), export=export), ExportError)
    saver.save("refused-21", saver.state(21))
    saver.save("refused-22", saver.state(22))


def dtype_changes(saver: Saver) -> None:
    """Torch does not notice: it compares no dtypes."""
    clear_caches()
    saver.save("dtype-23", saver.state(23))
    for name in ("dtype-24", "dtype-25"):
        state = saver.state(25)
        state["model"]["embed"] = state["model"]["embed"].to(torch.bfloat16)
        error = saver.refused(name, state)
        if name == "dtype-24":
            assert isinstance(error, PlanningError)
            assert error.fqn == "model.embed"
            assert "torch.bfloat16" in str(error)
            assert "the next save makes a new plan" in str(error.hint)
        elif error is not None:
            raise error


def cache_is_that_of_another_writer(saver: Saver) -> None:
    clear_caches()
    planner = DefaultSavePlanner(enable_plan_caching=True)
    writer = FileSystemWriter(saver.root / "by torch")
    dcp.async_save(saver.state(26), storage_writer=writer, planner=planner).result()
    saver.save("mixed-26", saver.state(26))
    saver.save("mixed-27", saver.state(27))


def save_by_torch(saver: Saver, name: str, step: int, planner: DefaultSavePlanner) -> None:
    writer = FileSystemWriter(saver.root / name)
    dcp.async_save(saver.state(step), storage_writer=writer, planner=planner).result()


def another_writer_takes_turns(saver: Saver) -> None:
    """Each finds the caches as it left them, also with one planner for both."""
    held: dict[str, Any] = {}
    planner = DefaultSavePlanner(enable_plan_caching=True)
    for step in (36, 38, 40):
        saver.save(f"ours-{step}", saver.state(step))
        assert held_by_torch() == held
        save_by_torch(saver, f"theirs-{step + 1}", step + 1, planner)
        held = held_by_torch()
        assert held
    error = saver.refused("taken", saver.state(1))
    assert isinstance(error, TargetExistsError)
    assert held_by_torch() == held
    future = dcp.async_save(
        saver.state(42), storage_writer=HFDualWriter(saver.root / "ours-42"), planner=planner
    )
    future.result()
    save_by_torch(saver, "theirs-43", 43, planner)


SCENARIOS: tuple[Callable[[Saver], None], ...] = (
    unchanged_plans,
    plan_of_one_rank_changes,
    options_of_the_export_change,
    two_planners_take_turns,
    save_fails_in_the_plan,
    export_is_refused,
    dtype_changes,
    cache_is_that_of_another_writer,
    another_writer_takes_turns,
)


def save_all(rank: int, world_size: int, root: Path) -> dict[str, Raised | None]:
    """Run every scenario; note what failed, so that one failure hides no other."""
    saver = Saver(root, init_device_mesh("cpu", (world_size,)), AsyncCheckpointerType.THREAD)
    found: dict[str, Raised | None] = {}
    for scenario in SCENARIOS:
        clear_caches()
        found[scenario.__name__] = None
        try:
            scenario(saver)
            assert is_cached()
        except BaseException as error:  # noqa: BLE001 as above
            found[scenario.__name__] = Raised.of(error)
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Raised | None]]:
    root = tmp_path_factory.mktemp("caching")
    first, second = run_ranks(save_all, 2, root)
    assert {name: raised is None for name, raised in first.items()} == {
        name: raised is None for name, raised in second.items()
    }
    return root, first


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_scenario_raises_nothing(
    saved: tuple[Path, dict[str, Raised | None]], scenario: str
) -> None:
    raised = saved[1][scenario]
    if raised is not None:
        raised.reraise()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_checkpoint_is_right_when_plans_did_not_change(
    saved: tuple[Path, dict[str, Raised | None]], step: int
) -> None:
    assert difference(saved[0] / f"same-{step}", step) is None


@pytest.mark.parametrize("step", [4, 5, 6, 7])
def test_checkpoint_is_right_when_the_plan_of_one_rank_changed(
    saved: tuple[Path, dict[str, Raised | None]], step: int
) -> None:
    path = saved[0] / f"one-{step}"
    model, extra = model_of(step), {"only here": torch.full((3,), float(step))}
    expected = model if step in (4, 7) else {**model, **extra}
    assert difference(path, step, exported=expected) is None
    assert dcp_difference(path, {"model": expected}) is None


@pytest.mark.parametrize("step", [8, 9, 10, 11, 12, 14])
def test_export_is_right_when_its_options_changed(
    saved: tuple[Path, dict[str, Raised | None]], step: int
) -> None:
    expected = model_of(step)
    if step in (9, 10):
        expected = {name: value.to(torch.bfloat16) for name, value in expected.items()}
    if step == 11:
        expected["renamed"] = expected.pop("embed")
    path = saved[0] / f"options-{step}"
    assert difference(path, step, exported=expected) is None
    files = {file.name for file in (path / "hf").iterdir()}
    assert ("model.safetensors" in files) == (step != 12)


def test_no_export_is_made_when_it_was_switched_off(
    saved: tuple[Path, dict[str, Raised | None]],
) -> None:
    assert dcp_difference(saved[0] / "options-13", state_of(13)) is None
    assert not (saved[0] / "options-13" / "hf").exists()


@pytest.mark.parametrize("step", [15, 16, 17, 18])
def test_checkpoint_is_right_when_two_planners_take_turns(
    saved: tuple[Path, dict[str, Raised | None]], step: int
) -> None:
    path = saved[0] / f"turns-{step}"
    if step % 2 == 0:
        assert difference(path, step) is None
        return
    expected = {"critic": model_of(step)["embed"]}
    assert tensor_difference(load_hf(path / "hf"), expected) is None
    assert dcp_difference(path, {"model": expected}) is None


@pytest.mark.parametrize("step", [19, 29, 20, 30])
def test_checkpoint_is_right_when_the_save_before_failed_in_its_plan(
    saved: tuple[Path, dict[str, Raised | None]], step: int
) -> None:
    assert difference(saved[0] / f"failed-{step}", step) is None


@pytest.mark.parametrize("step", [21, 22])
def test_checkpoint_is_right_when_the_export_before_was_refused(
    saved: tuple[Path, dict[str, Raised | None]], step: int
) -> None:
    assert difference(saved[0] / f"refused-{step}", step) is None


def test_checkpoint_is_right_when_a_new_dtype_was_refused_before(
    saved: tuple[Path, dict[str, Raised | None]],
) -> None:
    expected = model_of(25)
    expected["embed"] = expected["embed"].to(torch.bfloat16)
    path = saved[0] / "dtype-25"
    assert tensor_difference(load_hf(path / "hf"), expected) is None
    assert dcp_difference(path, {"model": expected}) is None


@pytest.mark.parametrize("step", [26, 27])
def test_checkpoint_is_right_when_another_writer_filled_the_cache(
    saved: tuple[Path, dict[str, Raised | None]], step: int
) -> None:
    assert difference(saved[0] / f"mixed-{step}", step) is None


@pytest.mark.parametrize("step", [36, 38, 40, 42])
def test_checkpoints_are_right_when_two_writers_take_turns(
    saved: tuple[Path, dict[str, Raised | None]], step: int
) -> None:
    assert difference(saved[0] / f"ours-{step}", step) is None
    assert dcp_difference(saved[0] / f"theirs-{step + 1}", state_of(step + 1)) is None


@pytest.mark.parametrize("how", ["async", "sync"])
def test_export_is_right_when_tensors_were_tied_before_or_are_now(tmp_path: Path, how: str) -> None:
    clear_caches()
    one, other = torch.zeros(3), torch.ones(3)
    for step, head in enumerate((one, one, other, other, one)):
        state = {"model": {"embed": one, "head": head}}
        path = tmp_path / f"step-{step}"
        options: dict[str, Any] = {
            "storage_writer": HFDualWriter(path),
            "planner": DefaultSavePlanner(enable_plan_caching=True),
            "no_dist": True,
        }
        if how == "async":
            dcp.async_save(state, **options).result()
        else:
            dcp.save(state, **options)
        expected = {"embed": one} if head is one else state["model"]
        assert tensor_difference(load_hf(path / "hf"), expected) is None
    clear_caches()


def test_failed_saves_leave_nothing(saved: tuple[Path, dict[str, Raised | None]]) -> None:
    assert leftovers(saved[0]) == []
    assert os.listdir(saved[0] / "taken") == [".metadata"]
    assert not (saved[0] / "refused" / "hf").exists()
    assert not (saved[0] / "dtype-24").exists()


def save_by_process(rank: int, world_size: int, root: Path) -> None:
    """The caches are those of the checkpointer process, which serves all saves of the run."""
    saver = Saver(root, init_device_mesh("cpu", (world_size,)), AsyncCheckpointerType.PROCESS)
    unchanged_plans(saver)
    plan_of_one_rank_changes(saver)
    saver.save("options-9", saver.state(9), export=HFExport(dtype=torch.bfloat16))
    take_name(root / "taken")
    dist.barrier()
    state = saver.state(10)
    state["model"]["new"] = torch.ones(3)
    assert isinstance(saver.refused("taken", state), CheckpointError)
    saver.save(
        "new-10", saver.state(10) | {"model": {**saver.state(10)["model"], "new": torch.ones(3)}}
    )


def test_checkpoints_are_right_when_processes_keep_the_plans(tmp_path: Path) -> None:
    run_ranks(save_by_process, 2, tmp_path)
    for step in (1, 2, 3):
        assert difference(tmp_path / f"same-{step}", step) is None
    for step in (4, 7):
        assert difference(tmp_path / f"one-{step}", step) is None
    for step in (5, 6):
        expected = {**model_of(step), "only here": torch.full((3,), float(step))}
        assert difference(tmp_path / f"one-{step}", step, exported=expected) is None
    bfloat16 = {name: value.to(torch.bfloat16) for name, value in model_of(9).items()}
    assert difference(tmp_path / "options-9", 9, exported=bfloat16) is None
    new = {**model_of(10), "new": torch.ones(3)}
    assert difference(tmp_path / "new-10", 10, exported=new) is None
    assert dcp_difference(tmp_path / "new-10", {"model": new}) is None
    assert leftovers(tmp_path) == []
