"""A planner, a stager or a subclass that changes a save or a load loses nothing in silence."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport
from dcp_hf_writer.errors import CheckpointError, ConfigError, CoverageError, PlanningError
from dcp_hf_writer.torch_seam.future_guard import own_error
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path


def refusal_of(state: dict[str, Any], writer: HFDualWriter, **options: Any) -> CheckpointError:
    with pytest.raises((CheckpointException, CheckpointError)) as raised:
        dcp.save(state, storage_writer=writer, **options)
    error = own_error(raised.value)
    assert error is not None
    return error


class ReplacesATie(HFDualWriter):
    """Gives a tied name another tensor after staging."""

    def stage(self, state_dict: dict[str, Any]) -> Any:
        staged = super().stage(state_dict)
        staged["model"]["b"] = torch.ones(2, 3)
        return staged


@pytest.mark.parametrize("weights", ["both", "once"])
def test_tensor_is_saved_when_it_replaces_a_tied_one_after_staging(
    weights: Any, tmp_path: Path
) -> None:
    tied = torch.zeros(2, 3)
    writer = ReplacesATie(tmp_path / "step-1", export=HFExport(assets=()), weights=weights)
    dcp.async_save({"model": {"a": tied, "b": tied}}, storage_writer=writer).result()
    stored = load_file(tmp_path / "step-1" / "hf" / "model.safetensors")
    assert sorted(stored) == ["a", "b"]
    loaded = {"model": {"a": torch.full((2, 3), 7.0), "b": torch.full((2, 3), 7.0)}}
    dcp.load(loaded, storage_reader=HFDualReader(tmp_path / "step-1"))
    assert torch.equal(loaded["model"]["a"], torch.zeros(2, 3))
    assert torch.equal(loaded["model"]["b"], torch.ones(2, 3))


class RenamingPlanner(SavePlanner):
    """Renames every tensor of the model, and does not show the new names."""

    def __init__(self) -> None:
        self._inner = DefaultSavePlanner()

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, **options: Any
    ) -> None:
        renamed = {name.removeprefix("x_"): value for name, value in state_dict["model"].items()}
        self._inner.set_up_planner({"model": renamed}, storage_meta, **options)

    def create_local_plan(self) -> Any:
        return self._inner.create_local_plan()

    def create_global_plan(self, all_plans: Any) -> Any:
        return self._inner.create_global_plan(all_plans)

    def finish_plan(self, new_plan: Any) -> Any:
        return self._inner.finish_plan(new_plan)

    def resolve_data(self, write_item: Any) -> Any:
        return self._inner.resolve_data(write_item)


class ShowsNothing(RenamingPlanner):
    """Has an empty `state_dict`, whatever it plans."""

    def __init__(self) -> None:
        super().__init__()
        self.state_dict: dict[str, Any] = {}


@pytest.mark.parametrize("planner", [RenamingPlanner, ShowsNothing])
def test_save_is_refused_when_the_plan_has_names_that_the_checks_cannot_see(
    planner: type[SavePlanner], tmp_path: Path
) -> None:
    # The tensors of the declared tie differ. Under the names of the state dict, nobody would know.
    state = {"model": {"x_a": torch.zeros(2, 3), "x_b": torch.ones(2, 3)}}
    export = HFExport(assets=(), tied={"b": "a"})
    error = refusal_of(state, HFDualWriter(tmp_path / "step-1", export=export), planner=planner())
    assert isinstance(error, PlanningError)
    assert error.fqn == "model.a"
    assert not list(tmp_path.iterdir())


class DropsWhenGlobal(DefaultSavePlanner):
    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        return [replace(plan, items=plan.items[1:]) for plan in plans], metadata


class DropsAtTheEnd(DefaultSavePlanner):
    def finish_plan(self, new_plan: Any) -> Any:
        plan = super().finish_plan(new_plan)
        return replace(plan, items=plan.items[1:])


@pytest.mark.parametrize("planner", [DropsWhenGlobal, DropsAtTheEnd])
@pytest.mark.parametrize("first", [torch.ones(3), 3], ids=["tensor", "object"])
def test_save_is_refused_when_a_planner_drops_what_its_metadata_lists(
    planner: type[SavePlanner], first: Any, tmp_path: Path
) -> None:
    state = {"first": first, "other": torch.ones(2)}
    error = refusal_of(state, HFDualWriter(tmp_path / "step-1", export=None), planner=planner())
    assert isinstance(error, CoverageError)
    assert error.fqn == "first"
    assert not list(tmp_path.iterdir())


class OldSignature(HFDualWriter):
    """Has no `**kwargs`, so torch passes neither `rank` nor `use_collectives`."""

    def set_up_storage_writer(  # type: ignore[override]
        self,
        is_coordinator: bool,  # noqa: FBT001 - torch's
    ) -> None:
        super().set_up_storage_writer(is_coordinator)


def save_with_old_signature(rank: int, world_size: int, root: Path) -> None:
    state = {"model": {"w": torch.ones(2, 3)}, f"own{rank}": torch.full((2,), float(rank))}
    writer = OldSignature(root / "lost", export=None)
    assert isinstance(refusal_of(state, writer, use_collectives=False), ConfigError)
    dcp.save(state, storage_writer=OldSignature(root / "step-1", export=None))


def test_save_without_collectives_is_refused_when_torch_does_not_say_so(tmp_path: Path) -> None:
    run_ranks(save_with_old_signature, 2, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    loaded = {"own0": torch.full((2,), 7.0), "own1": torch.full((2,), 7.0)}
    dcp.load(loaded, checkpoint_id=tmp_path / "step-1")
    assert torch.equal(loaded["own1"], torch.ones(2))


def test_staging_goes_on_when_the_save_of_another_writer_has_failed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    other = dcp.FileSystemWriter(tmp_path / "file" / "step-1")
    stager = HFDualWriter(tmp_path / "step-1", timeout_s=10)
    gc.disable()
    try:
        saving = dcp.async_save({"w": torch.ones(3)}, storage_writer=other, async_stager=stager)
        with pytest.raises(CheckpointException):
            saving.result()
        del saving
        assert torch.equal(stager.stage({"w": torch.ones(3)})["w"], torch.ones(3))
    finally:
        gc.enable()


class SkipsTheFit(HFDualReader):
    def set_up_storage_reader(self, *_: Any, **__: Any) -> None:
        """Leave out what `HFDualReader` checks here."""


class SkipsTheBlocks(HFDualReader):
    def prepare_local_plan(self, plan: Any) -> Any:
        return plan


@pytest.mark.parametrize("reader", [SkipsTheFit, SkipsTheBlocks])
@pytest.mark.parametrize("source", ["dcp", "hf"])
def test_load_is_refused_when_a_reader_skips_checks(
    reader: type[HFDualReader], source: Any, tmp_path: Path
) -> None:
    path = tmp_path / "step-1"
    state = {"model": {"w": torch.ones(2, 3)}}
    dcp.save(state, storage_writer=HFDualWriter(path, export=HFExport(assets=())))
    target = {"model": {"w": torch.full((2, 3), 7.0)}}
    with pytest.raises(CheckpointException) as raised:
        dcp.load(target, storage_reader=reader(path, source=source))
    assert isinstance(own_error(raised.value), ConfigError)
    assert torch.equal(target["model"]["w"], torch.full((2, 3), 7.0))
