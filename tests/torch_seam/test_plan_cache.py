"""torch's plan cache: without it, or without what it hides, no reused plan is believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.preflight import rank_facts
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
from support.plan_caches import clear_caches
from support.rank_tensors import tensor
from support.ranks import run_ranks
from support.small_states import difference, state_of

if TYPE_CHECKING:
    from pathlib import Path


def caching(carried: object = None) -> CarryingPlanner:
    return CarryingPlanner(carried, enable_plan_caching=True)


def lost_and_found(rank: int, world_size: int, root: Path, kind: str) -> None:
    """Without its caches, torch plans anew; what it then keeps by itself is not believed."""
    del rank
    mesh = init_device_mesh("cpu", (world_size,))
    lost, carried = (None, LostInTheChild("caches")) if kind == "process" else ("caches", None)
    save(kind, state_of(1, mesh), HFDualWriter(root / "step-1"), planner=caching())
    with without(lost):
        save(kind, state_of(2, mesh), HFDualWriter(root / "step-2"), planner=caching(carried))
        said = refusal(kind, state_of(6, mesh), HFDualWriter(root / "x"), planner=caching())
        assert said is not None
        assert "enable_plan_caching=False" in said
        assert_nothing_is_there(root, "x")
        save(kind, state_of(3, mesh), HFDualWriter(root / "step-3"))
    for step in (4, 5):
        found = caching(Restored())
        save(kind, state_of(step, mesh), HFDualWriter(root / f"step-{step}"), planner=found)


@pytest.mark.parametrize("kind", KINDS)
def test_reused_plan_is_refused_when_the_cache_cannot_be_found(tmp_path: Path, kind: str) -> None:
    run_ranks(lost_and_found, 2, tmp_path, kind)
    for step in (1, 2, 3, 4, 5):
        assert difference(tmp_path / f"step-{step}", step) is None


class ForgetfulPlanner(CarryingPlanner):
    """Does not show the global plan that it reuses."""

    def create_global_plan(self, all_plans: Any) -> Any:
        found = super().create_global_plan(all_plans)
        if not all(plan.usable for plan in found[0]):
            del self.global_plan
        return found


def test_reused_plan_is_refused_when_the_planner_does_not_show_it(tmp_path: Path) -> None:
    clear_caches()
    options = {"no_dist": True, "planner": ForgetfulPlanner(enable_plan_caching=True)}
    save("sync", state_of(1), HFDualWriter(tmp_path / "step-1"), **options)
    said = refusal("sync", state_of(2), HFDualWriter(tmp_path / "x"), **options)
    assert said is not None
    assert "enable_plan_caching=False" in said
    assert_nothing_is_there(tmp_path, "x")
    clear_caches()


def model_of(rank: int, *, is_same: bool) -> dict[str, Any]:
    return {"model": {"w": tensor("w" if is_same else f"w of {rank}", 4, 3)}}


def save_replicas_that_part(rank: int, world_size: int, root: Path, kind: str) -> None:
    """Plans do not change, so torch shows the coordinator nothing of the second save."""
    del world_size
    save(kind, model_of(rank, is_same=True), HFDualWriter(root / "step-1"), planner=caching())
    for name in ("x", "y"):
        with pytest.raises(PlanningError, match="different tensors under one name"):
            save(kind, model_of(rank, is_same=False), HFDualWriter(root / name), planner=caching())
        assert_nothing_is_there(root, name)
    save(kind, model_of(rank, is_same=True), HFDualWriter(root / "step-2"), planner=caching())


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_differ_are_seen_though_torch_hides_the_plans(
    tmp_path: Path, kind: str
) -> None:
    run_ranks(save_replicas_that_part, 2, tmp_path, kind)
    assert (tmp_path / "step-2").exists()


def save_when_one_plan_changes(rank: int, world_size: int, root: Path) -> None:
    """The plan of one rank is new, and the facts that torch shows of the other are old."""
    del world_size
    for step, is_same in enumerate((True, False, True)):
        state = model_of(rank, is_same=is_same)
        if rank:
            state["model"][f"only here {step}"] = torch.ones(3)
        # Equal on both ranks, and different from what the ranks last sent.
        state["model"]["v"] = tensor(f"v@{step}", 4, 3)
        writer = HFDualWriter(root / f"step-{step}")
        if is_same:
            save("thread", state, writer, planner=caching())
        else:
            with pytest.raises(PlanningError, match="different tensors under one name"):
                save("thread", state, writer, planner=caching())
            assert_nothing_is_there(root, f"step-{step}")
        dist.barrier()


def test_old_facts_are_not_compared_with_new_ones(tmp_path: Path) -> None:
    run_ranks(save_when_one_plan_changes, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-2"]


def save_without_reported_facts(rank: int, world_size: int, root: Path) -> None:
    """A rank whose facts are neither in the plan nor in its report."""
    del world_size
    save("thread", model_of(rank, is_same=True), HFDualWriter(root / "step-1"), planner=caching())
    check = rank_facts.check_reported_facts

    def forget(plans: Any, reports: Any) -> None:
        for report in reports:
            report.samples = None
        check(plans, reports)

    rank_facts.check_reported_facts = forget
    writer = HFDualWriter(root / "x")
    said = refusal("thread", model_of(rank, is_same=True), writer, planner=caching())
    assert said is not None
    assert "sent along with its plan" in said
    assert_nothing_is_there(root, "x")


def test_save_is_refused_when_the_facts_of_a_rank_are_nowhere(tmp_path: Path) -> None:
    run_ranks(save_without_reported_facts, 2, tmp_path)
