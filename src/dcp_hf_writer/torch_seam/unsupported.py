"""The error of every lookup in torch that finds nothing."""

from __future__ import annotations

import torch

from dcp_hf_writer.errors import UnsupportedTorchError


def unsupported_torch(
    missing: str, *, phase: str, expected: str, hint: str, rank: int | None = None
) -> UnsupportedTorchError:
    """Make the error that says what torch does not give, and what the caller can do.

    Args:
        missing: What was looked for, and not found.
        phase: Phase of the save or load.
        expected: Where torch holds it, in the versions looked at.
        hint: The way out.
        rank: Rank on which it is missing, if known.
    """
    return UnsupportedTorchError(
        f"cannot find {missing}, so the checks that need it cannot be made",
        rank=rank,
        phase=phase,
        expected=expected,
        found=f"nothing, with torch {torch.__version__}",
        hint=hint,
    )
