"""Retention: which steps go, and what never goes whatever the limits are."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.manager.retention import KeepBest, KnownStep, Retention, plan_retention

KNOWN = st.builds(
    KnownStep,
    st.integers(0, 60),
    st.booleans(),
    has_export=st.booleans(),
    needs_export=st.booleans(),
    metrics=st.dictionaries(st.just("loss"), st.floats(allow_nan=True), max_size=1),
)
STEPS = st.lists(KNOWN, max_size=20, unique_by=lambda one: one.step)
LIMIT = st.none() | st.integers(1, 5)


@st.composite
def retentions(draw: st.DrawFn) -> Retention:
    keep_last = draw(LIMIT)
    if keep_last is None:
        return Retention(export_keep_last=draw(LIMIT))
    best = draw(st.none() | st.builds(KeepBest, st.just("loss"), st.sampled_from(("min", "max"))))
    return Retention(keep_last, draw(LIMIT), best, draw(LIMIT))


def steps(*numbers: int, **facts: bool) -> list[KnownStep]:
    return [KnownStep(number, **facts) for number in numbers]


@given(known=STEPS, retention=retentions(), protected=st.sets(st.integers(0, 60), max_size=3))
def test_newest_pinned_and_protected_steps_always_stay(
    known: list[KnownStep], retention: Retention, protected: set[int]
) -> None:
    plan = plan_retention(known, retention, protected=protected)
    numbers = {one.step for one in known}
    stay = {one.step for one in known if one.is_pinned} | (protected & numbers)
    if known:
        stay.add(max(numbers))
    assert not stay & set(plan.delete)
    assert set(plan.delete) <= numbers
    assert list(plan.delete) == sorted(plan.delete)


@given(known=STEPS, retention=retentions())
def test_plan_is_stable_once_it_was_applied(known: list[KnownStep], retention: Retention) -> None:
    plan = plan_retention(known, retention)
    left = [
        KnownStep(
            one.step,
            one.is_pinned,
            has_export=one.has_export and one.step not in plan.delete_export,
            needs_export=one.needs_export,
            metrics=one.metrics,
        )
        for one in known
        if one.step not in plan.delete
    ]
    assert plan_retention(left, retention).delete == ()
    assert plan_retention(left, retention).delete_export == ()


@given(known=STEPS, retention=retentions())
def test_export_that_its_own_half_needs_stays(known: list[KnownStep], retention: Retention) -> None:
    plan = plan_retention(known, retention)
    by_step = {one.step: one for one in known}
    for step in plan.delete_export:
        assert by_step[step].has_export
        assert not by_step[step].needs_export
        assert step not in plan.delete


@given(known=STEPS, retention=retentions())
def test_newest_export_that_is_kept_stays(known: list[KnownStep], retention: Retention) -> None:
    plan = plan_retention(known, retention)
    exports = [one.step for one in known if one.has_export and one.step not in plan.delete]
    assert not exports or max(exports) not in plan.delete_export


def test_last_steps_and_multiples_stay() -> None:
    plan = plan_retention(steps(*range(100, 1100, 100)), Retention(keep_last=2, keep_every=500))
    assert plan.delete == (100, 200, 300, 400, 600, 700, 800)


def test_keeping_one_leaves_one() -> None:
    assert plan_retention(steps(5), Retention(keep_last=1)).delete == ()
    assert plan_retention(steps(5, 6), Retention(keep_last=1)).delete == (5,)


@pytest.mark.parametrize(("mode", "kept"), [("min", 2), ("max", 3)])
def test_best_step_by_a_metric_stays(mode: str, kept: int) -> None:
    losses = {1: 0.5, 2: 0.1, 3: 0.9, 4: math.nan, 5: 0.4, 6: 0.6}
    known = [KnownStep(step, metrics={"loss": loss}) for step, loss in losses.items()]
    best = KeepBest("loss", mode)  # type: ignore[arg-type]
    plan = plan_retention(known, Retention(keep_last=1, keep_best=best))
    assert set(losses) - set(plan.delete) == {6, kept}


def test_newer_of_two_equally_good_steps_stays() -> None:
    known = [KnownStep(step, metrics={"loss": 0.5}) for step in (1, 2)] + steps(3)
    plan = plan_retention(known, Retention(keep_last=1, keep_best=KeepBest("loss")))
    assert plan.delete == (1,)


def test_old_exports_go_and_their_steps_stay() -> None:
    known = [*steps(1, 3, 5, has_export=True), *steps(2, 4)]
    plan = plan_retention(known, Retention(export_keep_last=1))
    assert (plan.delete, plan.delete_export) == ((), (1, 3))


@pytest.mark.parametrize(
    "limits",
    [{"keep_last": 0}, {"keep_last": True}, {"export_keep_last": -1}, {"keep_every": 10}],
)
def test_limits_that_cannot_be_meant_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Retention(**limits)  # type: ignore[arg-type]


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode"):
        KeepBest("loss", "low")  # type: ignore[arg-type]
