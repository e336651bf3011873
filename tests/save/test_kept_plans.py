"""A layout is planned and sent once; whatever changes between two saves is planned anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import PlanningError, TargetExistsError
from dcp_hf_writer.plan import global_plan
from dcp_hf_writer.plan.global_plan import KeptPart, LocalFacts, RankPlan
from dcp_hf_writer.save import announced_save
from dcp_hf_writer.save.kept_plans import KEPT_PLANS, KeptPlans
from support import shared_store
from support.compare import tensor_difference
from support.ranks import run_ranks
from support.small_states import difference, model_of, state_of, take_name
from support.stock_readers import load_hf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    State = dict[str, Any]


@dataclass(slots=True)
class Counts:
    """What the saves of a test did on this rank."""

    planned: int = 0
    """Times that the coordinator planned."""
    sent: int = 0
    """Times that this rank got its part of the plan."""


def count(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Count from now on what is planned and sent."""
    found, plan_globally, take = Counts(), global_plan.plan_globally, KEPT_PLANS.take

    def planned(*args: Any, **kwargs: Any) -> Any:
        found.planned += 1
        return plan_globally(*args, **kwargs)

    def taken(own: RankPlan | KeptPart, *, rank: int) -> RankPlan:
        found.sent += isinstance(own, RankPlan)
        return take(own, rank=rank)

    monkeypatch.setattr(global_plan, "plan_globally", planned)
    monkeypatch.setattr(announced_save.KEPT_PLANS, "take", taken)
    return found


class Saver:
    """Saves states of the ranks of a group, and counts."""

    def __init__(self, root: Path, patched: pytest.MonkeyPatch) -> None:
        self.root, self.counts = root, count(patched)
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.step = 0

    def state(self) -> State:
        """Return a state of a new step, whose values differ from those before."""
        self.step += 1
        return state_of(self.step, self.mesh)

    def save(self, name: str, state: State, *, target: str | None = None, **options: Any) -> None:
        writer = HFDualWriter(target or self.root / name, **options)
        dcp.async_save(state, storage_writer=writer).result()

    def plans_of(self, work: Callable[..., None], *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return how often the coordinator planned, and how often this rank got its part."""
        before = self.counts.planned, self.counts.sent
        work(*args, **kwargs)
        planned = torch.tensor(self.counts.planned - before[0])
        dist.all_reduce(planned)
        return int(planned), self.counts.sent - before[1]


def placed(state: State, name: str, value: torch.Tensor, mesh: DeviceMesh, dim: int | None) -> None:
    placement = Replicate() if dim is None else Shard(dim)
    state["model"][name] = distribute_tensor(value, mesh, [placement], src_data_rank=None)


def of_dtype(state: State, mesh: DeviceMesh, step: int) -> None:
    state["model"]["embed"] = state["model"]["embed"].to(torch.bfloat16)


def of_shape(state: State, mesh: DeviceMesh, step: int) -> None:
    placed(state, "embed", model_of(step)["embed"][:6].clone(), mesh, 0)


def of_placement(state: State, mesh: DeviceMesh, step: int) -> None:
    placed(state, "embed", model_of(step)["embed"], mesh, 1)


def of_replication(state: State, mesh: DeviceMesh, step: int) -> None:
    placed(state, "embed", model_of(step)["embed"], mesh, None)


def with_new_key(state: State, mesh: DeviceMesh, step: int) -> None:
    state["model"]["new"] = torch.full((3,), float(step))


def with_key_of_one_rank(state: State, mesh: DeviceMesh, step: int) -> None:
    if dist.get_rank() == 1:
        state["model"]["only here"] = torch.full((3,), float(step))


def without_key(state: State, mesh: DeviceMesh, step: int) -> None:
    del state["model"]["layers.0.w"]


def in_other_order(state: State, mesh: DeviceMesh, step: int) -> None:
    state["model"] = dict(reversed(state["model"].items()))


def with_tie(state: State, mesh: DeviceMesh, step: int) -> None:
    state["model"]["head"] = state["model"]["embed"]


def with_new_value(state: State, mesh: DeviceMesh, step: int) -> None:
    state["note"] = "a value that is no tensor"


CHANGES: dict[str, Callable[[State, DeviceMesh, int], None]] = {
    change.__name__: change
    for change in (
        *(of_dtype, of_shape, of_placement, of_replication, with_new_key, with_key_of_one_rank),
        *(without_key, in_other_order, with_tie, with_new_value),
    )
}
OPTIONS: dict[str, dict[str, Any]] = {
    "export dtype": {"export": HFExport(dtype=torch.bfloat16)},
    "file sizes": {"export": HFExport(max_shard_size=100)},
    "specs": {"export": HFExport(specs=[LoadSpec("embed", "renamed", (7, 4))])},
    "other specs": {"export": HFExport(specs=[LoadSpec("embed", "also renamed", (7, 4))])},
    "assets": {"export": HFExport(assets={"config.json": b'{"model_type": "other"}'})},
    "no export": {"export": None},
    "weights once": {"weights": "once"},
}
SAVES_OF_ONE_LAYOUT = 3


def expected(change: str, step: int) -> dict[str, torch.Tensor]:
    """Return what the export of a changed state holds."""
    model = model_of(step)
    if change == "of_dtype":
        model["embed"] = model["embed"].to(torch.bfloat16)
    elif change == "of_shape":
        model["embed"] = model["embed"][:6]
    elif change == "with_new_key":
        model["new"] = torch.full((3,), float(step))
    elif change == "with_key_of_one_rank":
        model["only here"] = torch.full((3,), float(step))
    elif change == "without_key":
        del model["layers.0.w"]
    elif change == "with_tie":
        del model["head"]
    return model


def save_layouts(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    """Save one layout again and again, with each change in between; return what was planned."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patched:
        saver = Saver(root, patched)
        for number in range(SAVES_OF_ONE_LAYOUT):
            name = f"same-{number}"
            found[name] = saver.plans_of(saver.save, name, saver.state())
        for name, change in CHANGES.items():
            state = saver.state()
            change(state, saver.mesh, saver.step)
            found[name] = saver.plans_of(saver.save, name, state)
            found[f"step of {name}"] = saver.step
            after = f"after {name}"
            found[after] = saver.plans_of(saver.save, after, saver.state())
            found[f"step {after}"] = saver.step
        for name, options in OPTIONS.items():
            for one in (name, f"again {name}"):
                found[one] = saver.plans_of(saver.save, one, saver.state(), **options)
    return found


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("layouts")
    return root, run_ranks(save_layouts, 2, root)


def test_layout_is_planned_and_sent_once_when_it_stays(
    layouts: tuple[Path, list[dict[str, Any]]],
) -> None:
    root, of_ranks = layouts
    for found in of_ranks:
        assert [found[f"same-{n}"] for n in range(SAVES_OF_ONE_LAYOUT)] == [(1, 1), (0, 0), (0, 0)]
    wrong = [difference(root / f"same-{n}", n + 1) for n in range(SAVES_OF_ONE_LAYOUT)]
    assert wrong == [None] * SAVES_OF_ONE_LAYOUT


@pytest.mark.parametrize("change", CHANGES)
def test_layout_is_planned_anew_when_it_changes(
    layouts: tuple[Path, list[dict[str, Any]]], change: str
) -> None:
    root, of_ranks = layouts
    assert [found[change] for found in of_ranks] == [(1, 1), (1, 1)]
    step = of_ranks[0][f"step of {change}"]
    assert tensor_difference(load_hf(root / change / "hf"), expected(change, step)) is None
    if change in ("of_placement", "of_replication", "in_other_order", "with_new_value"):
        assert difference(root / change, step) is None


@pytest.mark.parametrize("change", CHANGES)
def test_first_layout_is_known_when_it_comes_back(
    layouts: tuple[Path, list[dict[str, Any]]], change: str
) -> None:
    root, of_ranks = layouts
    assert [found[f"after {change}"] for found in of_ranks] == [(0, 0), (0, 0)]
    assert difference(root / f"after {change}", of_ranks[0][f"step after {change}"]) is None


@pytest.mark.parametrize("name", OPTIONS)
def test_layout_is_planned_anew_when_options_change(
    layouts: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    root, of_ranks = layouts
    assert [found[name] for found in of_ranks] == [(1, 1), (1, 1)]
    assert [found[f"again {name}"] for found in of_ranks] == [(0, 0), (0, 0)]
    assert (root / name / "hf").is_dir() == (name != "no export")


def save_to_other_places(rank: int, world_size: int, root: Path) -> list[tuple[int, int]]:
    """Save one layout to local files and to a store, in turn."""
    shared_store.register()
    found = []
    with pytest.MonkeyPatch.context() as patched:
        saver = Saver(root, patched)
        for name, target in (
            ("files", None),
            ("store", shared_store.url_of(root / "store")),
            ("files again", None),
            ("store again", shared_store.url_of(root / "store again")),
        ):
            found.append(saver.plans_of(saver.save, name, saver.state(), target=target))
    return found


def test_layout_is_planned_anew_when_the_kind_of_target_changes(tmp_path: Path) -> None:
    of_ranks = run_ranks(save_to_other_places, 2, tmp_path)
    assert of_ranks == [[(1, 1), (1, 1), (0, 0), (0, 0)]] * 2
    for step, name in enumerate(("files", "store", "files again", "store again"), start=1):
        assert difference(tmp_path / name, step) is None


def save_in(group: dist.ProcessGroup, path: Path, step: int) -> None:
    if dist.get_rank(group) >= 0:
        state = state_of(step, DeviceMesh.from_group(group, "cpu"))
        writer = HFDualWriter(path, process_group=group)
        dcp.async_save(state, storage_writer=writer, process_group=group).result()


def save_in_groups(rank: int, world_size: int, root: Path) -> list[tuple[int, int]]:
    """Save in groups in which a process has another rank than before, and other ranks with it."""
    found = []
    groups = {ranks: dist.new_group(ranks, backend="gloo") for ranks in ((0, 1), (1, 2), (0, 1, 2))}
    with pytest.MonkeyPatch.context() as patched:
        saver = Saver(root, patched)
        for step, ranks in enumerate([(0, 1), (1, 2), (0, 1, 2), (0, 1), (1, 2)], start=1):
            found.append(saver.plans_of(save_in, groups[ranks], root / f"step-{step}", step))
            dist.barrier()
    return found


def test_layout_is_planned_anew_when_the_ranks_change(tmp_path: Path) -> None:
    of_ranks = run_ranks(save_in_groups, 3, tmp_path)
    # Both groups of two plan alike, so their keys are equal: each time the other group's parts are
    # missing, except where a rank has kept its own.
    assert [[planned for planned, _ in found] for found in of_ranks] == [[1, 1, 1, 0, 0]] * 3
    assert [[sent for _, sent in found] for found in of_ranks] == [
        [1, 0, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
    ]
    for step in range(1, 6):
        assert difference(tmp_path / f"step-{step}", step) is None


def lose_parts(rank: int, world_size: int, root: Path) -> dict[str, tuple[int, int]]:
    """One rank forgets its part, as a new process would; and a save fails before the ranks plan."""
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        saver = Saver(root, patched)
        saver.save("first", saver.state())
        if rank == 1:
            KEPT_PLANS._parts.clear()
        found["lost"] = saver.plans_of(saver.save, "lost", saver.state())
        found["kept"] = saver.plans_of(saver.save, "kept", saver.state())
        take_name(root / "taken")
        dist.barrier()

        def refused(name: str) -> None:
            state = saver.state()
            with_new_key(state, saver.mesh, saver.step)
            with pytest.raises(TargetExistsError):
                saver.save(name, state)

        found["refused"] = saver.plans_of(refused, "taken")

        def save_new() -> None:
            state = saver.state()
            with_new_key(state, saver.mesh, saver.step)
            saver.save("new", state)

        found["new"] = saver.plans_of(save_new)
    return found


def test_layout_is_planned_anew_when_a_rank_lacks_its_part(tmp_path: Path) -> None:
    of_ranks = run_ranks(lose_parts, 2, tmp_path)
    wanted = {"lost": (1, 1), "kept": (0, 0), "refused": (1, 0), "new": (1, 1)}
    assert of_ranks == [wanted, wanted]
    assert difference(tmp_path / "lost", 2) is None
    assert difference(tmp_path / "kept", 3) is None
    assert tensor_difference(load_hf(tmp_path / "new" / "hf"), expected("with_new_key", 5)) is None


class MovingPlanner(DefaultSavePlanner):
    """A planner whose global planning depends on more than the local plans."""

    turn = 0

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        MovingPlanner.turn += 1
        if MovingPlanner.turn % 2:
            return plans, metadata
        items = [[item for plan in plans for item in plan.items], []]
        return [replace(p, items=i) for p, i in zip(plans, items, strict=True)], metadata


def move_items(rank: int, world_size: int, root: Path) -> list[tuple[int, int]]:
    with pytest.MonkeyPatch.context() as patched:
        saver = Saver(root, patched)

        def save(name: str) -> None:
            # Replicas: any rank can write them.
            writer = HFDualWriter(root / name)
            dcp.save({"model": model_of(1)}, storage_writer=writer, planner=MovingPlanner())

        return [saver.plans_of(save, f"moved-{number}") for number in range(3)]


def test_layout_is_planned_each_time_when_the_planner_plans_globally_itself(tmp_path: Path) -> None:
    assert run_ranks(move_items, 2, tmp_path) == [[(1, 1)] * 3] * 2
    for number in range(3):
        found = load_hf(tmp_path / f"moved-{number}" / "hf")
        assert tensor_difference(found, model_of(1)) is None


def part(plan_id: str, dcp: object = None) -> RankPlan:
    return RankPlan(
        dcp, plan_id, (0,), 0, shares_rows=False, files=(), targets={}, once={}, tied=()
    )


def kept_by(plans: KeptPlans, rank: int) -> tuple[str, ...]:
    facts, planner = LocalFacts("host", None, ()), DefaultSavePlanner()
    return plans.with_digest(facts, SavePlan([]), planner, rank=rank).kept


def test_part_is_kept_for_the_rank_that_the_process_had() -> None:
    plans = KeptPlans()
    plans.take(part("a"), rank=0)
    assert kept_by(plans, 0) == ("a",)
    assert kept_by(plans, 1) == ()
    assert plans.take(KeptPart("its own", "a"), rank=0) == part("a", "its own")
    with pytest.raises(PlanningError, match="has not kept its part"):
        plans.take(KeptPart(None, "a"), rank=1)


def test_part_that_was_used_least_recently_is_dropped_first() -> None:
    plans = KeptPlans()
    for name in "abcd":
        plans.take(part(name), rank=0)
    plans.take(KeptPart(None, "a"), rank=0)
    plans.take(part("e"), rank=0)
    assert kept_by(plans, 0) == ("c", "d", "a", "e")


def test_nothing_is_kept_for_a_planner_that_uses_the_plan_cache_of_torch() -> None:
    plans = KeptPlans()
    plans.take(part("a"), rank=0)
    facts = LocalFacts("host", None, ())
    planner = DefaultSavePlanner(enable_plan_caching=True)
    assert plans.with_digest(facts, SavePlan([]), planner, rank=0) is facts
