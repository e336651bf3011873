"""Make export options from a transformers `config.json`, without a live model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.integrations.architecture_of_config import class_of_config
from dcp_hf_writer.integrations.transformers import export_options
from dcp_hf_writer.integrations.unsharded_meta_model import on_meta_device

if TYPE_CHECKING:
    from collections.abc import Mapping


def options_of_config(config: bytes, *, path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `HFExport` options: those of `HFExport.from_transformers` of the config's model.

    The model is built without data. This runs no code of a checkpoint: transformers itself must
    have the architecture.

    Args:
        config: Content of `config.json`.
        path: Path of the file, for errors.
        options: Options of `HFExport`; `assets` replaces the files that a live model would add.

    Raises:
        ConfigError: If transformers is not installed or does not have the architecture, or the
            config is of a quantised model.
        SpecError: If the layout of the model cannot be derived.
    """
    model = model_of_config(config, path=path)
    found = export_options(model, None, None, "model", {**options, "assets": ()})
    return {**found, "assets": options.get("assets", ())}


def model_of_config(config: bytes, *, path: str) -> Any:
    """Return the model of a `config.json`, without data.

    Raises:
        ConfigError: As `options_of_config`.
    """
    try:
        values = json.loads(config)
    except ValueError as error:
        raise ConfigError("a config is no JSON", path=path, found=str(error)) from error
    if not isinstance(values, dict) or "quantization_config" in values:
        kind = "a quantised model" if isinstance(values, dict) else type(values).__name__
        msg = "specs cannot be derived from this config"
        raise ConfigError(msg, path=path, expected="a config of plain weights", found=kind)
    found = class_of_config(values)
    if isinstance(found, str) or not found[1]:
        raise ConfigError(
            "specs cannot be derived from this config",
            path=path,
            expected="an architecture that the installed transformers has",
            found=found if isinstance(found, str) else "no architectures",
            hint="pass specs of your own",
        )
    (kind_of_model, own), _ = found
    return on_meta_device(kind_of_model, own)
