"""Which names an export leaves out because they are tied to others, and under which keys those are.

Pure. A tie is named as it was found or declared: by the tensor that is left out, within the model,
or by a key of it. What is kept has the key that the export gives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.tensors.boxes import Shape

_MANY = 20
"""How many names an error lists."""


def all_ties(found: Mapping[str, str], export: HFExport) -> dict[str, str]:
    """Join the ties that specs declare with those given or found; what a spec declares holds.

    Returns:
        `{dropped: kept}`: a name within the model, or a key; and the key that holds its bytes, or
        the name of a tensor that specs take apart.
    """
    ends = {
        spec.name: spec.alias_of
        for spec in export.spec_by_fqn.values()
        if spec.alias_of is not None
    }
    others = found if export.tied is None else export.tied
    # What aliases lead to is kept, also where storage alone would have dropped it for another; and
    # what a spec leaves out cannot be what is kept.
    kept = set(ends.values())
    for drop, keep in others.items():
        keys, other_keys = _keys_of(drop, export), _keys_of(keep, export)
        if keep in ends or not kept.isdisjoint(other_keys):
            continue
        if not kept.isdisjoint(keys):
            ends[keep] = min(kept.intersection(keys))
        elif not other_keys and len(keys) == 1:
            ends[keep] = keys[0]
            kept.add(keys[0])
    tied = dict(ends)
    for drop, keep in others.items():
        end = ends.get(keep) or (_key_of(keep, export) if _keys_of(keep, export) else None)
        if drop not in tied and end is not None and kept.isdisjoint(_keys_of(drop, export)):
            tied[drop] = end
    return tied


def checked_ties(
    shapes: Mapping[str, Shape], tied: Mapping[str, str], export: HFExport
) -> dict[str, str]:
    """Return ties, checked.

    Args:
        shapes: Shape of each tensor of the model, by its name.
        tied: Ties, as `all_ties` returned them.
        export: Options of the export.

    Raises:
        LayoutError: If one leads to another tie, to nothing, or to a tensor of another shape.
    """
    keys = {key for spec in export.spec_by_fqn.values() for key in spec.hf_keys}
    known, kept = shapes.keys() | keys, set(tied.values())
    shape_of = {name: s for name, s in shapes.items() if name not in export.spec_by_fqn}
    for drop, keep in tied.items():
        own = _keys_of(drop, export)
        if not kept.isdisjoint(own if len(own) == 1 else (drop, *own)) or keep not in known:
            msg = "tied names must lead from a dropped tensor to one that is kept"
            raise LayoutError(msg, phase="plan", key=drop, expected="a kept tensor", found=keep)
        if shape_of.get(drop, ()) != shape_of.get(keep, ()) and {drop, keep} <= shape_of.keys():
            msg = "tied names must be names of one tensor, these have different shapes"
            raise LayoutError(
                msg,
                phase="plan",
                key=drop,
                expected=f"shape {list(shape_of[keep])}, as {keep!r}",
                found=f"shape {list(shape_of[drop])}",
            )
    return dict(tied)


def tied_keys(
    dropped: Mapping[str, str], stored: Collection[str], export: HFExport
) -> dict[str, str]:
    """Say ties in the names that readers of the export know.

    Args:
        dropped: Ties, as `checked_ties` returned them.
        stored: Keys of the export.
        export: Options of the export.

    Returns:
        `{dropped: kept}` keys; names of tensors whose keys do not go in pairs.

    Raises:
        LayoutError: If nothing is left of what is tied.
    """
    tied: dict[str, str] = {}
    for drop, keep in dropped.items():
        drops, keeps = _keys_of(drop, export), _keys_of(keep, export)
        if len(drops) == 1:
            tied[drops[0]] = keep
        elif drops:
            tied |= zip(drops, keeps, strict=True) if len(drops) == len(keeps) else [(drop, keep)]
    apart = {name for name, spec in export.spec_by_fqn.items() if len(spec.hf_keys) != 1}
    lost = set(tied.values()) - set(stored) - apart
    if lost:
        msg = "tied names lead to tensors that are not exported either"
        raise LayoutError(msg, phase="plan", expected="kept tensors", found=sorted(lost)[:_MANY])
    # A tensor that is left out may have had the name that another one is given.
    return {drop: keep for drop, keep in tied.items() if drop not in stored}


def _keys_of(name: str, export: HFExport) -> tuple[str, ...]:
    spec = export.spec_by_fqn.get(name)
    return (name,) if spec is None else spec.hf_keys


def _key_of(name: str, export: HFExport) -> str:
    keys = _keys_of(name, export)
    return keys[0] if len(keys) == 1 else name
