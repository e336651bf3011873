"""Derive the hub layout of a transformers model: the names and shapes of its tensors there."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.integrations.compare_with_base_model import (
    compare,
    read_base,
    square_keys,
    turned_dims,
)
from dcp_hf_writer.integrations.transformers_conversions import (
    saved_tensors,
    take_conversions,
    transposed_at_load,
)
from dcp_hf_writer.integrations.unsharded_meta_model import (
    listed,
    parted_names,
    runtime_tensors,
    tied_names,
    unsharded_twin,
    unwrapped,
)
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.mapping.specs_from_function import derive
from dcp_hf_writer.tensors.dtypes import export_dtype

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from dcp_hf_writer.integrations.compare_with_base_model import BaseTensor, Differences
    from dcp_hf_writer.mapping.specs_from_function import Derivation

Orientation = Literal["model", "base"]


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """How a model is exported."""

    specs: dict[str, LoadSpec]
    """A spec for each tensor of the state dict, by FQN."""
    groups: tuple[tuple[str, ...], ...]
    """The keys that `save_pretrained` saves, in its order; keys with shared storage form a group.

    See `HFExport.groups`.
    """
    total_parameters: int
    """Number of elements of all parameters; tied parameters count once."""

    @property
    def keys(self) -> frozenset[str]:
        """HuggingFace keys of the export."""
        return frozenset(key for group in self.groups for key in group)


def specs_from_transformers(
    model: Any,
    *,
    base: str | os.PathLike[str] | None = None,
    orientation: Orientation = "model",
) -> dict[str, LoadSpec]:
    """Derive the names and shapes that the tensors of a transformers model have on the hub.

    This package keeps no table of models. `save_pretrained` converts tensors before it writes them;
    the same conversion runs here, on tensors without data, for an unsharded twin of the model. The
    function does not communicate, and every rank may call it.

    Args:
        model: A transformers model. It may be sharded by FSDP2 or by transformers' own tensor or
            expert parallelism, compiled, or inside DistributedDataParallel.
        base: Local directory of the checkpoint that the model came from. Names, shapes and kinds
            of dtype are compared with the headers of its files.
        orientation: `"base"` transposes each tensor that is transposed in `base`, and needs `base`.

    Returns:
        A spec for each tensor of the state dict, by the FQN that `get_model_state_dict` gives it,
        with global shapes. The spec of a tied tensor that is not stored has `alias_of`, the key of
        the tensor that is.

    Raises:
        ConfigError: If `model` is not a transformers model, `base` is not a model directory, or
            `orientation` cannot be used.
        CorruptCheckpointError: If a header in `base` is invalid.
        SpecError: If the model does not have the tensors that its config says, if its layout is
            more than copies of elements, or if `base` has other names or shapes. Tensors that the
            model does not have (MTP layers), a quantised base and a resized vocabulary are
            warnings.

    Source:
        transformers, `revert_weight_conversion`, which `save_pretrained` uses for all conversions.
    """
    return layout_of(model, base=base, orientation=orientation).specs


def layout_of(
    model: Any, *, base: str | os.PathLike[str] | None, orientation: Orientation
) -> ModelLayout:
    """Derive specs as `specs_from_transformers` does; also return the order and the size.

    Raises:
        ConfigError: As `specs_from_transformers`.
        SpecError: As `specs_from_transformers`.
    """
    if orientation not in ("model", "base") or (orientation == "base" and base is None):
        raise ConfigError(
            'orientation must be "model" or "base"',
            expected='"model", or "base" together with base=<directory>',
            found=f"orientation={orientation!r}, base={base!r}",
        )
    model = unwrapped(model)
    tensors = runtime_tensors(model)
    twin = unsharded_twin(model, tensors)
    take_conversions(model, twin)
    tied = tied_names(model, tensors)
    if parted := parted_names(model, tied):
        warnings.warn(
            f"{listed(parted)} should be tied to another tensor, but each is a parameter of its "
            "own now; the export leaves them out. Put tied modules into one fully_shard group, or "
            "untie them in the config.",
            stacklevel=4,
        )
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = {name: one for name, one in tensors.items() if name not in tied.keys() | ignored}
    headers = {} if base is None else read_base(base)
    turn_to = headers if orientation == "base" else {}
    derived = derive(lambda given: _saved_as(given, twin, turn_to), kept)
    if base is not None:
        found = _base_differences(headers, derived, twin, tied=tied, orientation=orientation)
        found.check(str(base))
        if found.warnings:
            text = "".join(f"\n  - {line}" for line in found.warnings)
            warnings.warn(f"notes on the export compared with its base {base}:{text}", stacklevel=4)
    return _finished(derived, twin, tensors, tied)


def export_options(
    model: Any,
    tokenizer: Any,
    base: str | os.PathLike[str] | None,
    orientation: Orientation,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the `HFExport` options for a model; see `HFExport.from_transformers`.

    Raises:
        ConfigError: As `specs_from_transformers`.
        SpecError: As `specs_from_transformers`.
    """
    layout = layout_of(model, base=base, orientation=orientation)
    model = unwrapped(model)
    given = options.get("assets") or ()
    more = given if isinstance(given, (list, tuple)) else (given,)
    assets = [one for one in (model, tokenizer, *more) if one is not None]
    keep = _kept_in_fp32(model, layout.specs, export_dtype(options.get("dtype")))
    return {
        "specs": layout.specs,
        "groups": layout.groups,
        "total_parameters": layout.total_parameters,
        "expect_keys": layout.keys,
        **options,
        "assets": tuple(assets),
        "keep_dtype": (*keep, *options.get("keep_dtype", ())),
    }


def _saved_as(tensors: dict[str, Any], twin: Any, base: Mapping[str, BaseTensor]) -> dict[str, Any]:
    """Return what `save_pretrained` saves of a state dict, by HuggingFace key.

    If `base` holds tensors, give each tensor the orientation that it has there.
    """
    saved = saved_tensors(twin, tensors)
    shapes = {key: tuple(one.shape) for key, one in saved.items()}
    dims = turned_dims(shapes, base, transposed_at_load(twin)) if base else {}
    return {key: one.transpose(*dims[key]) if key in dims else one for key, one in saved.items()}


def _base_differences(
    base: Mapping[str, BaseTensor],
    derived: Derivation,
    twin: Any,
    *,
    tied: Mapping[str, str],
    orientation: Orientation,
) -> Differences:
    found = compare(
        derived.hf,
        base,
        tied=saved_tensors(twin, {name: twin.state_dict()[name] for name in tied}).keys(),
        ignored=getattr(twin, "_keys_to_ignore_on_load_unexpected", None) or (),
        resizable=_vocabulary_keys(twin, derived.specs),
    )
    shapes = {key: side.shape for key, side in derived.hf.items()}
    square = square_keys(shapes, transposed_at_load(twin)) if orientation == "model" else []
    if not square:
        return found
    line = f"square, so shapes cannot show whether the base has them transposed: {listed(square)}"
    return replace(found, warnings=(*found.warnings, line))


def _vocabulary_keys(twin: Any, specs: Mapping[str, LoadSpec]) -> set[str]:
    embeddings = (twin.get_input_embeddings(), twin.get_output_embeddings())
    weights = {id(getattr(one, "weight", one)) for one in embeddings if one is not None}
    parameters = twin.named_parameters(remove_duplicate=False)
    names = {name for name, one in parameters if id(one) in weights}
    return {key for name in names & specs.keys() for key in specs[name].hf_keys}


def _finished(
    derived: Derivation,
    twin: Any,
    tensors: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
) -> ModelLayout:
    specs = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name in tied:
            keys = derived.specs[tied[name]].hf_keys
            specs[name] = LoadSpec(name, name, shape, alias_of=keys[0])
        else:
            specs[name] = derived.specs.get(name) or LoadSpec(name, (), shape, pieces=())
    parameters = {name for name, _ in twin.named_parameters(remove_duplicate=False)}
    total = sum(one.numel() for name, one in tensors.items() if name in parameters - tied.keys())
    return ModelLayout(specs, derived.groups, total)


def _kept_in_fp32(
    model: Any, specs: Mapping[str, LoadSpec], dtype: torch.dtype | None
) -> tuple[str, ...]:
    """Return patterns of the keys that transformers loads in float32, whatever dtype is stored.

    Source:
        transformers, `PreTrainedModel._get_dtype_plan`.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return ()
    modules = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        modules |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    found = []
    for module in sorted(modules):
        pattern = re.compile(module.replace("*", ".*"))
        keys = [k for name, spec in specs.items() if pattern.search(name) for k in spec.hf_keys]
        if keys:
            found.append(f"^(?:{'|'.join(map(re.escape, keys))})$")
    return tuple(found)
