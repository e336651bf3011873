"""The error for a lookup in torch that finds nothing, or not the right thing."""

from __future__ import annotations

import torch

from dcp_hf_writer.errors import UnsupportedTorchError


def unsupported_torch(
    missing: str,
    *,
    phase: str,
    expected: str,
    hint: str,
    found: str = "nothing",
    rank: int | None = None,
) -> UnsupportedTorchError:
    """Make the error that says what could not be found in torch, and what the caller can do.

    Args:
        missing: What the lookup did not find.
        phase: Phase of the save or load.
        expected: Where torch keeps it, in the versions that this package was written for.
        hint: What the caller can do.
        found: What the lookup found instead.
        rank: Rank on which the lookup failed, if known.
    """
    return UnsupportedTorchError(
        f"cannot find {missing}, so the checks that need it cannot run",
        rank=rank,
        phase=phase,
        expected=expected,
        found=f"{found}, with torch {torch.__version__}",
        hint=hint,
    )
