"""Find the tied names that an export leaves out, and the keys that hold their bytes.

Pure. Save and stream both use this module, so they leave out the same names. There are two kinds of
ties. Ranks find a tie when they see that tensors share their memory. Users declare a tie by
`LoadSpec.alias_of` or `HFExport.tied`.

A tie maps a dropped name to a kept name. The dropped name is a name within the model or a
HuggingFace key. The kept name is the HuggingFace key that holds the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import LayoutError
from dcp_hf_writer.excerpts import MOST_NAMES, some_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.tensors.boxes import Shape


_CHANGE_TIES = "change HFExport.tied, or alias_of in the LoadSpec"

Groups = tuple[tuple[str, ...], ...]


def shared_groups(found: Iterable[Sequence[str]], fqns: Iterable[str]) -> Groups:
    """Join the groups of tensors that share their memory, as each rank found them.

    A rank that holds no element of a tensor cannot see its ties, so a rank may see only a part of a
    tie. Suppose that one rank finds that `a` and `c` share their memory, and another rank finds the
    same for `b` and `c`. Then all three are one tensor.

    Args:
        found: Groups of FQNs from all ranks, in any order.
        fqns: FQNs of the model's tensors in state-dict order. Other FQNs are ignored.

    Returns:
        Connected components of the groups that have two FQNs or more, in state-dict order.
    """
    order = {fqn: i for i, fqn in enumerate(fqns)}
    first = list(range(len(order)))

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    # Most ranks find the same groups.
    for group in set(map(tuple, found)):
        roots = {root(order[fqn]) for fqn in group if fqn in order}
        for one in roots:
            first[one] = min(roots)
    joined: dict[int, list[str]] = {}
    for fqn, i in order.items():
        joined.setdefault(root(i), []).append(fqn)
    return tuple(tuple(group) for group in joined.values() if len(group) > 1)


def tie_fault(
    shared: Iterable[Sequence[str]], memory: Mapping[str, int], *, phase: str
) -> LayoutError | None:
    """Return an error if tensors of one group do not share their memory on this rank.

    Such tensors are different, so an export without one of them would lose data. No rank may go on.

    Args:
        shared: Groups of FQNs, from `shared_groups`.
        memory: A number for the memory of each tensor, by FQN; equal if tensors share their memory.
            Tensors without elements on this rank are left out.
        phase: What this rank is doing.

    Returns:
        The error for the first such tensor; `None` if there is none.
    """
    for group in shared:
        here = [fqn for fqn in group if fqn in memory]
        for fqn in here[1:]:
            if memory[fqn] != memory[here[0]]:
                return LayoutError(
                    "tensors share their memory on some ranks only",
                    phase=phase,
                    fqn=fqn,
                    expected=f"the same memory as {here[0]!r}, as on another rank",
                    found="other memory on this rank",
                    hint="declare the ties by HFExport(tied={...}), or pass tied={} for no ties",
                )
    return None


def tied_names(
    found: Iterable[Sequence[str]], names: Mapping[str, str], export: HFExport
) -> dict[str, str]:
    """Combine the ties that ranks found with the ties that are declared.

    All names of one tie stand for one tensor, and the export keeps one of these names. If a spec's
    `alias_of` gives the key of one name, the export keeps that name. Otherwise it keeps the name
    that `export.tied` keeps, or else the first name in state-dict order. It never keeps a name
    whose spec leaves the tensor out. If `export.tied` is set, the ties that ranks found are
    ignored.

    Args:
        found: Groups of FQNs that share their memory, from all ranks, in any order.
        names: Name of each tensor within the model, by FQN in state-dict order.
        export: Options of the export.

    Returns:
        `{dropped: kept}`. `dropped` is a name within the model, or a key. `kept` is the key that
        holds the bytes; for a tensor that its spec splits into several keys, it is the name.
    """
    aliases = {
        spec.name: spec.alias_of
        for spec in export.spec_by_fqn.values()
        if spec.alias_of is not None
    }
    # The export keeps every key that an alias leads to, even if two of these keys are one tensor.
    needed = frozenset(aliases.values())
    tied = dict(aliases)
    for members in _ties(found, names, export):
        owner, kept = _kept(members, aliases, export)
        if kept is None:
            continue
        # Keep a declared tie of a name to itself, so that `checked_ties` refuses it.
        others = members[1:] if owner == members[0] else [n for n in members if n != owner]
        for name in others:
            keys = _keys_of(name, export)
            if name not in tied and keys and needed.isdisjoint(keys):
                tied[name] = kept
    return tied


def declared_ties(export: HFExport, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each declared tie as two names within the model: the dropped name and the kept name.

    Args:
        export: Options of the export.
        names: Names of all tensors within the model.
    """
    name_of = {
        spec.hf_keys[0]: spec.name
        for spec in export.spec_by_fqn.values()
        if len(spec.hf_keys) == 1 and spec.alias_of is None
    }
    for spec in export.spec_by_fqn.values():
        if spec.alias_of is not None:
            yield spec.name, name_of.get(spec.alias_of, spec.alias_of)
    for pair in (export.tied or {}).items():
        drop, keep = (one if one in names else name_of.get(one, one) for one in pair)
        yield drop, keep


def checked_ties(
    shapes: Mapping[str, Shape], tied: Mapping[str, str], export: HFExport
) -> dict[str, str]:
    """Check ties, and return a copy of them.

    Args:
        shapes: Shape of each tensor of the model, by its name.
        tied: Ties from `tied_names`.
        export: Options of the export.

    Raises:
        LayoutError: If a tie leads to another tie, to an unknown name, or to a tensor of another
            shape.
    """
    if not tied:
        return {}
    keys = {key for spec in export.spec_by_fqn.values() for key in spec.hf_keys}
    known, kept = shapes.keys() | keys, set(tied.values())
    shape_of = {name: s for name, s in shapes.items() if name not in export.spec_by_fqn}
    for drop, keep in tied.items():
        own = _keys_of(drop, export)
        if not kept.isdisjoint(own if len(own) == 1 else (drop, *own)) or keep not in known:
            msg = "tied names must lead from a dropped tensor to one that is kept"
            raise LayoutError(
                msg,
                phase="plan",
                key=drop,
                expected="a name or key that the export keeps",
                found=keep,
                hint=_CHANGE_TIES,
            )
        if shape_of.get(drop, ()) != shape_of.get(keep, ()) and {drop, keep} <= shape_of.keys():
            msg = "tied names must stand for one tensor, but their tensors have different shapes"
            raise LayoutError(
                msg,
                phase="plan",
                key=drop,
                expected=f"shape {list(shape_of[keep])}, as {keep!r}",
                found=f"shape {list(shape_of[drop])}",
                hint=_CHANGE_TIES,
            )
    return dict(tied)


def tied_keys(
    dropped: Mapping[str, str], stored: Collection[str], export: HFExport
) -> dict[str, str]:
    """Translate ties into HuggingFace keys, which readers of the export use.

    Args:
        dropped: Ties from `checked_ties`.
        stored: Keys of the export.
        export: Options of the export.

    Returns:
        `{dropped: kept}` keys. If two tied tensors have different numbers of keys, it has their
        names instead.

    Raises:
        LayoutError: If the export does not have the kept tensor of a tie either.
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
        found = some_of(map(repr, sorted(lost)), most=MOST_NAMES)
        expected = "tensors that the export keeps"
        raise LayoutError(msg, phase="plan", expected=expected, found=found, hint=_CHANGE_TIES)
    # A spec may give the name of a dropped tensor to another tensor, which is then stored.
    return {drop: keep for drop, keep in tied.items() if drop not in stored}


def _ties(
    found: Iterable[Sequence[str]], names: Mapping[str, str], export: HFExport
) -> Iterator[list[str]]:
    """Yield the names of each tie, starting with the name to keep unless a spec says otherwise."""
    if export.tied is None:
        for group in shared_groups(found, names):
            yield [names[fqn] for fqn in group]
        return
    dropped: dict[str, list[str]] = {}
    for drop, keep in sorted(export.tied.items()):
        dropped.setdefault(keep, []).append(drop)
    for keep, drops in dropped.items():
        yield [keep, *drops]


def _kept(
    members: Sequence[str], aliases: Mapping[str, str], export: HFExport
) -> tuple[str | None, str | None]:
    """Return the kept name of a tie, and its key.

    The name is `None` if an alias leads to a key outside the tie. Both are `None` if specs leave
    every name out.
    """
    needed = frozenset(aliases.values())
    own = [name for name in members if name not in aliases and _keys_of(name, export)]
    for name in own:
        if not needed.isdisjoint(_keys_of(name, export)):
            return name, _key_of(name, export)
    for name in members:
        if name in aliases:
            return None, aliases[name]
    return (own[0], _key_of(own[0], export)) if own else (None, None)


def _keys_of(name: str, export: HFExport) -> tuple[str, ...]:
    spec = export.spec_by_fqn.get(name)
    return (name,) if spec is None else spec.hf_keys


def _key_of(name: str, export: HFExport) -> str:
    keys = _keys_of(name, export)
    return keys[0] if len(keys) == 1 else name
