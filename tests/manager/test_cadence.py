"""Cadences: when a save is due, and how they join."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.manager.cadence import (
    Cadence,
    EverySeconds,
    EverySteps,
    FirstStep,
    LastStep,
    Never,
    as_cadence,
)
from dcp_hf_writer.manager.save_schedule import DueSave, SaveSchedule, schedule_of


@given(count=st.integers(1, 50), last=st.integers(0, 300))
def test_steps_are_due_at_multiples_and_never_at_zero(count: int, last: int) -> None:
    due = [step for step in range(last) if EverySteps(count).is_due_at(step, is_first=False)]
    assert due == list(range(count, last, count))


def test_seconds_are_due_after_the_time_and_at_no_step() -> None:
    cadence = EverySeconds(10)
    asked = [cadence.is_due_after(seconds) for seconds in (0, 9.9, 10, 11)]
    assert asked == [False, False, True, True]
    assert not cadence.is_due_at(10, is_first=True)


def test_joined_cadences_are_due_whenever_one_is() -> None:
    joined = EverySteps(10) | EverySeconds(5) | FirstStep() | LastStep()
    assert joined.is_due_at(10, is_first=False)
    assert joined.is_due_at(3, is_first=True)
    assert not joined.is_due_at(3, is_first=False)
    assert joined.is_due_after(5)
    assert joined.is_due_at_close()
    assert joined.uses_clock
    assert not (EverySteps(10) | LastStep()).uses_clock


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, Never()),
        (500, EverySteps(500)),
        (timedelta(minutes=2), EverySeconds(120)),
        (FirstStep(), FirstStep()),
    ],
)
def test_option_stands_for_a_cadence(value: object, expected: Cadence) -> None:
    assert as_cadence("save_every", value) == expected


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "500", timedelta(0)])
def test_option_is_refused_with_its_name_or_value(value: object) -> None:
    with pytest.raises(ConfigError, match=r"cadence|save_every"):
        as_cadence("save_every", value)


@pytest.mark.parametrize("name", ["export_every", "snapshot_every"])
def test_clock_is_for_saves_alone(name: str) -> None:
    options = {"save_every": 1, "export_every": None, "snapshot_every": None}
    with pytest.raises(ConfigError, match=f"{name} must be in steps"):
        schedule_of(**{**options, name: timedelta(hours=1)}, has_export=True)


def schedule(**changes: object) -> SaveSchedule:
    given_: dict[str, object] = {
        "save_every": EverySteps(10),
        "export_every": EverySteps(15),
        "snapshot_every": EverySteps(5),
        "has_export": True,
    }
    return SaveSchedule(**{**given_, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (4, None),
        (5, DueSave(is_snapshot=True)),
        (10, DueSave()),
        (15, DueSave(has_export=True)),
        (30, DueSave(has_export=True)),
    ],
)
def test_step_is_saved_once_with_all_that_is_due(step: int, expected: DueSave | None) -> None:
    assert schedule().due_at(step, is_first=False, is_called=False) == expected


def test_save_that_is_called_for_is_no_snapshot() -> None:
    assert schedule().due_at(5, is_first=False, is_called=True) == DueSave()


def test_every_save_exports_when_export_every_is_not_given() -> None:
    always = schedule(export_every=None)
    assert always.due_at(10, is_first=False, is_called=False) == DueSave(has_export=True)
    assert always.by_hand(3, export=None) == DueSave(has_export=True)
    assert always.by_hand(3, export=False) == DueSave()


def test_run_without_an_export_never_exports() -> None:
    none = schedule(has_export=False)
    assert none.due_at(15, is_first=False, is_called=False) == DueSave(is_snapshot=True)
    assert none.by_hand(15, export=None) == DueSave()
