"""The tensors that a model's architecture expects, and whether an export has them.

Pure. A reader builds the model from the config beside the weights, and takes the weights by name.
Weights of other names are lost to it: the reader fills in random values, and says so in a warning.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import LayoutError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.mapping.wrapped_names import WRAPPERS, shared_prefixes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dcp_hf_writer.tensors.boxes import Shape

_MANY = 6
"""How many names one part of a message lists."""

# Parts of names that tell what was added to a model, and the call that avoids it.
_ADDED = {
    r"(?:^|\.)(?:lora_\w+|base_layer)\.": "these are adapters of PEFT: save merged.state_dict() of "
    "merged = copy.deepcopy(model).merge_and_unload(), or pass export=None",
    r"(?:^|\.)v_head\.": "this is a value head: save model.pretrained_model.state_dict() as the "
    "model's entry, and model.v_head.state_dict() as another",
}


@dataclass(frozen=True, slots=True)
class KeySet:
    """One way to name the tensors of a model: as in the live model, or as on the hub."""

    required: Mapping[str, Shape]
    """Shape of each tensor that a reader needs, by name."""
    optional: Mapping[str, Shape]
    """Shape of each tensor that a reader can do without, such as a tied one."""

    def get(self, key: str) -> Shape | None:
        """Return the shape of a tensor; `None` if there is no such tensor."""
        found = self.required.get(key)
        return self.optional.get(key) if found is None else found


@dataclass(frozen=True)
class Architecture:
    """What the architecture that a config names expects. Plain data, which may travel."""

    name: str
    """Name of the model's class."""
    key_sets: tuple[KeySet, ...]
    """The names that readers accept; the first are those of the live model."""
    ignored: tuple[str, ...]
    """Regular expressions of keys that readers ignore."""
    base_prefix: str
    """Name under which a model with a head holds the model without it."""
    is_whole: bool
    """Whether the class is known. If not, the key sets hold the model without its head only."""
    is_sorted: bool
    """Whether `save_pretrained` sorts the names of a model that it did not load."""
    turned: tuple[tuple[str, int, int], ...] = ()
    """Tensors whose dimensions readers swap if the shape asks for it: a regular expression of the
    keys, and the two dimensions."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything above; equal for equal architectures."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Misfit:
    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)


def names_that_fit(
    names: Mapping[str, str], shapes: Mapping[str, Shape], expected: Architecture
) -> dict[str, str]:
    """Remove a prefix that all names have, if the names fit the architecture only without it.

    Args:
        names: Name of each tensor within the model, by FQN.
        shapes: Shape of each tensor, by FQN.
        expected: What the architecture expects.

    Returns:
        The names by FQN. They are unchanged if no prefix makes them fit; `check_fit` then says why.
    """
    best, fewest = "", None
    for prefix in shared_prefixes(names.values()):
        found = {name.removeprefix(prefix): shapes[fqn] for fqn, name in names.items()}
        misfit = _misfit(found, frozenset(), expected)
        if misfit is not None and (fewest is None or misfit.count < fewest):
            best, fewest = prefix, misfit.count
        if fewest == 0:
            break
    if fewest != 0:
        return dict(names)
    return {fqn: name.removeprefix(best) for fqn, name in names.items()}


def check_fit(
    shapes: Mapping[str, Shape],
    left_out: frozenset[str],
    tied: Mapping[str, str],
    expected: Architecture,
) -> None:
    """Check that a reader finds in an export what the config beside it promises.

    Args:
        shapes: Shape of each tensor of the export, by its key.
        left_out: Names and keys that the user's options leave out.
        tied: `{dropped: kept}` keys of tied tensors.
        expected: What the architecture expects.

    Raises:
        LayoutError: If tensors are missing or unexpected, or have other shapes. The message names a
            prefix that is in the way, and the call that avoids it.
    """
    misfit = _misfit(shapes, left_out, expected)
    if misfit is not None and misfit.count == 0:
        return
    names = list(shapes) if misfit is None else misfit.unexpected
    if misfit is None and not expected.is_whole and not _said_of(names, expected):
        # The config names no architecture, so these may be the tensors of any model.
        return
    raise LayoutError(
        "the export does not fit the config beside it",
        phase="plan",
        expected=_expected(misfit, expected),
        found=_found(misfit, shapes),
        hint=_tie_hint(misfit, tied) or _hint(names, misfit, expected),
    )


def _misfit(
    shapes: Mapping[str, Shape], left_out: frozenset[str], expected: Architecture
) -> _Misfit | None:
    """Compare with the key set that fits best; `None` if no tensor is one of the architecture."""
    found = [
        _compared(names, left_out, keys, expected)
        for names in (shapes, *_with_other_base(shapes, expected))
        for keys in expected.key_sets
        if not keys.required or any(keys.get(name) is not None for name in names)
    ]
    return min(found, key=lambda one: one.count, default=None)


def _compared(
    shapes: Mapping[str, Shape], left_out: frozenset[str], keys: KeySet, expected: Architecture
) -> _Misfit:
    ignored = [re.compile(pattern) for pattern in expected.ignored]
    added = [key for key in shapes if keys.get(key) is None]
    if not expected.is_whole:
        # The names of heads are unknown, so a tensor outside the modules of the model may be one.
        modules = {key.partition(".")[0] for key in (*keys.required, *keys.optional)}
        added = [key for key in added if key.partition(".")[0] in modules]
    missing = [key for key in keys.required if key not in shapes and key not in left_out]
    if not expected.is_whole and not added:
        # A model with a head may lack a whole part of the model without one, such as its pooler.
        there = {_part(key, expected) for key in shapes}
        missing = [key for key in missing if _part(key, expected) in there]
    return _Misfit(
        missing=missing,
        unexpected=[key for key in added if not any(one.search(key) for one in ignored)],
        shapes=[
            key
            for key, shape in shapes.items()
            if keys.get(key) not in (None, shape, *_turned(key, shape, expected))
        ],
    )


def _turned(key: str, shape: Shape, expected: Architecture) -> Iterable[Shape]:
    """Yield the shapes that a reader may turn a tensor into."""
    for pattern, one, other in expected.turned:
        if re.search(pattern, key):
            sizes = list(shape)
            sizes[one], sizes[other] = sizes[other], sizes[one]
            yield tuple(sizes)


def _part(key: str, expected: Architecture) -> str:
    """Return the first part of a name within the model without a head."""
    return key.removeprefix(f"{expected.base_prefix}.").partition(".")[0]


def _with_other_base(
    shapes: Mapping[str, Shape], expected: Architecture
) -> Iterable[Mapping[str, Shape]]:
    """Yield the names with the prefix of the base model added: `from_pretrained` adds it too."""
    prefix = f"{expected.base_prefix}."
    if not expected.base_prefix or any(key.startswith(prefix) for key in shapes):
        return
    names = expected.key_sets[0]
    yield {
        key if names.get(f"{prefix}{key}") is None else f"{prefix}{key}": shape
        for key, shape in shapes.items()
    }


def _expected(misfit: _Misfit | None, expected: Architecture) -> str:
    if misfit is None or not misfit.missing:
        return f"the tensors of {expected.name}"
    return f"also {_some(misfit.missing)}, as in {expected.name}"


def _found(misfit: _Misfit | None, shapes: Mapping[str, Shape]) -> str | None:
    if misfit is None:
        return f"none of them, but {_some(shapes)}"
    parts = [f"unexpected {_some(misfit.unexpected)}"] if misfit.unexpected else []
    if misfit.shapes:
        parts.append(
            "other shapes: " + _some(f"{key} {list(shapes[key])}" for key in misfit.shapes)
        )
    return "; ".join(parts) or None


def _tie_hint(misfit: _Misfit | None, tied: Mapping[str, str]) -> str:
    lost = [key for key in misfit.missing if key in tied] if misfit is not None else []
    if not lost:
        return ""
    return (
        f"{lost[0]!r} shares its memory with {tied[lost[0]]!r}, but the config does not tie them: "
        "set tie_word_embeddings in the config, untie them, or pass HFExport(tied={})"
    )


def _hint(names: list[str], misfit: _Misfit | None, expected: Architecture) -> str:
    if said := _said_of(names, expected):
        return "; ".join(said)
    if misfit is not None and misfit.shapes and not misfit.missing and not misfit.unexpected:
        return "change the config to the sizes of the model, or pass the model itself as an asset"
    return (
        "pass the config of this model, or the model itself, as an asset; "
        "HFExport.from_transformers(model) describes another layout"
    )


def _said_of(names: list[str], expected: Architecture) -> list[str]:
    """Return what the names tell about wrappers and additions, and the calls that avoid them."""
    said = [
        text for pattern, text in _ADDED.items() if any(re.search(pattern, one) for one in names)
    ]
    prefix = _prefix_in_the_way(names, expected) or _known_prefix(names)
    if prefix:
        call = _call(prefix)
        said.insert(0, f"the prefix {prefix!r} of a wrapper is in the way: save {call}")
    return said


def _prefix_in_the_way(names: Iterable[str], expected: Architecture) -> str:
    """Return the prefix without which most of the names would be names of the architecture."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            rest = ".".join(parts[cut:])
            if any(keys.get(rest) is not None for keys in expected.key_sets):
                prefix = ".".join(parts[:cut]) + "."
                counts[prefix] = counts.get(prefix, 0) + 1
                break
    return max(counts, key=lambda prefix: counts[prefix], default="")


def wrapper_advice(names: Iterable[str]) -> str | None:
    """Say which prefix of a known wrapper all names have, and the call that avoids it."""
    prefix = _known_prefix(names)
    return f"the prefix {prefix!r} of a wrapper: save {_call(prefix)}" if prefix else None


def _known_prefix(names: Iterable[str]) -> str:
    """Return the prefix of a known wrapper that all names have; empty if there is none."""
    for prefix in reversed(shared_prefixes(names)):
        if any(pattern.fullmatch(prefix) for pattern in WRAPPERS):
            return prefix
    return ""


def _call(prefix: str) -> str:
    for pattern, call in WRAPPERS.items():
        match = pattern.match(prefix)
        if match is not None:
            return call.format(*match.groups())
    return f"the state dict of the module {prefix.removesuffix('.')!r}, without its wrapper"


def _some(names: Iterable[str]) -> str:
    return some_of(map(repr, names), most=_MANY)
