"""Make a model card from the config of a model and the facts of its save. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SHOWN = (
    ("hidden_size", "hidden size"),
    ("num_hidden_layers", "layers"),
    ("num_attention_heads", "attention heads"),
    ("num_key_value_heads", "key-value heads"),
    ("num_local_experts", "experts"),
    ("num_experts", "experts"),
    ("vocab_size", "vocabulary"),
    ("max_position_embeddings", "context length"),
)
"""Fields of a config that a card shows, with their names for people."""


def model_card(
    name: str,
    config: Mapping[str, Any],
    *,
    parameters: int,
    dtypes: Sequence[str],
    step: int | None,
    world_size: int | None,
) -> str:
    """Return the text of `README.md`.

    Args:
        name: Name of the model.
        config: Its `config.json`; empty without one.
        parameters: Elements of all its tensors.
        dtypes: Dtypes of the tensors, as safetensors names them.
        step: Training step of the save; `None` if it is not known.
        world_size: Number of ranks that saved it; `None` if it is not known.
    """
    architecture = _first(config.get("architectures"))
    kind = config.get("model_type")
    is_transformers = isinstance(kind, str) and architecture is not None
    rows: list[tuple[str, str]] = []
    if architecture is not None:
        rows.append(("architecture", architecture))
    rows += [("parameters", f"{parameters:,}"), ("dtype", ", ".join(dtypes))]
    rows += [
        (says, f"{config[field]:,}")
        for field, says in _SHOWN
        if type(config.get(field)) is int and config[field] > 0
    ]
    if step is not None:
        rows.append(("training step", str(step)))
    if world_size is not None:
        rows.append(("saved by", f"{world_size} rank{'' if world_size == 1 else 's'}"))
    head = ["---", *(["library_name: transformers"] if is_transformers else []), "tags:"]
    lines = [*head, "- safetensors", "- dcp-hf-writer", "---", "", f"# {_plain(name)}", ""]
    lines += ["| | |", "|---|---|", *(f"| {says} | {_plain(value)} |" for says, value in rows)]
    lines += [
        "",
        "Nobody has described this model yet: what it is for, what it was trained on, and",
    ]
    lines += ["how well it does.", ""]
    return "\n".join(lines)


def _first(value: Any) -> str | None:
    found = value[0] if isinstance(value, list) and value else None
    return found if isinstance(found, str) else None


def _plain(text: str) -> str:
    """Return text without the characters that Markdown or a table would take for markup."""
    return "".join(f"\\{c}" if c in "\\`*[]<>|#" else c for c in text if c.isprintable())
