"""Which names an export leaves out because they are tied, and which keys hold their bytes.

Pure. Save and stream both take their ties from here, so they leave out the same names. A tie is
found, because a rank sees that tensors share their memory, or declared, by `LoadSpec.alias_of` or
`HFExport.tied`. It is named by the tensor that is left out, within the model, or by a key of it.
What is kept has the key that the export gives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import LayoutError
from dcp_hf_writer.excerpts import some_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.tensors.boxes import Shape

_MANY = 20
"""How many names an error lists."""

Groups = tuple[tuple[str, ...], ...]


def shared_groups(found: Iterable[Sequence[str]], fqns: Iterable[str]) -> Groups:
    """Join the groups of tensors that ranks found to share their memory.

    A rank that holds no element of a tensor cannot tell, so ranks may see a tie in parts: `a` and
    `c` are the same on one rank, `b` and `c` on another. All three are then one tensor.

    Args:
        found: Groups of FQNs, of all ranks in any order.
        fqns: FQNs of the model's tensors in state-dict order; others do not join groups.

    Returns:
        Connected components of the groups, those with two FQNs or more, in state-dict order.
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
    """Say which tensors of one group are different tensors on this rank.

    Leaving one of them out would lose data, so no rank may go on.

    Args:
        shared: Groups of FQNs, as `shared_groups` joined them.
        memory: Number of the memory of each tensor that has elements on this rank, by FQN.
        phase: What this rank is doing.
    """
    for group in shared:
        here = [fqn for fqn in group if fqn in memory]
        for fqn in here[1:]:
            if memory[fqn] != memory[here[0]]:
                return LayoutError(
                    "tensors share their memory on some ranks only",
                    phase=phase,
                    fqn=fqn,
                    expected=f"the memory of {here[0]!r}, as on another rank",
                    found="memory of its own",
                    hint="pass HFExport(tied={...}), with {} for tensors that are not tied",
                )
    return None


def tied_names(
    found: Iterable[Sequence[str]], names: Mapping[str, str], export: HFExport
) -> dict[str, str]:
    """Join the ties that ranks found with those that are declared.

    The names of one tie are one tensor, of which one name is kept: the one whose key a spec's
    `alias_of` names; else the one that `export.tied` keeps; else the first in state-dict order. A
    tensor whose spec leaves it out altogether is never the one that is kept. Given `export.tied`,
    what ranks found does not count.

    Args:
        found: Groups of FQNs that share their memory, of all ranks in any order.
        names: Name within the model of each of its tensors, by FQN in state-dict order.
        export: Options of the export.

    Returns:
        `{dropped: kept}`: a name within the model, or a key; and the key that holds its bytes, or
        the name of a tensor that specs take apart.
    """
    aliases = {
        spec.name: spec.alias_of
        for spec in export.spec_by_fqn.values()
        if spec.alias_of is not None
    }
    # Every key that an alias leads to is kept, also where two of them turn out to be one tensor.
    needed = frozenset(aliases.values())
    tied = dict(aliases)
    for members in _ties(found, names, export):
        owner, kept = _kept(members, aliases, export)
        if kept is None:
            continue
        # A declared tie of a name to itself stays in, for `checked_ties` to refuse.
        others = members[1:] if owner == members[0] else [n for n in members if n != owner]
        for name in others:
            keys = _keys_of(name, export)
            if name not in tied and keys and needed.isdisjoint(keys):
                tied[name] = kept
    return tied


def declared_ties(export: HFExport, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield names within the model that are declared to be tied: one left out, and one kept.

    Args:
        export: Options of the export.
        names: Names of all tensors of the model.
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
    """Return ties, checked.

    Args:
        shapes: Shape of each tensor of the model, by its name.
        tied: Ties, as `tied_names` returned them.
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
        found = some_of(map(repr, sorted(lost)), most=_MANY)
        raise LayoutError(msg, phase="plan", expected="kept tensors", found=found)
    # A tensor that is left out may have had the name that another one is given.
    return {drop: keep for drop, keep in tied.items() if drop not in stored}


def _ties(
    found: Iterable[Sequence[str]], names: Mapping[str, str], export: HFExport
) -> Iterator[list[str]]:
    """Yield the names of each tie: first the one to keep as far as specs say nothing."""
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
    """Return which name of a tie is kept, if it is one of them, and its key; `None` without one."""
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
