"""What a run puts into each save: the trainer's state dict, and the trainer state beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.manager.trainer_state import (
    METRICS_KEY,
    RNG_NAME,
    RNGState,
    check_objects,
    with_trainer_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class RunContent:
    """Makes the state dict of each save of a rank."""

    def __init__(
        self,
        run: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None,
        rank_state: Mapping[str, Any] | None,
        *,
        save_rng: bool,
        rank: int,
    ) -> None:
        """Check what the user gave.

        Args:
            run: JSON value of the run, or a function that makes it.
            rank_state: Objects of this rank, by name.
            save_rng: Whether to save the random number generators too.
            rank: This rank.

        Raises:
            ConfigError: If an object cannot be saved and restored.
        """
        objects = dict(rank_state or {})
        check_objects(objects)
        if save_rng and RNG_NAME in objects:
            raise ConfigError(
                "the manager already saves the random number generators under this name",
                found=f"rank_state[{RNG_NAME!r}]",
                hint="pass save_rng=False",
            )
        if save_rng:
            objects[RNG_NAME] = RNGState()
        self.objects = objects
        """Objects of this rank, by name."""
        self._run, self._rank = run, rank

    def at(
        self, step: int, state_dict: Any, metrics: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """Return the state dict of the save of a step, as a new dict.

        Args:
            step: Number of the step.
            state_dict: The state dict of the trainer, or a function that makes it.
            metrics: Metrics of the step.

        Raises:
            ConfigError: If it has an entry that the manager needs, or the run's value is no JSON.
            StagingError: If the state of an object cannot be stored.
        """
        run = self._run() if callable(self._run) else self._run
        return with_trainer_state(
            state_dict() if callable(state_dict) else state_dict,
            run={"step": step, "user": dict(run or {}), METRICS_KEY: dict(metrics or {})},
            objects=self.objects,
            rank=self._rank,
        )
