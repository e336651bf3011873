"""The files of an export other than weights: config, tokenizer, processor, base model files."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from dcp_hf_writer.errors import CheckpointError, ConfigError, ExportError
from dcp_hf_writer.formats.names_on_disk import CONFIG_NAME, INDEX_SUFFIX
from dcp_hf_writer.save.model_assets import (
    config_files,
    configs_of,
    is_of_transformers,
    other_files,
    save_pretrained,
    transformers_model,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dcp_hf_writer.mapping.architecture import Architecture
    from dcp_hf_writer.mapping.hf_export import HFExport


@dataclass(frozen=True, slots=True)
class Assets:
    """What was read from `HFExport.assets` and `HFExport.like`."""

    files: Mapping[str, bytes]
    """Content by path within the export directory."""
    file_of_key: Mapping[str, str] | None
    """File name of each key in `like`; `None` without `like`."""
    architecture: Architecture | None = None
    """What the config among the files expects of the weights; `None` if nobody can tell."""


_PLAIN = (str, os.PathLike, dict)
"""Assets that any process can read."""

_cache: weakref.WeakKeyDictionary[HFExport, Assets | CheckpointError] = weakref.WeakKeyDictionary()
_cache_lock = threading.Lock()


def assets_of(export: HFExport) -> Assets:
    """Return the assets of an export; each process reads them once per `HFExport`.

    Raises:
        ExportError: If `save_pretrained` of an asset fails, or a file cannot be read.
        ConfigError: If `assets` or `like` is invalid.
    """
    with _cache_lock:
        found = _cache.get(export)
        if found is None:
            found = _cache[export] = _read(export)
    if isinstance(found, CheckpointError):
        # Raise a copy: the traceback of a raised error keeps the save's objects alive, and the
        # cache keeps this error.
        rebuild, facts = found.__reduce__()
        raise rebuild(*facts)
    return found


def _read(export: HFExport) -> Assets | CheckpointError:
    try:
        return _render(export)
    except CheckpointError as error:
        kept: CheckpointError = error
    except Exception as error:  # noqa: BLE001 - kept, and raised where all ranks see it
        msg = "the assets of the export could not be read"
        kept = ExportError(msg, phase="plan", found=f"{type(error).__name__}: {error}")
    kept.__cause__ = kept.__context__ = None
    return kept.with_traceback(None)


def preload(export: HFExport) -> None:
    """Read the assets of an export now; `assets_of` raises the error later if this fails."""
    with contextlib.suppress(CheckpointError):
        assets_of(export)


def known(export: HFExport) -> Assets | CheckpointError | None:
    """Return what this process has read for an export, or `None`; reads nothing."""
    with _cache_lock:
        return _cache.get(export)


def to_send(export: HFExport) -> tuple[HFExport, Assets | CheckpointError | None]:
    """Return an export for another process, and what this process has read of its assets.

    Objects never travel, read or not: a model is too large, and its FSDP2 class does not pickle.
    Paths and plain files travel if they were not read, and the other process reads them.
    """
    read = known(export)
    if read is None and all(isinstance(asset, _PLAIN) for asset in _each(export.assets)):
        return export, None
    if read is None:
        msg = "the process that sent this export had not read its assets"
        hint = "call writer.warm_up on every rank, or save with the rank that reads them as rank 0"
        read = ExportError(msg, phase="plan", hint=hint)
    bare = copy.copy(export)
    object.__setattr__(bare, "assets", ())
    object.__setattr__(bare, "like", None)
    return bare, read


def preset(export: HFExport, assets: Assets | CheckpointError) -> None:
    """Store what another process has read for this export."""
    with _cache_lock:
        _cache[export] = assets


def file_of_key_in_like(export: HFExport) -> dict[str, str] | None:
    """Return the file name of each key in `like`; `None` without `like`.

    Reads the index, or else the header of the only safetensors file, and nothing more.

    Raises:
        ConfigError: If `like` is not a directory, or its index or weights cannot be read.
    """
    if export.like is None:
        return None
    base = Path(export.like)
    if not base.is_dir():
        msg = "like must be a model directory"
        raise ConfigError(
            msg, path=str(base), expected="a directory", found="no directory at this path"
        )
    return _file_of_key(base)


def _render(export: HFExport) -> Assets:
    files: dict[str, bytes] = {}
    file_of_key = file_of_key_in_like(export)
    if export.like is not None:
        files.update(other_files(Path(export.like)))
    model = None
    for asset in _each(export.assets):
        rendered = _render_one(asset)
        files.update(rendered)
        if CONFIG_NAME in rendered:
            model = transformers_model(asset)
    for name in files:
        _check_name(name)
    if CONFIG_NAME in files and export.dtype is not None:
        files[CONFIG_NAME] = _with_dtype(files[CONFIG_NAME], export.dtype)
    return Assets(files, file_of_key, _architecture(files.get(CONFIG_NAME), model, export))


def _architecture(config: bytes | None, model: Any, export: HFExport) -> Architecture | None:
    # `expect_keys` lists the keys itself: `HFExport.from_transformers` has compared them already.
    if config is None or export.expect_keys is not None:
        return None
    # Import on the call only: `save` must load without the libraries of `integrations`.
    module = importlib.import_module("dcp_hf_writer.integrations.architecture_of_config")
    found: Architecture | None = module.architecture_of(config, model)
    return found


def _each(assets: Any) -> Iterator[Any]:
    if assets is None:
        return
    if isinstance(assets, (list, tuple)):
        for asset in assets:
            yield from _each(asset)
    else:
        yield assets


def _render_one(asset: Any) -> dict[str, bytes]:
    if isinstance(asset, dict):
        return {str(name): _as_bytes(name, data) for name, data in asset.items()}
    if isinstance(asset, (str, os.PathLike)):
        return _read_path(Path(asset))
    model = transformers_model(asset)
    if model is not None or (isinstance(asset, torch.nn.Module) and hasattr(asset, "config")):
        return configs_of(asset if model is None else model)
    if is_of_transformers(asset, "PreTrainedConfig"):
        return config_files(asset)
    if hasattr(asset, "save_pretrained"):
        return save_pretrained(asset)
    msg = "assets must be paths, objects with save_pretrained, or a dict of file name to bytes"
    raise ConfigError(msg, expected="for example (config, tokenizer)", found=type(asset).__name__)


def _as_bytes(name: Any, data: Any) -> bytes:
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    msg = "the content of an asset file must be bytes or text"
    raise ConfigError(msg, key=str(name), expected="bytes or str", found=type(data).__name__)


def _read_path(path: Path) -> dict[str, bytes]:
    try:
        return other_files(path) if path.is_dir() else {path.name: path.read_bytes()}
    except OSError as error:
        msg = "an asset could not be read"
        raise ExportError(msg, phase="plan", path=str(path), found=str(error)) from error


def _file_of_key(base: Path) -> dict[str, str]:
    """Return the file name of each key of a model directory, from its index or its only file."""
    indexes = sorted(base.glob("*" + INDEX_SUFFIX))
    if indexes:
        try:
            weight_map = json.loads(indexes[0].read_bytes())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            msg = "the index in the `like` directory cannot be read"
            raise ConfigError(msg, path=str(indexes[0]), found=repr(error)) from error
        for name in weight_map.values():
            _check_name(name)
        return dict(weight_map)
    weights = sorted(base.glob("*.safetensors"))
    if len(weights) != 1:
        msg = "like must be a directory with an index, or with exactly one safetensors file"
        raise ConfigError(msg, path=str(base), found=[path.name for path in weights] or "neither")
    try:
        with safe_open(str(weights[0]), framework="pt") as file:
            return dict.fromkeys(file.keys(), weights[0].name)
    except (SafetensorError, OSError) as error:
        msg = "the weights in the `like` directory cannot be read"
        raise ConfigError(msg, path=str(weights[0]), found=str(error)) from error


def _check_name(name: str) -> None:
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        msg = "the name of an export file must stay within the export directory"
        raise ConfigError(msg, path=name, expected="a relative path without '..'")


def _with_dtype(config: bytes, dtype: torch.dtype | str) -> bytes:
    """Write the dtype of the exported weights into the config; readers load in that dtype."""
    values = json.loads(config)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype"]
    for key in keys:
        values[key] = name
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
