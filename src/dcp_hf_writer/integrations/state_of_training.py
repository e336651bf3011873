"""The state dict of a model and its optimizer, and objects that are restored later than loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from dcp_hf_writer.manager.trainer_state import RNGState

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


def state_of(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    without_frozen: bool = False,
) -> dict[str, Any]:
    """Return `{"model": ..., "optim": ...}`, by FQNs that do not depend on how a model is wrapped.

    Args:
        model: The model: plain, in DistributedDataParallel, or sharded by FSDP2.
        optimizer: Its optimizer; `None` leaves out the entry `"optim"`.
        without_frozen: Leave out parameters that are not trained.
    """
    options = StateDictOptions(ignore_frozen_params=without_frozen)
    if optimizer is None:
        return {"model": get_model_state_dict(model, options=options)}
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optim": moments}


def set_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    *,
    without_frozen: bool = False,
) -> None:
    """Set a model and its optimizer to what a load put into the result of `state_of`."""
    options = StateDictOptions(strict=not without_frozen, ignore_frozen_params=without_frozen)
    if optimizer is None:
        set_model_state_dict(model, state["model"], options=options)
        return
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=options,
    )


class DeferredRNG:
    """The random number generators of this process; a load keeps the states until `apply`.

    A trainer skips batches after it has loaded a checkpoint, and that draws random numbers.
    """

    def __init__(self) -> None:
        """Begin with nothing to apply."""
        self._loaded: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the generators now."""
        return RNGState().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the states that were saved."""
        self._loaded = state

    def apply(self) -> bool:
        """Set the generators to the states that were loaded; returns whether there were any."""
        if self._loaded is None:
            return False
        RNGState().load_state_dict(self._loaded)
        return True
