"""Plan a save: both halves, or the DCP half alone if the export cannot be planned (coordinator)."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import (
    CheckpointError,
    ConfigError,
    CoverageError,
    ExportError,
)
from dcp_hf_writer.mapping.architecture import wrapper_advice
from dcp_hf_writer.mapping.model_entry import is_usual_beside
from dcp_hf_writer.plan.global_plan import shapes_of
from dcp_hf_writer.said_once import SAID_ONCE
from dcp_hf_writer.save.coordinator import export_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.distributed.checkpoint.planner import SavePlan

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.export_assets import Assets

    Planned = tuple[GlobalPlan, list[SavePlan] | None]

_log = logging.getLogger(__name__)


def export_of(
    export: HFExport | None, attempt: Attempt, read: Callable[..., Assets]
) -> tuple[HFExport | None, Assets | None]:
    """Return an export with its assets; if they cannot be read, record why and return `None`s.

    Args:
        export: Options of the export; `None` for the DCP half only.
        attempt: The save.
        read: Returns the assets of an export; raises what kept staging from reading them.
    """
    if export is None:
        return None, None
    try:
        return export, read(export, is_staged=attempt.context.staged is not None)
    except (ExportError, ConfigError) as error:
        attempt.leave_out_export(unplanned_export(error, rank=attempt.rank))
        return None, None


def unplanned_export(error: Exception, *, rank: int | None = None) -> ExportError:
    """Make the error that tells all ranks why there is no export.

    Args:
        error: Why the export cannot be planned.
        rank: The coordinator.
    """
    if isinstance(error, ExportError):
        return error
    facts = {}
    found: object = f"{type(error).__name__}: {error}"
    if isinstance(error, CheckpointError):
        facts = {name: getattr(error, name) for name in ("path", "fqn", "key", "expected")}
        found = error.found
    made = ExportError(
        f"the export cannot be planned, so only the DCP half is saved: {_problem(error)}",
        rank=rank,
        phase="plan",
        **facts,
        found=found,
        hint=getattr(error, "hint", None),
    )
    # Without its traceback, whose frames would keep the state dict as long as somebody holds it.
    made.__cause__ = error.with_traceback(None)
    return made


def _problem(error: Exception) -> str:
    return error.problem if isinstance(error, CheckpointError) else "planning failed"


def plan_or_leave_out(
    plan: Callable[[list[SavePlan], HFExport | None, Assets | None], Planned],
    plans: list[SavePlan],
    export: HFExport | None,
    assets: Assets | None,
    attempt: Attempt,
) -> Planned:
    """Plan both halves; if the export cannot be planned, record why and plan the DCP half alone.

    Args:
        plan: Makes the global plan and the plan of each rank.
        plans: DCP's plans, one per rank.
        export: Options of the export; `None` for the DCP half only.
        assets: Assets of the export.
        attempt: The save.

    Raises:
        CoverageError: If the ranks' parts do not cover a tensor of the model exactly once. The DCP
            half would lack data too.
        PlanningError: If the DCP half cannot be planned either.
    """
    if export is None or assets is None:
        return plan(plans, None, None)
    try:
        planned = plan(plans, export, assets)
        export_files(planned[0].layout, assets, export)
    except CoverageError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        if not isinstance(error, CheckpointError):
            _log.warning("planning the export failed", exc_info=error)
        attempt.leave_out_export(unplanned_export(error, rank=attempt.rank))
        return plan(plans, None, None)
    say_left_out(planned[0], attempt.target)
    if assets.architecture is None and not export.declared_names and planned[0].layout is not None:
        _warn_of_wrapper(shapes_of(planned[0].layout))
    return planned


def _warn_of_wrapper(keys: Iterable[str]) -> None:
    """Warn if all names look like those of a wrapped model, and no config can tell better."""
    advice = wrapper_advice(keys)
    if advice is not None:
        SAID_ONCE.warn(_log, f"all names of the export begin with {advice}")


def say_left_out(plan: GlobalPlan, target: str) -> None:
    """Log what the export leaves out, the same only once; warn if there is nothing to export."""
    texts = ", ".join(plan.left_out)
    if plan.layout is None:
        held = f"it holds only {texts}" if texts else "it holds no tensors"
        _log.warning(
            "checkpoint %s has no export, because the state dict holds no weights: %s; pass "
            "export=None, or name the model's entry with HFExport(key=...)",
            target,
            held,
        )
        return
    if not texts or not SAID_ONCE.is_new(texts):
        return
    entry = ".".join(map(str, plan.entry))
    level = logging.INFO if entry and _is_usual(plan) else logging.WARNING
    what = f"the entry {entry!r}" if entry else "the tensors at the top of the state dict"
    _log.log(level, "the export holds %s; only the DCP half holds %s", what, texts)


def _is_usual(plan: GlobalPlan) -> bool:
    beside = (tensor.path for fqn, tensor in plan.tensors.items() if fqn not in plan.names)
    return all(is_usual_beside(path, plan.entry) for path in beside)
