"""Make the `CheckpointManager` of a trainer, which lies above this folder."""

from __future__ import annotations

import importlib
from typing import Any

from dcp_hf_writer.errors import ConfigError


def new_manager(root: str, *, fixed: dict[str, str], options: dict[str, Any]) -> Any:
    """Make a `CheckpointManager`; all ranks call it together.

    Args:
        root: Directory of the run.
        fixed: Options that the trainer decides, each with where the user sets it instead.
        options: Options of the manager.

    Raises:
        ConfigError: If an option is one that the trainer decides.
        CheckpointError: As `CheckpointManager`.
    """
    check_free(options, fixed)
    return importlib.import_module("dcp_hf_writer.checkpoint_manager").CheckpointManager(
        root, **options
    )


def check_free(options: dict[str, Any], fixed: dict[str, str]) -> None:
    """Check that no option is one that the trainer decides.

    Raises:
        ConfigError: If one is.
    """
    for name in options.keys() & fixed.keys():
        raise ConfigError(
            f"the option {name} cannot be set here",
            expected=fixed[name],
            found=f"{name}={options[name]!r}",
        )
