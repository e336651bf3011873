"""Find the tensors that a config's architecture expects: build its model without data."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.integrations.transformers_conversions import (
    saved_tensors,
    take_conversions,
    transposed_at_load,
)
from dcp_hf_writer.integrations.unsharded_meta_model import (
    on_meta_device,
    runtime_tensors,
    tied_names,
    unsharded_class,
)
from dcp_hf_writer.mapping.architecture import Architecture, KeySet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

_log = logging.getLogger(__name__)

_NOT_COMPARED = "the export is not compared with its config.json: %s"


def architecture_of(config: bytes, model: Any = None) -> Architecture | None:
    """Return what a config's architecture expects of the weights beside it.

    If the architecture cannot be told, a line of the log says why.

    Args:
        config: Content of `config.json`.
        model: The transformers model that the config is of, sharded or not. Without it, the config
            must name a class of transformers itself: this function runs no code of a checkpoint.

    Returns:
        `None` if transformers is not installed or does not have the architecture, or if the config
        is of a quantised model, whose tensors have other names.
    """
    try:
        values = json.loads(config)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        _log.warning(_NOT_COMPARED, "it is no JSON object, so no reader can use it")
        return None
    if "quantization_config" in values:
        _log.info(_NOT_COMPARED, "it is of a quantised model")
        return None
    try:
        found = class_of_config(values) if model is None else (_class_of_model(model), True)
        if isinstance(found, str):
            _log.info(_NOT_COMPARED, found)
            return None
        (kind, own), is_whole = found
        return _architecture(kind, own, model, is_whole=is_whole)
    except Exception as error:  # noqa: BLE001 - code of models; the export itself may be fine
        _log.warning(_NOT_COMPARED, f"{type(error).__name__}: {error}")
        return None


def _class_of_model(model: Any) -> tuple[Any, Any]:
    return unsharded_class(model), copy.deepcopy(model.config)


def class_of_config(values: Mapping[str, Any]) -> tuple[tuple[Any, Any], bool] | str:
    """Return class and config of a model, and whether the config names the class; or why not."""
    names = values.get("architectures") or []
    if not names and "transformers" not in sys.modules:
        # Not worth the seconds that the import takes: no class is known to compare with.
        return "it names no architecture"
    try:
        import transformers  # noqa: PLC0415 - optional
    except ImportError:
        return "transformers is not installed"
    kind_of_config = str(values.get("model_type"))
    if kind_of_config not in transformers.CONFIG_MAPPING:
        return f"transformers does not have the model_type {kind_of_config!r}"
    own = transformers.CONFIG_MAPPING[kind_of_config].from_dict(dict(values))
    kind: Any = getattr(transformers, str(names[0]), None) if names else _base_class(own)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        return f"transformers does not have the architecture {names[:1]}"
    return (kind, own), bool(names)


def _base_class(config: Any) -> Any:
    """Return the class of the model without a head."""
    from transformers import MODEL_MAPPING  # noqa: PLC0415 - optional

    found = MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def _architecture(kind: Any, config: Any, model: Any, *, is_whole: bool) -> Architecture:
    twin = on_meta_device(kind, config)
    tensors = runtime_tensors(twin)
    optional = _optional(twin, tensors, model)
    key_sets = [_key_set(tensors, optional)]
    plain, *more = _conversions(twin, model)
    for conversions in (plain, *more):
        if not conversions:
            continue
        twin._weight_conversions = conversions  # noqa: SLF001 - read by revert_weight_conversion
        kept = saved_tensors(twin, {k: one for k, one in tensors.items() if k not in optional})
        others = saved_tensors(twin, {k: one for k, one in tensors.items() if k in optional})
        key_sets.append(KeySet(_shapes(kept), _shapes(others)))
    base_prefix = getattr(twin, "base_model_prefix", "") or ""
    if not is_whole:
        key_sets += [_below(base_prefix, keys) for keys in key_sets if base_prefix]
    return Architecture(
        name=kind.__name__,
        key_sets=tuple(key_sets),
        ignored=tuple(getattr(twin, "_keys_to_ignore_on_load_unexpected", None) or ()),
        base_prefix=base_prefix,
        is_whole=is_whole,
        is_sorted=bool(plain) or (not is_whole and _renames_head(config)),
        turned=tuple((key, *dims) for key, dims in transposed_at_load(twin).items()),
    )


def _renames_head(config: Any) -> bool:
    """Whether `save_pretrained` renames tensors of a language model with this config."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: PLC0415 - optional

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return kind is not None and bool(next(_conversions(on_meta_device(kind, config), None)))


def _optional(twin: Any, tensors: Mapping[str, torch.Tensor], model: Any) -> frozenset[str]:
    """Return the names of tensors that a reader can do without."""
    found = set(tied_names(twin, tensors))
    found |= set(getattr(twin, "_keys_to_ignore_on_save", None) or ())
    patterns = getattr(twin, "_keys_to_ignore_on_load_missing", None) or ()
    found |= {name for name in tensors for pattern in patterns if re.search(pattern, name)}
    # A model may lack layers that its config cannot switch off, such as the pooler of BERT.
    live = tensors.keys() if model is None else runtime_tensors(model).keys()
    if live < tensors.keys():
        found |= tensors.keys() - live
    return frozenset(found)


def _conversions(twin: Any, model: Any) -> Iterator[list[Any]]:
    """Yield the ways in which transformers may rename tensors when it saves; the first may be none.

    Source:
        transformers, `revert_weight_conversion`: without a record of the load, it leaves out the
        changes of prefixes. A config does not tell whether a model was loaded.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415

    every = get_model_conversion_mapping(twin, add_legacy=False)
    plain = [one for one in every if type(one).__name__ != "PrefixChange"]
    yield plain
    if len(plain) < len(every):
        yield every
    if getattr(model, "_weight_conversions", None):
        take_conversions(model, twin)
        yield twin._weight_conversions  # noqa: SLF001 - as above


def _key_set(tensors: Mapping[str, torch.Tensor], optional: frozenset[str]) -> KeySet:
    shapes = _shapes(tensors)
    return KeySet(
        {name: shape for name, shape in shapes.items() if name not in optional},
        {name: shape for name, shape in shapes.items() if name in optional},
    )


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in tensors.items()}


def _below(prefix: str, keys: KeySet) -> KeySet:
    def with_prefix(names: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.{name}": shape for name, shape in names}

    return KeySet(with_prefix(keys.required.items()), with_prefix(keys.optional.items()))
