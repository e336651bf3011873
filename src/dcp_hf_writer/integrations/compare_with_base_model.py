"""Compare what a model would export with the headers of its base.

The base is the checkpoint that the model came from. Serving engines read the layout of the hub,
and transformers does not always save that layout: it may transpose a tensor at load and not
transpose it back at save. Only the base shows the difference.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ConfigError, SpecError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.formats.names_on_disk import INDEX_NAME
from dcp_hf_writer.formats.parse_safetensors_header import (
    LENGTH_NBYTES,
    header_nbytes,
    parse_header,
)
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.tensors.dtypes import NAME_BY_TORCH

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterable, Mapping

    from dcp_hf_writer.mapping.specs_from_function import HFSide
    from dcp_hf_writer.tensors.boxes import Shape

_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})

# Suffixes that quantised checkpoints append to a tensor's name, for its values and its scales.
_QUANTISED = re.compile(r"(_blocks|_scales|_scale_inv|_scale|_packed|_zero_point|\.absmax|_shape)$")
_LAYER = re.compile(r"^(.*?\blayers\.)(\d+)\.")
# Buffers of position embeddings. Older checkpoints store them; no model loads them.
_BUFFERS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.position_ids$")
_MTP = re.compile(r"(^|\.)mtp(\.|_)")
# The longest prefix that is recognised as dropped or added, in parts of a name.
_MAX_PREFIX = 4

_MANY = 8
"""How many names one line lists."""


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """A tensor of the base checkpoint, as a header declares it."""

    shape: Shape
    """Shape of the tensor."""
    dtype: str
    """safetensors dtype of the tensor."""


@dataclass(frozen=True, slots=True)
class Differences:
    """How an export and its base differ, one line each."""

    errors: tuple[str, ...]
    """Differences that give the export a layout other than the base's."""
    warnings: tuple[str, ...]
    """Differences that are allowed, but that the user should know."""

    def check(self, base: str) -> None:
        """Raise if there are errors.

        Raises:
            SpecError: If there are errors; the text lists all errors and all warnings.
        """
        if self.errors:
            raise SpecError(
                "the export would have another layout than its base",
                phase="plan",
                path=base,
                found="".join(f"\n  - {line}" for line in (*self.errors, *self.warnings)),
            )


def read_base(base: str | os.PathLike[str]) -> dict[str, BaseTensor]:
    """Read the headers of a model directory, not the data.

    Args:
        base: A local directory with `model.safetensors.index.json`, or with safetensors files.

    Raises:
        ConfigError: If `base` is not such a directory, or its index or a file cannot be read.
        CorruptCheckpointError: If a header is invalid.
    """
    directory = Path(plain_path(base, option="base"))
    if not directory.is_dir():
        raise ConfigError(
            "base must be a local model directory",
            path=str(base),
            found="no directory of that name",
            hint="huggingface_hub.snapshot_download downloads a repository to a directory",
        )
    names = _files_of(directory)
    if not names:
        raise ConfigError("base has no weights", path=str(directory), expected="safetensors files")
    found = {}
    for name in names:
        found.update(_read_file(directory / name))
    return found


def _files_of(directory: Path) -> list[str]:
    index = directory / INDEX_NAME
    if not index.exists():
        return sorted(path.name for path in directory.glob("*.safetensors"))
    try:
        names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            "the index of base cannot be read", path=str(index), found=repr(error)
        ) from error
    return sorted(Path(name).name for name in names)


def _read_file(path: Path) -> dict[str, BaseTensor]:
    try:
        with path.open("rb") as file:
            nbytes = path.stat().st_size
            start = file.read(LENGTH_NBYTES)
            length = header_nbytes(start, file_nbytes=nbytes, path=str(path))
            header = start + file.read(length - len(start))
    except OSError as error:
        raise ConfigError("base cannot be read", path=str(path), found=str(error)) from error
    tensors = parse_header(header, file_nbytes=nbytes, path=str(path)).tensors
    return {key: BaseTensor(one.torch_shape, one.dtype) for key, one in tensors.items()}


def swapped_dims(shape: Shape, base: Shape) -> tuple[int, int] | None:
    """Return the two dims to exchange to turn `shape` into `base`; `None` if no exchange does."""
    differ = [d for d, (n, m) in enumerate(zip(shape, base, strict=False)) if n != m]
    if len(shape) != len(base) or len(differ) != 2:  # noqa: PLR2004 - an exchange moves two
        return None
    first, second = differ
    return (first, second) if (shape[first], shape[second]) == (base[second], base[first]) else None


def turned_dims(
    shapes: Mapping[str, Shape],
    base: Mapping[str, BaseTensor],
    maybe: Mapping[str, tuple[int, int]],
) -> dict[str, tuple[int, int]]:
    """Return the dims to exchange, by key, to give the tensors the orientation of the base.

    The shape of a square tensor does not show its orientation. But all tensors of a checkpoint have
    the same orientation. So a square tensor follows the others: its dims are exchanged if
    transformers may exchange them at load, and if they are exchanged in another tensor.

    Args:
        shapes: Shapes of the tensors, by key.
        base: Tensors of the base, by key.
        maybe: Dims that transformers may exchange at load, by regular expression for keys.
    """
    found = {}
    for key, shape in shapes.items():
        dims = swapped_dims(shape, base[key].shape) if key in base else None
        if dims is not None:
            found[key] = dims
    turned = set(found.values())
    for key in square_keys(shapes, maybe):
        dims = _dims_of(key, maybe)
        if dims in turned:
            found[key] = dims
    return found


def square_keys(shapes: Mapping[str, Shape], maybe: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return the keys of square tensors that may be transposed on the hub."""
    found = []
    for key, shape in shapes.items():
        dims = _dims_of(key, maybe)
        if dims is not None and shape[dims[0]] == shape[dims[1]]:
            found.append(key)
    return found


def _dims_of(key: str, maybe: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    return next((dims for pattern, dims in maybe.items() if re.search(pattern, key)), None)


def compare(
    ours: Mapping[str, HFSide],
    base: Mapping[str, BaseTensor],
    *,
    tied: Collection[str],
    ignored: Iterable[str],
    resizable: Collection[str],
) -> Differences:
    """Compare the tensors of an export with those of its base.

    Args:
        ours: Tensors that would be exported, by key.
        base: Tensors of the base, by key.
        tied: Keys that the export leaves out because they are tied to others.
        ignored: Regular expressions for keys that the model ignores when it is loaded.
        resizable: Keys whose number of rows may differ, because the vocabulary can be resized.
    """
    errors, warnings = _shape_lines(ours, base, resizable)
    quantised = {key: _QUANTISED.sub("", key) for key in base if key not in ours}
    scales = {key for key, name in quantised.items() if name != key and _is_part(name, ours)}
    missing = [key for key in base if key not in ours and key not in scales and key not in tied]
    whole = {quantised[key] for key in scales}
    added = [key for key in ours if key not in base and not _is_part_of(key, whole)]
    if packed := sorted(
        scales | {k for k in ours.keys() & base.keys() if _is_packed(k, ours, base)}
    ):
        warnings.append(
            f"the base is quantised in {_some(packed)}; the export holds the model's own dtypes"
        )
    prefixes = _changed_prefixes(added, missing, ours, base)
    errors += [
        f"{_prefixed(have)} is called {_prefixed(want)} in the base: "
        f"{_some([key for key, _ in pairs])}"
        for (have, want), pairs in prefixes.items()
    ]
    explained = {key for pairs in prefixes.values() for pair in pairs for key in pair}
    if rest := [key for key in added if key not in explained]:
        errors.append(f"not in the base: {_some(rest)}")
    rest = [key for key in missing if key not in explained]
    for why, keys in _absent(rest, ours, ignored).items():
        (warnings if why else errors).append(
            f"{why or 'only in the base, missing from the export'}: {_some(keys)}"
        )
    return Differences(tuple(errors), tuple(warnings))


def _shape_lines(
    ours: Mapping[str, HFSide], base: Mapping[str, BaseTensor], resizable: Collection[str]
) -> tuple[list[str], list[str]]:
    by_text: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for key in ours.keys() & base.keys():
        have, want = ours[key].shape, base[key].shape
        if have == want or _is_packed(key, ours, base):
            continue
        dims = swapped_dims(have, want)
        is_resized = key in resizable and have[1:] == want[1:]
        text = "has another shape"
        if dims is not None:
            text = f"looks transposed in dims {dims[0]}, {dims[1]}"
        elif is_resized:
            text = "has another number of rows, as after resize_token_embeddings"
        by_text[is_resized, f"{text}: {list(have)}, in the base {list(want)}"].append(key)
    lines: tuple[list[str], list[str]] = ([], [])
    for (is_warning, text), keys in sorted(by_text.items()):
        hint = "; orientation='base' transposes them" * ("transposed" in text)
        lines[is_warning].append(f"{text}{hint}: {_some(sorted(keys))}")
    return lines


def _is_packed(key: str, ours: Mapping[str, HFSide], base: Mapping[str, BaseTensor]) -> bool:
    """Whether the export has a floating-point tensor that the base stores as integers or fp8."""
    return NAME_BY_TORCH.get(ours[key].dtype) in _FLOATS and base[key].dtype not in _FLOATS


def _is_part(name: str, ours: Mapping[str, HFSide]) -> bool:
    return name in ours or f"{name}.weight" in ours


def _is_part_of(key: str, names: Collection[str]) -> bool:
    return key in names or key.removesuffix(".weight") in names


def _changed_prefixes(
    added: Iterable[str],
    missing: Iterable[str],
    ours: Mapping[str, HFSide],
    base: Mapping[str, BaseTensor],
) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Pair names that differ only in their prefixes, by `(our prefix, prefix in the base)`."""
    by_tail: dict[str, list[str]] = defaultdict(list)
    for key in missing:
        parts = key.split(".")
        for cut in range(min(_MAX_PREFIX, len(parts) - 1) + 1):
            by_tail[".".join(parts[cut:])].append(key)
    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for key in added:
        parts = key.split(".")
        for cut in range(min(_MAX_PREFIX, len(parts) - 1) + 1):
            tail = ".".join(parts[cut:])
            same = [one for one in by_tail[tail] if base[one].shape == ours[key].shape]
            if len(same) == 1:
                have = ".".join(parts[:cut])
                want = same[0].removesuffix(tail).removesuffix(".")
                found[have, want].append((key, same[0]))
                break
    return dict(found)


def _prefixed(prefix: str) -> str:
    return f"{prefix}.*" if prefix else "*"


def _absent(
    keys: Iterable[str], ours: Iterable[str], ignored: Iterable[str]
) -> dict[str, list[str]]:
    """Group the keys that only the base has by the reason for it; `""` for no known reason."""
    patterns = [re.compile(pattern) for pattern in ignored]
    last: dict[str, int] = {}
    for key in ours:
        if match := _LAYER.match(key):
            last[match[1]] = max(last.get(match[1], -1), int(match[2]))
    found: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        match = _LAYER.match(key)
        why = ""
        if _BUFFERS.search(key):
            why = "buffers that the model now computes and does not store"
        elif _MTP.search(key) or (match and int(match[2]) > last.get(match[1], int(match[2]))):
            why = "MTP layers, which the model does not have; the export lacks them"
        elif any(pattern.search(key) for pattern in patterns):
            why = "ignored when the model is loaded; the export lacks them"
        found[why].append(key)
    return found


def _some(keys: list[str]) -> str:
    return some_of(keys, most=_MANY)
