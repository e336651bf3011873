"""The planner of a save or load: without it nothing is saved or loaded, with it all is checked."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport
from dcp_hf_writer.errors import CheckpointError, PlanningError, UnsupportedTorchError
from dcp_hf_writer.torch_seam import caller_frames
from dcp_hf_writer.torch_seam.future_guard import own_error
from support.expert_layouts import LAYOUTS, state_of
from support.lost_lookups import (
    KINDS,
    CarryingPlanner,
    LostInTheChild,
    Restored,
    assert_nothing_is_there,
    refusal,
    save,
    without,
)
from support.rank_tensors import tensor
from support.ranks import run_ranks
from support.small_states import difference
from support.small_states import state_of as small_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def experts_of(rank: int, world_size: int) -> dict[str, Any]:
    """Return experts that are sharded by hand: saved as replicas, all but one rank's are lost."""
    return state_of(1, LAYOUTS["by expert"], rank=rank, world_size=world_size)


def lost_and_found(rank: int, world_size: int, root: Path, kind: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    planner, lost = CarryingPlanner(LostInTheChild("planner")), None
    if kind != "process":
        planner, lost = CarryingPlanner(), "planner"
    for name, state in {
        "experts": experts_of(rank, world_size),
        "plain": small_state(2, mesh),
        "no export": small_state(2, mesh),
    }.items():
        export = None if name == "no export" else HFExport()
        with without(lost):
            said = refusal(kind, state, HFDualWriter(root / name, export=export), planner=planner)
        assert said is not None, name
        assert "planner of the save" in said
    assert_nothing_is_there(root, "experts", "plain", "no export")
    found = CarryingPlanner(Restored())
    save(kind, small_state(3, mesh), HFDualWriter(root / "step-3"), planner=found)
    with pytest.raises(PlanningError, match="different tensors under one name"):
        save(kind, experts_of(rank, world_size), HFDualWriter(root / "experts"), planner=found)
    dist.barrier()
    assert_nothing_is_there(root, "experts")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_saved_when_the_planner_cannot_be_found(tmp_path: Path, kind: str) -> None:
    run_ranks(lost_and_found, 2, tmp_path, kind)
    assert difference(tmp_path / "step-3", 3) is None


@pytest.mark.parametrize("kind", ["sync", "thread"])
def test_save_alone_is_refused_too_when_the_planner_cannot_be_found(
    tmp_path: Path, kind: str
) -> None:
    one, other = torch.zeros(3), torch.ones(3)
    export = HFExport(tied={"head": "embed"})
    for state in ({"model": {"embed": one, "head": other}}, {"model": {"embed": one, "head": one}}):
        writer = HFDualWriter(tmp_path / "tied", export=export)
        with without("planner"):
            assert refusal(kind, state, writer, no_dist=True) is not None
    assert_nothing_is_there(tmp_path, "tied")
    save(kind, small_state(1), HFDualWriter(tmp_path / "step-1"), no_dist=True)
    assert difference(tmp_path / "step-1", 1) is None


@pytest.mark.parametrize("kind", ["sync", "thread"])
def test_save_is_refused_when_another_planner_was_checked(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = caller_frames._locals_of_torch

    def wrong(kind_of_planner: type) -> dict[str, Any] | None:
        found = find(kind_of_planner)
        return found and {**found, "planner": DefaultSavePlanner()}

    with monkeypatch.context() as patched:
        patched.setattr(caller_frames, "_locals_of_torch", wrong)
        said = refusal(kind, small_state(1), HFDualWriter(tmp_path / "x"), no_dist=True)
    assert said is not None
    assert "same planner in every step" in said
    assert_nothing_is_there(tmp_path, "x")


def passing_through(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return wrapper


class DecoratedWriter(HFDualWriter):
    """Three plain decorators on each method that torch calls."""

    @passing_through
    @passing_through
    @passing_through
    def storage_meta(self) -> Any:
        return super().storage_meta()

    @passing_through
    @passing_through
    @passing_through
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001 - torch's
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    @passing_through
    @passing_through
    @passing_through
    def prepare_local_plan(self, plan: Any) -> Any:
        return super().prepare_local_plan(plan)

    @passing_through
    @passing_through
    @passing_through
    def prepare_global_plan(self, plans: Any) -> Any:
        return super().prepare_global_plan(plans)


class DecoratedReader(HFDualReader):
    """The same for a reader."""

    @passing_through
    @passing_through
    @passing_through
    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return super().read_metadata(*args, **kwargs)

    @passing_through
    @passing_through
    @passing_through
    def set_up_storage_reader(self, metadata: Any, is_coordinator: bool, *_: Any) -> None:  # noqa: FBT001 - torch's
        super().set_up_storage_reader(metadata, is_coordinator)

    @passing_through
    @passing_through
    @passing_through
    def prepare_local_plan(self, plan: Any) -> Any:
        return super().prepare_local_plan(plan)


def save_decorated(rank: int, world_size: int, root: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for kind in ("sync", "thread"):
        for export in (HFExport(), None):
            writer = DecoratedWriter(root / "lost", export=export)
            with pytest.raises(PlanningError, match="different tensors under one name"):
                save(kind, experts_of(rank, world_size), writer)
        assert_nothing_is_there(root, "lost")
        dist.barrier()
        save(kind, small_state(1, mesh), DecoratedWriter(root / f"{kind}-1"))
        loaded = small_state(9, mesh)
        dcp.load(loaded, storage_reader=DecoratedReader(root / f"{kind}-1"))
        assert loaded["step"] == 1


def test_decorated_methods_hide_nothing_from_the_checks(tmp_path: Path) -> None:
    run_ranks(save_decorated, 2, tmp_path)
    for kind in ("sync", "thread"):
        assert difference(tmp_path / f"{kind}-1", 1) is None


class BareSavePlanner(SavePlanner):
    """Shows nothing of what it plans, and does it as torch's planner."""

    def __init__(self) -> None:
        self._inner = DefaultSavePlanner()

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        self._inner.set_up_planner(*args, **kwargs)

    def create_local_plan(self) -> Any:
        return self._inner.create_local_plan()

    def create_global_plan(self, all_plans: Any) -> Any:
        return self._inner.create_global_plan(all_plans)

    def finish_plan(self, new_plan: Any) -> Any:
        return self._inner.finish_plan(new_plan)

    def resolve_data(self, write_item: Any) -> Any:
        return self._inner.resolve_data(write_item)


def save_bare(rank: int, world_size: int, root: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for kind in ("sync", "thread"):
        with pytest.raises(PlanningError, match="different tensors under one name"):
            save(
                kind,
                experts_of(rank, world_size),
                HFDualWriter(root / "lost"),
                planner=BareSavePlanner(),
            )
        assert_nothing_is_there(root, "lost")
        dist.barrier()
        writer = HFDualWriter(root / f"{kind}-1")
        save(kind, small_state(1, mesh), writer, planner=BareSavePlanner())


def test_planner_that_shows_nothing_is_checked_by_what_it_was_given(tmp_path: Path) -> None:
    run_ranks(save_bare, 2, tmp_path)
    for kind in ("sync", "thread"):
        assert difference(tmp_path / f"{kind}-1", 1) is None


class BareLoadPlanner(LoadPlanner):
    """Shows nothing of what it loads, and does it as torch's planner."""

    def __init__(self) -> None:
        self._inner = DefaultLoadPlanner()

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        self._inner.set_up_planner(*args, **kwargs)

    def create_local_plan(self) -> Any:
        return self._inner.create_local_plan()

    def create_global_plan(self, global_plan: Any) -> Any:
        return self._inner.create_global_plan(global_plan)

    def finish_plan(self, central_plan: Any) -> Any:
        return self._inner.finish_plan(central_plan)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self._inner.load_bytes(read_item, value)

    def resolve_tensor(self, read_item: Any) -> Any:
        return self._inner.resolve_tensor(read_item)

    def commit_tensor(self, read_item: Any, tensor: Any) -> None:
        self._inner.commit_tensor(read_item, tensor)


def loaded(state: dict[str, Any], reader: HFDualReader, **options: Any) -> CheckpointError | None:
    """Load; return our own error."""
    try:
        dcp.load(state, storage_reader=reader, **options)
    except BaseException as error:
        own = own_error(error)
        if own is None:
            raise
        return own
    return None


def load_lost(rank: int, world_size: int, root: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    strided = [_StridedShard(0, split_factor=2), Shard(0)]
    whole = torch.arange(48.0).reshape(16, 3)
    for path, source in ((root / "x", "dcp"), (root / "x", "hf")):
        target = distribute_tensor(-torch.ones(16, 3), mesh, strided, src_data_rank=None)
        reader = HFDualReader(path, source=source)
        with without("planner"):
            error = loaded({"model": {"w": target}}, reader)
        assert isinstance(error, UnsupportedTorchError), error
        assert torch.__version__ in str(error)
        assert bool((target.to_local() == -1).all())
        for planner in (None, BareLoadPlanner()):
            # torch's planner takes the blocks of a strided shard for one.
            refused = loaded({"model": {"w": target}}, reader, planner=planner)
            assert refused is None or isinstance(refused, PlanningError)
            is_right = torch.equal(target.full_tensor(), whole)
            assert is_right == (refused is None)
            assert is_right or bool((target.to_local() == -1).all())
        plain = distribute_tensor(-torch.ones(16, 3), mesh, [Shard(0), Shard(0)])
        assert loaded({"model": {"w": plain}}, reader) is None
        assert torch.equal(plain.full_tensor(), whole)


def test_nothing_is_loaded_when_the_planner_cannot_be_found(tmp_path: Path) -> None:
    state = {"model": {"w": torch.arange(48.0).reshape(16, 3)}}
    dcp.save(state, storage_writer=HFDualWriter(tmp_path / "x"), no_dist=True)
    run_ranks(load_lost, 4, tmp_path)


def test_metadata_is_read_without_a_load_and_nothing_more(tmp_path: Path) -> None:
    state = {"model": {"w": tensor("w", 4, 3)}}
    dcp.save(state, storage_writer=HFDualWriter(tmp_path / "x"), no_dist=True)
    reader = HFDualReader(tmp_path / "x")
    metadata = reader.read_metadata()
    assert set(metadata.state_dict_metadata) == {"model.w"}
    with pytest.raises(UnsupportedTorchError, match="planner of the load"):
        reader.set_up_storage_reader(metadata, is_coordinator=True)


def test_load_is_refused_when_another_planner_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dcp.save(small_state(1), storage_writer=HFDualWriter(tmp_path / "x"), no_dist=True)
    find = caller_frames._locals_of_torch
    other = DefaultLoadPlanner()
    other.set_up_planner(small_state(5), is_coordinator=True)

    def wrong(kind: type) -> dict[str, Any] | None:
        found = find(kind)
        return found and {**found, "planner": other}

    target = small_state(5)
    monkeypatch.setattr(caller_frames, "_locals_of_torch", wrong)
    error = loaded(target, HFDualReader(tmp_path / "x"), no_dist=True)
    assert isinstance(error, UnsupportedTorchError)
    assert torch.equal(target["model"]["embed"], small_state(5)["model"]["embed"])
