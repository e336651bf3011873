"""When a run saves: small policies that can be joined with `|`.

Pure: a cadence looks at no clock and talks to no rank. It answers two kinds of question. What
depends on the step number alone has the same answer on every rank. What depends on the clock is
asked on one rank only, which tells the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dcp_hf_writer.errors import ConfigError


class Cadence:
    """Says when a save is due. A subclass overrides the questions that it has an answer to."""

    uses_clock: bool = False
    """Whether `is_due_after` can ever be true."""

    def is_due_at(self, step: int, *, is_first: bool) -> bool:
        """Whether a save is due at a step.

        Args:
            step: Number of the step that has just ended.
            is_first: Whether this is the first step that the run reports.
        """
        del step, is_first
        return False

    def is_due_after(self, seconds: float) -> bool:
        """Whether a save is due because the last one began `seconds` ago. Asked on one rank."""
        del seconds
        return False

    def is_due_at_close(self) -> bool:
        """Whether the last step of the run is saved when the manager closes."""
        return False

    def __or__(self, other: Cadence) -> Cadence:
        """Return the cadence that is due whenever one of both is."""
        return AnyOf((self, other))


@dataclass(frozen=True, slots=True)
class EverySteps(Cadence):
    """Due at every step whose number is a multiple of `count`."""

    count: int
    """Number of steps from one save to the next."""

    def __post_init__(self) -> None:
        """Check the count."""
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            msg = "a cadence in steps must be a whole number above zero"
            raise ConfigError(msg, expected="for example 500", found=repr(self.count))

    def is_due_at(self, step: int, *, is_first: bool) -> bool:
        """See `Cadence.is_due_at`."""
        del is_first
        return step > 0 and step % self.count == 0


@dataclass(frozen=True, slots=True)
class EverySeconds(Cadence):
    """Due when the last save began `seconds` ago or more."""

    seconds: float
    """Seconds from one save to the next."""

    uses_clock = True

    def __post_init__(self) -> None:
        """Check the number of seconds."""
        if not self.seconds > 0:
            msg = "a cadence in seconds must be above zero"
            raise ConfigError(msg, expected="for example 900.0", found=repr(self.seconds))

    def is_due_after(self, seconds: float) -> bool:
        """See `Cadence.is_due_after`."""
        return seconds >= self.seconds


@dataclass(frozen=True, slots=True)
class FirstStep(Cadence):
    """Due at the first step of the run, so that a broken setup shows at once."""

    def is_due_at(self, step: int, *, is_first: bool) -> bool:
        """See `Cadence.is_due_at`."""
        del step
        return is_first


@dataclass(frozen=True, slots=True)
class LastStep(Cadence):
    """Due when the manager closes, for the last step that the run reported."""

    def is_due_at_close(self) -> bool:
        """See `Cadence.is_due_at_close`."""
        return True


@dataclass(frozen=True, slots=True)
class Never(Cadence):
    """Never due: only `save` saves."""


@dataclass(frozen=True, slots=True)
class AnyOf(Cadence):
    """Due whenever one of its parts is."""

    parts: tuple[Cadence, ...]
    """The parts."""

    @property
    def uses_clock(self) -> bool:  # type: ignore[override]
        """Whether a part asks the clock."""
        return any(part.uses_clock for part in self.parts)

    def is_due_at(self, step: int, *, is_first: bool) -> bool:
        """See `Cadence.is_due_at`."""
        return any(part.is_due_at(step, is_first=is_first) for part in self.parts)

    def is_due_after(self, seconds: float) -> bool:
        """See `Cadence.is_due_after`."""
        return any(part.is_due_after(seconds) for part in self.parts)

    def is_due_at_close(self) -> bool:
        """See `Cadence.is_due_at_close`."""
        return any(part.is_due_at_close() for part in self.parts)


def as_cadence(name: str, value: Any, *, may_use_clock: bool = True) -> Cadence:
    """Return the cadence that an option stands for.

    Args:
        name: Name of the option, for the message.
        value: A number of steps, a `timedelta`, a `Cadence`, or `None` for never.
        may_use_clock: Whether the cadence may depend on the clock.

    Raises:
        ConfigError: If the value is none of these.
    """
    if isinstance(value, timedelta):
        value = EverySeconds(value.total_seconds())
    if isinstance(value, Cadence) and value.uses_clock and not may_use_clock:
        raise ConfigError(
            f"{name} must be in steps, which are the same on every rank",
            expected="a number of steps, or EverySteps(500)",
            found=repr(value),
            hint="use the clock for save_every",
        )
    if value is None:
        return Never()
    if isinstance(value, Cadence):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return EverySteps(value)
    raise ConfigError(
        f"{name} must say when to save",
        expected="a number of steps, a timedelta, a cadence such as EverySteps(500), or None",
        found=repr(value),
    )
