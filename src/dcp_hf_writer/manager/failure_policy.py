"""What happens when a save fails: raise, warn, retry, stop, or call a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dcp_hf_writer.errors import (
    CommitError,
    ConfigError,
    SlotTimeoutError,
    StorageError,
    TargetExistsError,
)

FailureAction = Literal["raise", "warn", "stop"]


@dataclass(frozen=True, slots=True)
class SaveFailure:
    """A save that failed for good; the same on every rank, but for `rank`."""

    step: int
    """Step of the save."""
    path: str
    """Where the checkpoint would have been."""
    error: BaseException
    """What went wrong."""
    is_committed: bool
    """Whether the DCP half is committed all the same, so that only the export is missing."""
    attempts: int
    """How many times the save was tried."""
    rank: int
    """This rank."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Save the same snapshot again if the storage refused it, each time after a longer pause."""

    times: int = 3
    """How often to try again."""
    pause_s: float = 1.0
    """Seconds before the first new try; the pause doubles with each further one."""
    max_pause_s: float = 60.0
    """Longest pause, in seconds."""
    then: FailureAction | Callable[[SaveFailure], Any] = "raise"
    """What happens when the last try has failed too, or trying again cannot help."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.times < 0 or self.pause_s < 0 or self.max_pause_s < 0:
            msg = "Retry needs numbers of zero or more"
            raise ConfigError(msg, found=repr(self))
        _check_action(self.then)

    def pause_before(self, attempt: int) -> float:
        """Return the seconds to wait before the try number `attempt`; the first retry is 2."""
        return float(min(self.pause_s * 2 ** (attempt - 2), self.max_pause_s))


FailurePolicy = FailureAction | Retry | Callable[[SaveFailure], Any] | Literal["retry"]


@dataclass(frozen=True, slots=True)
class FailureRules:
    """A failure policy in its full form."""

    retry: Retry
    """How often a save is tried again."""
    then: FailureAction | Callable[[SaveFailure], Any]
    """What happens after the last try."""

    def pause_before_retry(self, error: BaseException, *, attempts: int) -> float | None:
        """Return the seconds to wait before the next try; `None` if there is no next try.

        Args:
            error: Why the latest try failed.
            attempts: How many tries there were.
        """
        if attempts > self.retry.times or not can_help(error):
            return None
        return self.retry.pause_before(attempts + 1)


def rules_of(policy: Any) -> FailureRules:
    """Return the full form of the option `on_failure`.

    Raises:
        ConfigError: If it is none of the values allowed.
    """
    if policy == "retry":
        policy = Retry()
    if isinstance(policy, Retry):
        return FailureRules(policy, policy.then)
    _check_action(policy)
    return FailureRules(Retry(times=0), policy)


def _check_action(value: Any) -> None:
    is_word = isinstance(value, str) and value in {"raise", "warn", "stop"}
    if not is_word and not callable(value):
        raise ConfigError(
            "on_failure must say what happens when a save fails",
            expected='"raise", "warn", "retry", "stop", Retry(...) or a function',
            found=repr(value),
        )


def can_help(error: BaseException) -> bool:
    """Whether another try from the same snapshot may succeed: the storage may have recovered.

    What does not fit the options will not fit later. After the deadline or a lost rank, a thread of
    the failed save may still be at work in the process group.
    """
    if isinstance(error, (TargetExistsError, CommitError)):
        return isinstance(error, CommitError)
    return isinstance(error, (StorageError, SlotTimeoutError))
