"""Find the options of an export of a stored checkpoint: from a config, from specs, from a base."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.formats.names_on_disk import CONFIG_NAME, MANIFEST_NAME
from dcp_hf_writer.integrations.export_of_config import options_of_config
from dcp_hf_writer.load.read_manifest import manifest_of
from dcp_hf_writer.mapping.hf_export import HFExport, specs_by_name
from dcp_hf_writer.storage.local_inputs import LocalFiles
from dcp_hf_writer.storage.open_directory import open_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.mapping.load_spec import LoadSpec

_MAX_ASSET_NBYTES = 256 << 20
_ASSET_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py", ".md")
_NOT_ASSETS = (".safetensors.index.json", ".bin.index.json")


def export_of_options(
    path: str | None,
    *,
    config: str | None,
    specs: str | None,
    like: str | None,
    options: Mapping[str, Any],
) -> HFExport:
    """Make the options of an export.

    Args:
        path: The checkpoint. If this package saved it, its manifest tells which tensors are tied.
            `None` if there is none, as for an import.
        config: A `config.json`, or a directory with one; specs, ties and the order of the files
            come from its model, and its small files go into the export.
        specs: `file.py:name` or `module:name` of specs, or of a function that returns them.
        like: Model directory to follow.
        options: Further options of `HFExport`.

    Raises:
        ConfigError: If an option cannot be used as given.
        SpecError: If the layout of the config's model cannot be derived.
        ReadError: If a file cannot be read.
    """
    given = {**options, "like": like}
    if specs is not None:
        given["specs"] = load_specs(specs)
    if config is None:
        return HFExport(**{"tied": _ties_of(path), **given})
    directory, name = _config_place(config)
    assets = assets_beside(directory)
    data = LocalFiles(directory).read_whole(name, max_nbytes=_MAX_ASSET_NBYTES)
    given["assets"] = {**assets, CONFIG_NAME: data}
    if specs is not None:
        return HFExport(**{"tied": _ties_of(path), **given})
    where = os.path.join(directory, name)
    return HFExport(**options_of_config(data, path=where, options=given))


def _ties_of(path: str | None) -> Mapping[str, str] | None:
    manifest = None if path is None else manifest_of(open_directory(path))
    return None if manifest is None or manifest.hf is None else manifest.hf.tied


def _config_place(config: str) -> tuple[str, str]:
    path = os.path.abspath(os.path.expanduser(config))
    if os.path.isdir(path):
        return path, CONFIG_NAME
    if not os.path.isfile(path):
        msg = "there is no config here"
        raise ConfigError(msg, path=path, expected=f"{CONFIG_NAME}, or a directory with one")
    return os.path.split(path)


def assets_beside(directory: str) -> dict[str, bytes]:
    """Return the small files of a model directory: configs, tokenizer, templates; no weights.

    Raises:
        ReadError: If a file cannot be read.
    """
    files = LocalFiles(directory)
    return {
        name: files.read_whole(name, max_nbytes=_MAX_ASSET_NBYTES)
        for name in files.names()
        if name.endswith(_ASSET_SUFFIXES) and not name.endswith(_NOT_ASSETS)
        if not name.startswith((".", MANIFEST_NAME))
    }


def load_specs(text: str) -> dict[str, LoadSpec]:
    """Return the specs that `file.py:name` or `module:name` holds. This runs the file's code.

    Raises:
        ConfigError: If there is no such file or name, or it holds no specs.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        msg = "--specs names no object"
        raise ConfigError(msg, expected="file.py:name or module:name", found=repr(text))
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError("--specs names an object that is not there", path=place, found=name)
    return specs_by_name(found() if callable(found) else found)


def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("dcp_hf_specs", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise ConfigError("--specs names a file that is not there", path=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        msg = "--specs names a module that is not there"
        raise ConfigError(msg, found=str(error)) from error
    finally:
        sys.path.remove(os.getcwd())
