"""The facts that a rank sends with its local plan, and the checks before and after sending."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import torch.distributed as dist

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.plan.global_plan import LocalFacts
from dcp_hf_writer.preflight.compare_ranks import check_samples
from dcp_hf_writer.preflight.drifted_ties import (
    lone_ties,
    names_if_tied,
    tie_apart,
    untrue_tie,
)
from dcp_hf_writer.preflight.plan_check import check_plan
from dcp_hf_writer.preflight.rank_samples import samples_of
from dcp_hf_writer.preflight.value_checks import check_tensors, encoded_weight
from dcp_hf_writer.save.owner_process import page_cache_id
from dcp_hf_writer.save.rank_progress import other_path
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import is_url, shown_url
from dcp_hf_writer.torch_seam.unsupported_torch import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed.checkpoint.planner import SavePlan

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.save.save_context import RankView

# Ranks whose path the error shows.
_MOST_PATHS = 4


def local_facts(
    plan: SavePlan,
    view: RankView,
    *,
    target: str,
    is_coordinator: bool,
    export: HFExport | None,
    group: dist.ProcessGroup | None,
    names: Mapping[str, str],
    weights: str = "both",
    is_dry_run: bool = False,
) -> LocalFacts:
    """Check a rank's plan, and return the facts to send with it.

    Args:
        plan: The planner's plan on this rank.
        view: What this rank is to save.
        target: Path of the checkpoint.
        is_coordinator: Whether this rank is the coordinator.
        export: Options of the export.
        group: Process group of the save.
        names: What `names_of_ties` returned.
        weights: The writer's option.
        is_dry_run: Whether no tensor will be written. Tensors may then have no data, and the caller
            looks for tensors that cannot be saved.

    Raises:
        PlanningError: If the plan leaves out blocks that this rank holds.
        StagingError: If a tensor cannot be saved.
        UnsupportedTorchError: If the planner reuses a plan and does not show it.
    """
    check_plan(plan, view.planned, export)
    if not is_dry_run:
        check_tensors(view.planned)
    return LocalFacts(
        host=page_cache_id(target),
        order=_order(plan, view) if is_coordinator else None,
        tied=view.tied(),
        samples=samples_of(
            view.planned,
            key=None if export is None else export.key,
            world_size=dist.get_world_size(group) if dist.is_initialized() else 1,
        ),
        stamp=uuid.uuid4().hex,
        lone_ties=() if export is None else lone_ties(names.values(), export),
        target=target,
        options=_options(export, weights),
    )


def _options(export: HFExport | None, weights: str) -> str:
    """Return the options that decide what a save writes, except those that only rank 0 reads."""
    if export is None:
        return "export=None"
    shown = [f"{name}={getattr(export, name)!r}" for name in ("key", "dtype", "subdir")]
    if export.path is not None:
        path = plain_path(export.path)
        shown.append(f"path={shown_url(path) if is_url(path) else path!r}")
    return f"export=HFExport({', '.join(shown)}), weights={weights!r}"


def _order(plan: SavePlan, view: RankView) -> tuple[str, ...]:
    """Return FQNs in state-dict order."""
    # Not from the plan alone: it has no item for a tensor that only other ranks hold, but the
    # state dict gives that tensor a place in the order.
    planned = (item.index.fqn for item in plan.items)
    return tuple(dict.fromkeys((*view.planned.state_dict, *planned)))


def names_of_ties(view: RankView, export: HFExport | None) -> Mapping[str, str]:
    """Return the name of each tensor of the model, by FQN; empty if no tie is declared."""
    return {} if export is None else names_if_tied(view.planned, export)


def export_fault(
    view: RankView, export: HFExport | None, names: Mapping[str, str], *, rank: int
) -> ExportError | None:
    """Return why the export cannot hold what this rank has; `None` if it can.

    Args:
        view: What this rank is to save.
        export: Options of the export; `None` if there is none.
        names: What `names_of_ties` returned.
        rank: This rank.
    """
    if export is None:
        return None
    error = untrue_tie(view.planned, names, export, view.memory, rank=rank)
    return error or encoded_weight(view.planned, export, rank=rank)


def check_facts(plans: Sequence[SavePlan]) -> None:
    """Check that the facts of the ranks agree (coordinator).

    Args:
        plans: Plan of each rank, in rank order. A plan without `LocalFacts` is skipped here; global
            planning refuses it.

    Raises:
        PlanningError: If ranks hold different tensors under one name.
    """
    facts = [plan.storage_data for plan in plans]
    check_samples([fact.samples if isinstance(fact, LocalFacts) else b"" for fact in facts], plans)


def check_targets(plans: Sequence[SavePlan], target: str) -> None:
    """Check that all ranks save to one path (coordinator).

    Args:
        plans: Plan of each rank as the rank sent it, in rank order. A plan that is not usable is
            one that DCP's plan cache replaces; such a rank looks for the coordinator's path itself.
        target: Path of the coordinator.

    Raises:
        ConfigError: If a rank saves to another path; names the ranks and their paths.
    """
    others = [
        f"rank {rank}: {facts.target}"
        for rank, facts in _sent_facts(plans).items()
        if facts.target not in (target, None)
    ]
    if others:
        raise other_path(target, some_of(others, most=_MOST_PATHS))


def check_same_options(plans: Sequence[SavePlan]) -> None:
    """Check that the writers of all ranks have the same options (coordinator).

    Otherwise the coordinator's options would win in silence.

    Args:
        plans: Plan of each rank as the rank sent it, in rank order; the coordinator's is the first.

    Raises:
        ConfigError: If the options of a rank differ; names the ranks and their options.
    """
    sent = {rank: facts.options for rank, facts in _sent_facts(plans).items()}
    first = next(iter(sent.values()), "")
    others = [f"rank {rank}: {text}" for rank, text in sent.items() if text != first]
    if others:
        raise ConfigError(
            "the writers of the ranks have different options",
            phase="plan",
            expected=f"on every rank {first}",
            found=some_of(others, most=_MOST_PATHS),
            hint="make the writer with the same options on every rank",
        )


def _sent_facts(plans: Sequence[SavePlan]) -> dict[int, LocalFacts]:
    """Return the facts in the plans that ranks sent whole, by rank."""
    return {
        rank: plan.storage_data
        for rank, plan in enumerate(plans)
        if plan.usable and isinstance(plan.storage_data, LocalFacts)
    }


def untrue_tie_of_ranks(plans: Sequence[SavePlan]) -> ExportError | None:
    """Return why there is no export if two tied tensors lie on different ranks (coordinator only).

    Args:
        plans: The global plan.
    """
    facts = (plan.storage_data for plan in plans)
    return tie_apart(t for fact in facts if isinstance(fact, LocalFacts) for t in fact.lone_ties)


def check_reported_facts(plans: Sequence[SavePlan], reports: Sequence[RankReport]) -> None:
    """Check the facts that DCP's plan cache withheld from the coordinator in the planning step.

    The ranks have sent these facts with their reports instead.

    Args:
        plans: Plan of each rank, in rank order, with the facts of this save or of an earlier one.
        reports: One report for each rank, in rank order.

    Raises:
        PlanningError: If ranks hold different tensors under one name.
        UnsupportedTorchError: If a rank's facts are in neither its plan nor its report.
    """
    samples = []
    for plan, report in zip(plans, reports, strict=True):
        facts, found = plan.storage_data, report.samples
        if isinstance(facts, LocalFacts) and facts.stamp == report.stamp:
            found = facts.samples
        if found is None:
            raise unsupported_torch(
                "the facts that a rank sent along with its plan",
                rank=report.rank,
                phase="finish",
                expected="the storage_data of each plan of this save",
                hint="pass a planner with enable_plan_caching=False",
            )
        samples.append(found)
    check_samples(samples, plans)
