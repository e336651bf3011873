"""The files that `save_pretrained` writes of a model besides weights: configs and custom code."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.errors import ExportError
from dcp_hf_writer.formats.names_on_disk import INDEX_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKSUMS_NAME = "checksums.json"
"""File name for `sglang ... --model-checksum <directory>/checksums.json`."""

# Weights in any format; they are not copied, because the export writes its own.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_WEIGHT_INDEXES = (INDEX_SUFFIX, ".bin.index.json")

# Where wrappers keep the model: torch.compile, DistributedDataParallel and DeepSpeed, PEFT, TRL.
_INNER = ("_orig_mod", "module", "base_model", "model", "pretrained_model")


def transformers_model(asset: Any) -> Any | None:
    """Return the transformers model that an asset is or wraps; `None` if there is none.

    It looks through `torch.compile`, DistributedDataParallel, PEFT and TRL's value head.
    """
    seen = 0
    while isinstance(asset, torch.nn.Module) and seen < len(_INNER):
        if is_of_transformers(asset, "PreTrainedModel"):
            return asset
        inner = (asset._modules.get(name) for name in _INNER)  # noqa: SLF001 - of torch itself
        asset = next((one for one in inner if one is not None), None)
        seen += 1
    return None


def is_of_transformers(asset: Any, name: str) -> bool:
    """Whether an object is of a class of transformers, which need not be installed."""
    return any(
        kind.__name__ == name and kind.__module__.startswith("transformers.")
        for kind in type(asset).__mro__
    )


def configs_of(model: Any) -> dict[str, bytes]:
    """Return the files that `model.save_pretrained` writes besides weights; reads no weights.

    Raises:
        ExportError: If the config, the generation config or the code of the model cannot be saved.

    Source:
        transformers, `PreTrainedModel.save_pretrained`: the config names the dtype of the
        parameters and the class, without the prefix that FSDP2 adds to the class name. It copies
        the code of a class that `register_for_auto_class` registered, before it saves the config.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    files: dict[str, bytes] = {}
    if getattr(model, "_auto_class", None) is not None:
        files.update(_rendered(type(model).__name__, lambda path: _copy_code(model, path, config)))
    files.update(save_pretrained(config))
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        files.update(save_pretrained(generation))
    return files


def config_files(config: Any) -> dict[str, bytes]:
    """Return the files of a config; of a model with custom code, also the files with that code.

    `config.save_pretrained` copies only the code of the config. The config names the file of the
    model too, and that file lies beside the other.

    Raises:
        ExportError: If the config cannot be saved, or its code cannot be read.
    """
    files = save_pretrained(config)
    if getattr(config, "_auto_class", None) is not None:
        files = {
            **_rendered(type(config).__name__, lambda path: _copy_named(config, path)),
            **files,
        }
    return files


def save_pretrained(asset: Any) -> dict[str, bytes]:
    """Return the files that an object's `save_pretrained` writes, without weights.

    Raises:
        ExportError: If `save_pretrained` fails.
    """
    name = f"{type(asset).__name__}.save_pretrained"
    return _rendered(name, asset.save_pretrained)


def _rendered(name: str, render: Callable[[str], object]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="dcp-hf-assets-") as directory:
        try:
            render(directory)
        except Exception as error:
            msg = f"{name} failed"
            found = f"{type(error).__name__}: {error}"
            raise ExportError(msg, phase="plan", found=found) from error
        return other_files(Path(directory))


def other_files(base: Path) -> dict[str, bytes]:
    """Return every file below a directory, except hidden files, weights and checksums.

    Readers would load foreign weights together with the export's own weights, or instead of them.
    Checksums of other weights would be wrong for the export.
    """
    files = {}
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        is_hidden = any(part.startswith(".") for part in name.parts)
        is_weights = name.name.endswith(_WEIGHTS + _WEIGHT_INDEXES)
        is_stale = is_weights or name.as_posix() == CHECKSUMS_NAME
        if path.is_file() and not is_hidden and not is_stale:
            files[name.as_posix()] = path.read_bytes()
    return files


def _copy_code(model: Any, directory: str, config: Any) -> None:
    """Copy the files with the code of a model, and name its class in the config's `auto_map`."""
    from transformers.dynamic_module_utils import custom_object_save  # noqa: PLC0415 - optional

    # `fully_shard` gives the model a class that is defined in no file. An empty object of the class
    # that the model had before stands for it: only its class is looked at.
    kind = next(one for one in type(model).__mro__ if not _is_made_by_fsdp(one))
    custom_object_save(object.__new__(kind), directory, config=config)


def _is_made_by_fsdp(kind: type) -> bool:
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def _copy_named(config: Any, directory: str) -> None:
    """Copy the files that a config's `auto_map` names, with what they import from beside them."""
    from transformers.dynamic_module_utils import get_relative_import_files  # noqa: PLC0415

    code = getattr(sys.modules.get(type(config).__module__), "__file__", None)
    if code is None:
        return
    for value in (getattr(config, "auto_map", None) or {}).values():
        # A value such as "repository--module.Class" names code that the hub keeps.
        name = str(value[0] if isinstance(value, (list, tuple)) else value)
        path = Path(code).parent / f"{name.rpartition('.')[0]}.py"
        if "--" in name or not path.is_file():
            continue
        for needed in (os.fspath(path), *get_relative_import_files(path)):
            (Path(directory) / Path(needed).name).write_bytes(Path(needed).read_bytes())
