"""Which checkpoints a run keeps. Pure: facts about steps go in, a plan comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.mapping.option_values import check_whole, check_word, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Keep the `count` steps with the best values of a metric."""

    metric: str
    """Name of the metric, as in the `metrics` of a save."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is best."""
    count: int = 1
    """Number of steps to keep."""

    def __post_init__(self) -> None:
        """Check mode and count."""
        check_word("mode of keep_best", self.mode, ("min", "max"))
        check_whole("count of keep_best", self.count, least=1)


def as_keep_best(value: Any) -> KeepBest | None:
    """Return the rule that an option stands for: a `KeepBest`, `(metric, mode)`, or none.

    Raises:
        ConfigError: If it is none of these.
    """
    if value is None or isinstance(value, KeepBest):
        return value
    if isinstance(value, tuple) and len(value) == 2:  # noqa: PLR2004 - metric and mode
        return KeepBest(*value)
    raise ConfigError(
        "keep_best must say which metric is best, and how",
        expected='KeepBest("loss", "min"), ("loss", "min") or None',
        found=shown(value),
    )


@dataclass(frozen=True, slots=True)
class Retention:
    """What a run keeps. Everything is kept if all limits are `None`."""

    keep_last: int | None = None
    """Number of newest steps to keep; `None` keeps all."""
    keep_every: int | None = None
    """Also keep every step that is a multiple of this number."""
    keep_best: KeepBest | None = None
    """Also keep the best steps by a metric."""
    export_keep_last: int | None = None
    """Number of newest exports to keep; of older steps only the DCP half stays."""

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in ("keep_last", "keep_every", "export_keep_last"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, least=1)
        if self.keep_last is None and (self.keep_every is not None or self.keep_best is not None):
            raise ConfigError(
                "keep_every and keep_best keep steps that keep_last would delete",
                expected="keep_last together with them",
                found="keep_last=None, which keeps every step",
            )


@dataclass(frozen=True, slots=True)
class KnownStep:
    """What retention needs to know about one committed step."""

    step: int
    """Number of the step."""
    is_pinned: bool = False
    """Whether the user asked to keep it."""
    has_export: bool = False
    """Whether it has a HuggingFace half."""
    needs_export: bool = False
    """Whether its DCP half stores weights only in the HuggingFace half."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the step."""


@dataclass(frozen=True, slots=True)
class RetentionPlan:
    """What to delete, oldest first."""

    delete: tuple[int, ...] = ()
    """Steps to delete."""
    delete_export: tuple[int, ...] = ()
    """Kept steps whose HuggingFace half is deleted."""


def plan_retention(
    steps: Sequence[KnownStep], retention: Retention, *, protected: Collection[int] = ()
) -> RetentionPlan:
    """Decide which of the committed steps go.

    The newest step, pinned steps and protected steps never go, so at least one step is left. The
    newest export never goes. An export that its own DCP half needs goes only with its step.

    Args:
        steps: The committed steps, in any order, each number once.
        retention: The limits.
        protected: Steps that must stay, such as the one that was just saved.
    """
    ordered = sorted(steps, key=lambda one: one.step)
    kept = _kept(ordered, retention) | set(protected)
    kept |= {one.step for one in ordered if one.is_pinned}
    delete = tuple(one.step for one in ordered if one.step not in kept)
    exports = [one for one in ordered if one.has_export and one.step not in delete]
    newest = {one.step for one in exports[-(retention.export_keep_last or len(exports) or 1) :]}
    stay = newest | set(protected)
    gone = (
        one.step
        for one in exports
        if one.step not in stay and not one.is_pinned and not one.needs_export
    )
    return RetentionPlan(delete, tuple(gone))


def _kept(ordered: Sequence[KnownStep], retention: Retention) -> set[int]:
    if retention.keep_last is None:
        return {one.step for one in ordered}
    kept = {one.step for one in ordered[-retention.keep_last :]}
    if retention.keep_every is not None:
        kept |= {one.step for one in ordered if one.step % retention.keep_every == 0}
    if retention.keep_best is not None:
        kept |= _best(ordered, retention.keep_best)
    return kept


def _best(ordered: Sequence[KnownStep], best: KeepBest) -> set[int]:
    sign = 1.0 if best.mode == "min" else -1.0
    values = [
        (sign * one.metrics[best.metric], -one.step, one.step)
        for one in ordered
        if best.metric in one.metrics and not math.isnan(one.metrics[best.metric])
    ]
    return {step for _, _, step in sorted(values)[: best.count]}
