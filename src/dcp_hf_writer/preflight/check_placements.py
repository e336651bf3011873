"""Refuse DTensors whose placements no checkpoint can hold, by name and before torch plans them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import PlanningError

if TYPE_CHECKING:
    from collections.abc import Mapping


def refuse_partial(values: Mapping[str, Any], *, phase: Literal["plan", "read"]) -> None:
    """Refuse `Partial` placements: each rank holds a summand, and none holds a value.

    Args:
        values: The flat state dict to save or to load into, by FQN.
        phase: Phase of the save or load, for the message.

    Raises:
        PlanningError: If a DTensor has such a placement; names the first one.
    """
    for fqn, value in values.items():
        if isinstance(value, DTensor) and any(p.is_partial() for p in value.placements):
            placements = list(value.placements)
            reduced = ["Replicate()" if p.is_partial() else repr(p) for p in placements]
            raise PlanningError(
                "a DTensor has a Partial placement, so no rank holds its values",
                phase=phase,
                fqn=fqn,
                expected="Shard or Replicate on each mesh dimension",
                found=repr(placements),
                hint=f"reduce it first: tensor.redistribute(placements=[{', '.join(reduced)}])",
            )
