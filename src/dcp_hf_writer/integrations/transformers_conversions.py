"""What transformers converts between its runtime layout and that of the hub."""

from __future__ import annotations

from typing import Any

# Where transformers keeps the operations that only lay tensors out; others quantise.
_LAYOUT_MODULE = "transformers.core_model_loading"


def saved_tensors(twin: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return what `save_pretrained` saves of a state dict, by HuggingFace key.

    Args:
        twin: Unsharded model that says which conversions there are.
        tensors: The state dict, without tied names; any objects that can do what tensors can.
    """
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    saved: dict[str, Any] = revert_weight_conversion(twin, tensors)
    return saved


def take_conversions(model: Any, twin: Any) -> None:
    """Tell the twin which conversions to revert, as far as the model's own record can be used.

    A model from `from_pretrained` records what it converted. Where that includes quantisation, or
    nothing, since it was loaded from runtime names, the registry of transformers decides; it does
    not know which prefixes the checkpoint had, so those are taken from the record.
    """
    from transformers import conversion_mapping  # noqa: PLC0415

    record = getattr(model, "_weight_conversions", None)
    if record is None:
        return
    if record and all(map(_is_layout, record)):
        twin._weight_conversions = record  # noqa: SLF001 - read by revert_weight_conversion
        return
    registry = conversion_mapping.get_model_conversion_mapping(twin, add_legacy=False)
    # The order of the names depends on this too: sorted, once a model was loaded.
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
    """Return patterns of keys that transformers transposes at load if their shape asks for it."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415

    found = {}
    for one in get_model_conversion_mapping(twin, add_legacy=False):
        for operation in getattr(one, "operations", ()):
            if getattr(operation, "check_dims", False):
                dims = (operation.dim0, operation.dim1)
                patterns = (*one.source_patterns, *one.target_patterns)
                found.update(dict.fromkeys((p.replace("*", ".*") for p in patterns), dims))
    return found
