"""The files of an export other than weights: config, tokenizer, processor, base model files."""

from __future__ import annotations

import copy
import importlib
import json
import os
import threading
import weakref
from collections.abc import Mapping
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
from dcp_hf_writer.storage.paths_as_written import hub_hint, plain_path

if TYPE_CHECKING:
    from collections.abc import Iterator

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


_PLAIN = (str, os.PathLike, Mapping)
"""Assets that any process can read."""

_cache: weakref.WeakKeyDictionary[HFExport, Assets] = weakref.WeakKeyDictionary()
_cache_lock = threading.Lock()


def assets_of(export: HFExport) -> Assets:
    """Return the assets of an export; each process reads them once per `HFExport`.

    A read that fails is not kept: the next call reads again.

    Raises:
        ExportError: If `save_pretrained` of an asset fails, or a file cannot be read.
        ConfigError: If `assets` or `like` is invalid.
    """
    with _cache_lock:
        found = _cache.get(export)
        if found is None:
            found = _cache[export] = _read(export)
    return found


def _read(export: HFExport) -> Assets:
    try:
        return _render(export)
    except CheckpointError:
        raise
    except Exception as error:
        msg = "the assets of the export could not be read"
        found = f"{type(error).__name__}: {error}"
        raise ExportError(msg, phase="plan", found=found) from error


def preload(export: HFExport) -> CheckpointError | None:
    """Read the assets of an export now; return the error if this fails, without its traceback."""
    try:
        assets_of(export)
    except CheckpointError as error:
        # A copy: the traceback of the raised error would keep the caller's objects alive.
        rebuild, facts = error.__reduce__()[:2]
        copied: CheckpointError = rebuild(*facts)
        return copied
    return None


def look_at(export: HFExport) -> None:
    """Check what can be checked of `like` and of paths among the assets, without reading them all.

    Assets that the process has read already pass. Objects are not asked for their files yet: they
    may still change before the first save.

    Raises:
        ConfigError: If `like` or an asset is not there, or cannot be used as given.
        ExportError: If a path among the assets cannot be read.
    """
    if known(export) is not None:
        return
    file_of_key_in_like(export)
    for asset in _each(export.assets):
        if isinstance(asset, (str, os.PathLike)):
            _check_readable(Path(plain_path(asset, option="an asset")))


def check_kinds(export: HFExport) -> None:
    """Check that each asset is of a kind that can be exported; touches no file.

    Raises:
        ConfigError: If one is not.
    """
    for asset in _each(export.assets):
        if isinstance(asset, Mapping):
            for name, data in asset.items():
                _check_name(str(name))
                _as_bytes(name, data)
        elif not isinstance(asset, (str, os.PathLike)) and not _is_object(asset):
            raise _unknown_kind(asset)


def known(export: HFExport) -> Assets | None:
    """Return what this process has read for an export, or `None`; reads nothing."""
    with _cache_lock:
        return _cache.get(export)


def to_send(
    export: HFExport, error: CheckpointError | None
) -> tuple[HFExport, Assets | None, CheckpointError | None]:
    """Return what goes to another process: the export, its assets, and why there are none.

    Objects never travel, read or not: a model is too large, and its FSDP2 class does not pickle.
    Paths and plain files travel if they were not read, and the other process reads them.

    Args:
        export: The export.
        error: Why this process could not read its assets, if it tried.
    """
    read = known(export)
    if read is None and error is None:
        if all(isinstance(asset, _PLAIN) for asset in _each(export.assets)):
            return export, None, None
        msg = "the process that sent this export had not read its assets"
        hint = "call writer.warm_up on every rank, or save with the rank that reads them as rank 0"
        error = ExportError(msg, phase="plan", hint=hint)
    bare = copy.copy(export)
    object.__setattr__(bare, "assets", ())
    object.__setattr__(bare, "like", None)
    return bare, read, None if read is not None else error


def preset(export: HFExport, assets: Assets) -> None:
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
    base = Path(plain_path(export.like, option="like"))
    if not base.is_dir():
        msg = "like must be a model directory"
        raise ConfigError(
            msg,
            path=str(base),
            expected="a directory",
            found="a file" if base.exists() else "nothing at this path",
            hint=hub_hint(export.like),
        )
    return _file_of_key(base)


def _render(export: HFExport) -> Assets:
    files: dict[str, bytes] = {}
    file_of_key = file_of_key_in_like(export)
    if export.like is not None:
        files.update(other_files(Path(plain_path(export.like, option="like"))))
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
    if isinstance(asset, Mapping):
        return {str(name): _as_bytes(name, data) for name, data in asset.items()}
    if isinstance(asset, (str, os.PathLike)):
        return _read_path(Path(plain_path(asset, option="an asset")))
    model = transformers_model(asset)
    if model is not None or (isinstance(asset, torch.nn.Module) and hasattr(asset, "config")):
        return configs_of(asset if model is None else model)
    if is_of_transformers(asset, "PreTrainedConfig"):
        return config_files(asset)
    if hasattr(asset, "save_pretrained"):
        return save_pretrained(asset)
    raise _unknown_kind(asset)


def _is_object(asset: Any) -> bool:
    is_model = isinstance(asset, torch.nn.Module) and hasattr(asset, "config")
    return is_model or transformers_model(asset) is not None or hasattr(asset, "save_pretrained")


def _unknown_kind(asset: Any) -> ConfigError:
    msg = "assets must be paths, objects with save_pretrained, or a dict of file name to bytes"
    return ConfigError(msg, expected="for example (config, tokenizer)", found=type(asset).__name__)


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
        raise _unreadable(path, str(error)) from error


def _check_readable(path: Path) -> None:
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in files if not os.access(file, os.R_OK)]
    except OSError as error:
        raise _unreadable(path, str(error)) from error
    if found:
        is_there = os.path.lexists(found[0])
        raise _unreadable(
            found[0], "no permission to read it" if is_there else "nothing at this path"
        )


def _unreadable(path: Path, found: str) -> ExportError:
    msg = "an asset could not be read"
    expected = "a file or directory that this user may read"
    return ExportError(
        msg, phase="plan", path=str(path), expected=expected, found=found, hint=hub_hint(path)
    )


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
