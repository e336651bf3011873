"""Failure policies: what is tried again, how long the pauses are, and what is refused."""

from __future__ import annotations

import pytest

from dcp_hf_writer.errors import (
    ConfigError,
    PlanningError,
    RankLostError,
    SaveTimeoutError,
    SlotTimeoutError,
    TargetExistsError,
    WriteError,
)
from dcp_hf_writer.manager.failure_policy import Retry, can_help, rules_of


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (WriteError("full"), True),
        (SlotTimeoutError("busy"), True),
        (TargetExistsError("there"), False),
        (PlanningError("odd"), False),
        (SaveTimeoutError("late"), False),
        (RankLostError("gone"), False),
        (ValueError("odd"), False),
    ],
)
def test_another_try_is_for_errors_of_the_storage(error: Exception, *, expected: bool) -> None:
    assert can_help(error) is expected


def test_pauses_double_up_to_the_longest_and_end_with_the_tries() -> None:
    rules = rules_of(Retry(times=4, pause_s=1, max_pause_s=3, then="warn"))
    pauses = [rules.pause_before_retry(WriteError("full"), attempts=n) for n in range(1, 6)]
    assert pauses == [1, 2, 3, 3, None]
    assert rules.then == "warn"


def test_word_retry_means_three_tries_and_then_an_error() -> None:
    rules = rules_of("retry")
    assert (rules.retry.times, rules.then) == (3, "raise")


@pytest.mark.parametrize("word", ["raise", "warn", "stop", print])
def test_other_policies_try_once(word: object) -> None:
    assert rules_of(word).pause_before_retry(WriteError("full"), attempts=1) is None


@pytest.mark.parametrize("value", ["ignore", None, 3])
def test_unknown_policy_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="on_failure"):
        rules_of(value)
