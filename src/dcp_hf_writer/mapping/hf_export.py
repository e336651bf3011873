"""HFExport: the options of the HuggingFace half of a checkpoint."""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.mapping.option_values import (
    check_names,
    check_pairs,
    check_text,
    check_whole,
    check_word,
    shown,
)
from dcp_hf_writer.tensors.dtypes import export_dtype

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    import torch

# Decimal units, as in huggingface_hub: "5GB" is 5 * 10**9 bytes.
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", re.IGNORECASE)

# The data of a safetensors file starts at a multiple of 8 bytes (safetensors >= 0.4).
_MIN_ALIGN = 8

Order = Literal["auto", "state_dict", "natural"]


def size_in_bytes(value: int | str, *, option: str) -> int:
    """Parse a size: an integer number of bytes, or text such as `"5GB"` in decimal units.

    Raises:
        ConfigError: If the value is neither, or is not above zero.
    """
    nbytes: int | None = None
    if isinstance(value, int) and not isinstance(value, bool):
        nbytes = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        size = float(match[1]) * _UNITS[(match[2] or "").upper()]
        nbytes = None if math.isinf(size) else int(size)
    if nbytes is None or nbytes <= 0:
        msg = f"{option} must be a positive size"
        raise ConfigError(
            msg, expected='bytes as an int, or text such as "5GB"', found=shown(value)
        )
    return nbytes


@dataclass(frozen=True, eq=False)
class HFExport:
    """Options of the HuggingFace half. One object, which is frozen, serves every save of a run.

    Raises:
        ConfigError: If an option cannot be used as given.
    """

    key: str | None = None
    """Entry of the state dict that holds the model, with dots between nested entries.

    `None` searches for the entry.
    """
    specs: Mapping[str, LoadSpec] | Iterable[LoadSpec] | None = None
    """Specs of tensors that are renamed, split, reshaped, left out, or sharded by hand.

    A mapping by FQN within the model, or an iterable of specs. A tensor without a spec keeps its
    name and shape.
    """
    dtype: torch.dtype | str | None = None
    """Dtype on disk of floating-point tensors; `None` keeps their own.

    fp8, integers and bools are never cast.
    """
    keep_dtype: Sequence[str] = ()
    """Regular expressions (`re.search`) of HuggingFace keys that keep their own dtype."""
    max_shard_size: int | str = "5GB"
    """Largest data size of an output file. A tensor that is larger gets a file of its own."""
    single_file: str | None = None
    """Name of one file that holds all tensors, whatever its size, without an index.

    For directories that are not a whole model, such as `adapter_model.safetensors` of PEFT.
    """
    like: str | os.PathLike[str] | None = None
    """Model directory to follow.

    Its index decides which file holds which key. Its other files are copied.
    """
    assets: Any = ()
    """Files to put beside the weights.

    A path, an object with `save_pretrained`, a mapping `{file name: bytes}`, or a sequence of
    these. A transformers model adds its config and generation config, not its weights. The assets
    are read once, at the first save (or `warm_up`) that uses this object. Make a new `HFExport`
    when they change.
    """
    subdir: str = "hf"
    """Directory of the export within the checkpoint."""
    path: str | os.PathLike[str] | None = None
    """A place of its own for the export: a directory, or a URL such as `s3://bucket/serve/step-100`.

    `None` puts it into `subdir` of the checkpoint. Each half may be local or on a store.
    """
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    """Options of the URL in `path`, as fsspec takes them; `None` takes those of the writer.

    They are left out when this object is pickled.
    """
    tied: Mapping[str, str] | None = None
    """`{dropped: kept}` names of tied tensors; `None` finds ties by shared storage."""
    expect_keys: Iterable[str] | None = None
    """Exactly the keys that the export must have; `None` skips this check."""
    header_align: int = 8
    """The data of each file starts at a multiple of this many bytes; 4096 suits mapped reads."""
    metadata: Mapping[str, str] | None = None
    """Pairs to add to the `__metadata__` of each file, after `format: pt`."""
    order: Order = "auto"
    """Order in which tensors fill the files: state-dict order, or natural order of the names.

    `"auto"` gives the order of `save_pretrained`: natural order if a spec renames or splits a
    tensor, if a model or config among the assets came from `from_pretrained`, or if transformers
    renames tensors of its architecture; otherwise state-dict order.
    """
    groups: Iterable[Sequence[str]] | None = None
    """Groups of HuggingFace keys in the order in which they fill the files; overrides `order`.

    The keys of a group stay in one file, as `save_pretrained` keeps views of one storage together.
    Keys that are in no group come last.
    """
    total_parameters: int | None = None
    """`total_parameters` of the index; `None` counts the elements of all exported tensors."""
    checksums: Literal["sha256"] | None = None
    """`"sha256"` adds `checksums.json`, which SGLang's `--model-checksum` reads.

    The coordinator then reads every byte of the export once more before it commits; the log and the
    manifest say how long that took. The digests in the manifest do not need this extra read.
    """
    spec_by_fqn: dict[str, LoadSpec] = field(init=False, repr=False)
    """`specs`, by the FQN of their tensors."""
    max_shard_nbytes: int = field(init=False, repr=False)
    """`max_shard_size` in bytes."""
    is_in_natural_order: bool = field(init=False, repr=False)
    """Whether tensors fill the files in natural order of their runtime names."""

    def __post_init__(self) -> None:
        """Check and normalise each option."""
        object.__setattr__(self, "expect_keys", _kept(self.expect_keys))
        self._check_types()
        frozen = {
            "spec_by_fqn": specs_by_name(self.specs),
            "max_shard_nbytes": size_in_bytes(self.max_shard_size, option="max_shard_size"),
            "dtype": export_dtype(self.dtype),
            "keep_dtype": _patterns(self.keep_dtype),
            "expect_keys": None if self.expect_keys is None else frozenset(self.expect_keys),
            "metadata": dict(sorted((self.metadata or {}).items())),
            "groups": None if self.groups is None else _groups(self.groups),
        }
        for name, value in frozen.items():
            object.__setattr__(self, name, value)
        self._check()
        object.__setattr__(self, "is_in_natural_order", self._natural())

    @classmethod
    def from_transformers(
        cls,
        model: Any,
        tokenizer: Any = None,
        base: str | os.PathLike[str] | None = None,
        *,
        orientation: Literal["model", "base"] = "model",
        **options: Any,
    ) -> HFExport:
        """Make options for an export equal to what `save_pretrained` writes of the unsharded model.

        transformers decides the specs, the tied names, the order of the files and the expected
        keys; see `specs_from_transformers`. The config and generation config come from the model.
        With `dtype`, tensors that transformers keeps in float32 keep their dtype. Every rank calls
        this method.

        Args:
            model: A transformers model, sharded or not.
            tokenizer: A tokenizer or processor to save beside the weights.
            base: Local directory of the checkpoint that the model came from. The layout of the
                export is compared with it.
            orientation: `"base"` transposes each tensor that is transposed in `base`.
            **options: Options of `HFExport`. `assets` and `keep_dtype` add to what this method
                finds; the others replace it.

        Raises:
            ConfigError: If `model` is not a transformers model, or an option cannot be used as
                given.
            SpecError: If the layout cannot be derived, or differs from the layout of `base`.
        """
        # Import on the call only: `mapping` must load without the libraries of `integrations`.
        module = importlib.import_module("dcp_hf_writer.integrations.transformers")
        return cls(**module.export_options(model, tokenizer, base, orientation, options))

    @classmethod
    def from_state_dict_adapter(
        cls, adapter: Any, state_dict: Mapping[str, Any], **options: Any
    ) -> HFExport:
        """Make options for the layout that a `StateDictAdapter` (torchtitan's protocol) produces.

        This method calls `adapter.to_hf` once, with stand-ins for the tensors that have no data,
        and records where their elements go. If `adapter.hf_assets_path` holds an index, that index
        decides which file holds which key.

        Args:
            adapter: An object with `to_hf(state_dict)`.
            state_dict: State dict of the whole model. Names, global shapes and dtypes matter, and
                shared memory, which shows ties. Under pipeline parallelism, pass the state dict of
                a whole model on the meta device; it shows no ties.
            **options: Options of `HFExport`, which replace what this method finds.

        Raises:
            ConfigError: If `adapter` is not an adapter, the state dict holds no tensors, or an
                option cannot be used as given.
            SpecError: If the adapter does more than rearrange and cast tensors.
        """
        # As above.
        module = importlib.import_module("dcp_hf_writer.integrations.state_dict_adapter")
        return cls(**module.export_options(adapter, state_dict, options))

    @property
    def place_subdir(self) -> str:
        """Directory of the export within the place that it is written to; empty with `path`."""
        return self.subdir if self.path is None else ""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without options of stores, which may hold credentials."""
        return {**self.__dict__, "storage_options": None}

    @functools.cached_property
    def declared_names(self) -> frozenset[str]:
        """Names within the model that the options mention, and the expected keys."""
        ties = {name for pair in (self.tied or {}).items() for name in pair}
        return frozenset({*self.spec_by_fqn, *ties, *(self.expect_keys or ())})

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the options that decide the layout; equal options have equal hashes."""
        parts = (
            self.key,
            [_global_part(spec) for _, spec in sorted(self.spec_by_fqn.items())],
            self.dtype,
            self.keep_dtype,
            self.max_shard_nbytes,
            self.single_file,
            None if self.tied is None else sorted(self.tied.items()),
            None if self.expect_keys is None else sorted(self.expect_keys),
            self.header_align,
            self.metadata,
            self.is_in_natural_order,
            self.groups,
            self.total_parameters,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _check_types(self) -> None:
        if self.key is not None:
            check_text("key", self.key)
        if self.like is not None and not hasattr(self.like, "__fspath__"):
            check_text("like", self.like)
        check_text("subdir", self.subdir)
        self._check_place()
        if self.single_file is not None:
            check_text("single_file", self.single_file)
        check_names("keep_dtype", self.keep_dtype)
        if self.expect_keys is not None:
            check_names("expect_keys", self.expect_keys)
        if self.tied is not None:
            check_pairs("tied", self.tied)
        if self.metadata is not None:
            check_pairs("metadata", self.metadata)
        if self.total_parameters is not None:
            check_whole("total_parameters", self.total_parameters, least=0)
        check_word("checksums", self.checksums, ("sha256", None))
        check_word("order", self.order, ("auto", "state_dict", "natural"))

    def _check_place(self) -> None:
        if self.path is not None and not hasattr(self.path, "__fspath__"):
            check_text("path", self.path)
        options: Any = self.storage_options
        if not isinstance(options, (Mapping, type(None))):
            msg = "storage_options must be a dict or None"
            raise ConfigError(msg, expected="as fsspec takes them", found="another type")
        if options and self.path is None:
            msg = "storage_options of HFExport are for its path"
            hint = "pass them to the writer, or pass path= too"
            raise ConfigError(msg, expected="HFExport(path=...)", found="no path", hint=hint)
        if self.path is not None and self.subdir != HFExport.subdir:
            msg = "path and subdir of HFExport cannot be given together"
            raise ConfigError(msg, expected="one of them: both say where the export goes")

    def _check(self) -> None:
        align = self.header_align
        if not isinstance(align, int) or align < _MIN_ALIGN or align % _MIN_ALIGN:
            msg = "header_align must be a multiple of 8"
            raise ConfigError(msg, expected="8, 16, ... 4096, ...", found=repr(align))
        if self.subdir in {".", ".."} or "/" in self.subdir or "\0" in self.subdir:
            msg = "subdir must be one plain directory name"
            raise ConfigError(msg, expected='a name such as "hf"', found=repr(self.subdir))
        name = self.single_file
        if name is not None and ("/" in name or "\0" in name or not name.endswith(".safetensors")):
            msg = "single_file must be one plain file name"
            raise ConfigError(msg, expected="a name that ends with .safetensors", found=repr(name))
        if name is not None and self.like is not None:
            msg = "single_file and like cannot be given together"
            raise ConfigError(msg, expected="one of them: both decide the names of the files")
        if "format" in (self.metadata or {}):
            msg = "metadata must not have the key 'format', which is always 'pt'"
            found = shown(self.metadata)
            raise ConfigError(msg, expected="{str: str} without 'format'", found=found)

    def _natural(self) -> bool:
        if self.order != "auto":
            return self.order == "natural"
        assets = self.assets if isinstance(self.assets, (list, tuple)) else (self.assets,)
        # transformers sorts the names of a model that it loaded when it saves it.
        is_loaded = any(map(_is_loaded, assets))
        return is_loaded or any(
            s.hf_keys != (fqn,) or s.pieces for fqn, s in self.spec_by_fqn.items()
        )


def _is_loaded(asset: Any) -> bool:
    """Whether an asset is a model from `from_pretrained`, or the config of one."""
    # transformers sets this attribute when it loads a model.
    if getattr(asset, "_weight_conversions", None) is not None:
        return True
    # Only configs have these two attributes. A config from `from_pretrained` keeps its name when a
    # new model is made from it. Then only the model itself, as the asset, tells the difference.
    is_config = isinstance(getattr(asset, "model_type", None), str)
    return is_config and bool(getattr(asset, "_name_or_path", ""))


def _global_part(spec: LoadSpec) -> tuple[object, ...]:
    """Return the fields of a spec that are equal on every rank: all but `shards`."""
    plain = (spec.name, spec.hf_keys, spec.global_shape, spec.fused_dim, spec.fused_sizes)
    return (*plain, spec.origin_shape, spec.dtype, spec.pieces, spec.alias_of)


def specs_by_name(specs: Any) -> dict[str, LoadSpec]:
    """Index specs by the FQN of their tensors.

    Raises:
        ConfigError: If an item is not a `LoadSpec`, or two specs name the same tensor.
    """
    found: dict[str, LoadSpec] = {}
    if specs is not None and not isinstance(specs, (Mapping, Iterable)):
        msg = "specs must be a collection of LoadSpec objects"
        raise ConfigError(msg, expected="a list, or {FQN: LoadSpec}", found=shown(specs))
    for spec in specs.values() if isinstance(specs, Mapping) else specs or ():
        if not isinstance(spec, LoadSpec):
            msg = "specs must be LoadSpec objects"
            raise ConfigError(msg, expected="LoadSpec", found=repr(spec))
        if spec.name in found:
            msg = "two specs name the same runtime tensor"
            raise ConfigError(msg, fqn=spec.name, expected="one spec per tensor")
        found[spec.name] = spec
    return found


def _kept(keys: Iterable[str] | None) -> Iterable[str] | None:
    """Return keys that can be looked at twice; an iterator would be empty the second time."""
    return list(keys) if isinstance(keys, Iterator) else keys


def _groups(groups: Any) -> tuple[tuple[str, ...], ...]:
    try:
        found = [(group, tuple(group)) for group in groups]
    except TypeError:
        raise _not_groups(groups) from None
    for group, keys in found:
        if isinstance(group, str) or not all(isinstance(key, str) for key in keys):
            raise _not_groups(group)
    return tuple(keys for _, keys in found)


def _not_groups(found: Any) -> ConfigError:
    msg = "groups must be a collection of groups of keys"
    return ConfigError(msg, expected='such as [("a", "b"), ("c",)]', found=shown(found))


def _patterns(values: Sequence[str]) -> tuple[str, ...]:
    for value in values:
        try:
            re.compile(value)
        except re.error as error:
            msg = "keep_dtype holds an invalid regular expression"
            raise ConfigError(
                msg, expected="a pattern that re.compile accepts", found=f"{value!r}: {error}"
            ) from error
    return tuple(values)
