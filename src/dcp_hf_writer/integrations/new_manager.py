"""Make the `CheckpointManager` of a trainer, and load from elsewhere.

Both lie above this folder, so they are imported by name.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch.distributed.checkpoint.state_dict_loader import load

from dcp_hf_writer.errors import ConfigError


def new_manager(root: str, *, options: dict[str, Any]) -> Any:
    """Make a `CheckpointManager`; all ranks call it together.

    Args:
        root: Directory of the run.
        options: Options of the manager.

    Raises:
        CheckpointError: As `CheckpointManager`.
    """
    module = importlib.import_module("dcp_hf_writer.checkpoint_manager")
    return module.CheckpointManager(root, **options)


def load_from(path: str, state_dict: dict[str, Any], *, source: str, specs: Any) -> None:
    """Load a state dict in place with an `HFDualReader`; all ranks call it together.

    Args:
        path: A checkpoint, or a HuggingFace directory.
        state_dict: Loaded in place.
        source: As in `HFDualReader`.
        specs: As in `HFDualReader`.

    Raises:
        CheckpointError: As `HFDualReader`.
    """
    module = importlib.import_module("dcp_hf_writer.reader")
    load(state_dict, storage_reader=module.HFDualReader(path, source=source, specs=specs))


def check_free(options: dict[str, Any], fixed: dict[str, str]) -> None:
    """Check that no option is one that the trainer decides.

    Args:
        options: Options that the user gave.
        fixed: Options that the trainer decides, each with where the user sets it instead.

    Raises:
        ConfigError: If one is.
    """
    for name in options.keys() & fixed.keys():
        raise ConfigError(
            f"the option {name} cannot be set here",
            expected=fixed[name],
            found=f"{name}={options[name]!r}",
        )
