"""The conversions of transformers between its runtime layout and the layout of the hub."""

from __future__ import annotations

from typing import Any

# The module of transformers whose operations only rearrange tensors. Those in its other modules
# quantise.
_LAYOUT_MODULE = "transformers.core_model_loading"


def saved_tensors(twin: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return what `save_pretrained` saves of a state dict, by HuggingFace key.

    Args:
        twin: Unsharded model, which determines the conversions.
        tensors: The state dict without tied names. Values may be real or symbolic tensors.
    """
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    saved: dict[str, Any] = revert_weight_conversion(twin, tensors)
    return saved


def take_conversions(model: Any, twin: Any) -> None:
    """Tell the twin which conversions to revert, from the model's own record if it can be used.

    A model from `from_pretrained` records its conversions. The record cannot be used if it includes
    quantisation, or if it is empty because the checkpoint had runtime names. Then the registry of
    transformers decides. The registry lists every prefix that a checkpoint may have, so only the
    prefixes in the record are kept.
    """
    from transformers import conversion_mapping  # noqa: PLC0415

    record = getattr(model, "_weight_conversions", None)
    if record is None:
        return
    if record and all(map(_is_layout, record)):
        twin._weight_conversions = record  # noqa: SLF001 - read by revert_weight_conversion
        return
    registry = conversion_mapping.get_model_conversion_mapping(twin, add_legacy=False)
    # Set this even if it is empty: transformers then sorts the names, as for a loaded model.
    prefixes = {_named(one) for one in record if _is_prefix(one)}
    twin._weight_conversions = [  # noqa: SLF001
        one for one in registry if not _is_prefix(one) or _named(one) in prefixes
    ]


def _is_layout(conversion: Any) -> bool:
    operations = list(getattr(conversion, "operations", ()))
    if getattr(conversion, "quantization_operation", None) is not None:
        return False
    return all(
        type(one).__module__ == _LAYOUT_MODULE
        or not type(one).__module__.startswith("transformers.")
        for one in operations
    )


def _is_prefix(conversion: Any) -> bool:
    return type(conversion).__name__ == "PrefixChange"


def _named(conversion: Any) -> tuple[str, str | None]:
    return repr(conversion), getattr(conversion, "scope_prefix", None)


def transposed_at_load(twin: Any) -> dict[str, tuple[int, int]]:
    """Return the dims that transformers exchanges at load if shapes require it, by key pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415

    found = {}
    for one in get_model_conversion_mapping(twin, add_legacy=False):
        for operation in getattr(one, "operations", ()):
            if getattr(operation, "check_dims", False):
                dims = (operation.dim0, operation.dim1)
                patterns = (*one.source_patterns, *one.target_patterns)
                found.update(dict.fromkeys((p.replace("*", ".*") for p in patterns), dims))
    return found
