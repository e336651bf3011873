"""The global plan of the coordinator, and the data that DCP's plans carry between ranks.

With plan caching, DCP may reuse the plans of an earlier save and show the coordinator empty ones.
The types here carry the ids by which each side notices that.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.mapping.architecture import check_fit, names_that_fit
from dcp_hf_writer.mapping.model_entry import (
    holds_weights,
    left_out_of_model,
    model_prefix,
    names_in_model,
    without_moments,
)
from dcp_hf_writer.mapping.tied_names import shared_groups, tie_fault
from dcp_hf_writer.mapping.wrapped_names import unwrapped_names
from dcp_hf_writer.plan.assign_hf_keys import RuntimeTensor
from dcp_hf_writer.plan.layout import Layout, PartTarget, plan_layout
from dcp_hf_writer.plan.planned_tensors import PlannedTensor, planned_tensors
from dcp_hf_writer.plan.rank_targets import hosts_that_share_rows, targets_by_rank
from dcp_hf_writer.plan.weights_once import targets_stored_once
from dcp_hf_writer.tensors.boxes import BoxTable, Shape

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch.distributed.checkpoint.planner import SavePlan

    from dcp_hf_writer.mapping.architecture import Architecture
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.mapping.model_entry import Path

_DCP_ONLY = "dcp-only"


@dataclass(frozen=True, slots=True)
class LocalFacts:
    """Facts that only the rank itself has before global planning. Its local plan carries them."""

    host: str
    """Id of the page cache that its writes go through: its kernel and the mounted file system."""
    order: tuple[str, ...] | None
    """FQNs in state-dict order, from the coordinator; `None` from the others."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of FQNs whose tensors share one memory on this rank."""
    samples: bytes = b""
    """Samples of tensors that may look like replicas; `compare_ranks` compares them."""
    stamp: str = ""
    """Unique to this rank and save: DCP's plan cache may show the facts of an earlier save."""
    lone_ties: tuple[tuple[str, str, bool], ...] = ()
    """Declared ties with only one tensor on this rank, as `drifted_ties.lone_ties` lists them."""
    target: str | None = None
    """Path that the rank saves to; out of date in a plan from DCP's plan cache."""
    options: str = ""
    """Options that all ranks must share, as text; out of date in a plan from DCP's plan cache."""
    digest: str = ""
    """Digest of the plan and of the facts that the global plan depends on; `""` without one."""
    kept: tuple[str, ...] = ()
    """Ids of the global plans of which the rank still has its part."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What a rank needs to write its part. The final plan of the rank carries it.

    It holds no path, time or id of a save: with plan caching, DCP hands out the plan of an earlier
    save.
    """

    dcp: Any
    """`storage_data` of the DCP writer."""
    plan_id: str
    """Id of the global plan. The coordinator announces the id of the plan that it uses."""
    host_ranks: tuple[int, ...]
    """The ranks of the same host, this one included, ascending."""
    host_rank: int
    """Index of this rank among them."""
    shares_rows: bool
    """Whether several ranks of the host may hold parts of the same rows; all of them agree."""
    files: tuple[tuple[str, int], ...]
    """`(name, bytes)` of each output file."""
    targets: Mapping[str, tuple[PartTarget, ...]]
    """By FQN, the targets of each tensor that this rank writes."""
    once: Mapping[str, tuple[PartTarget, ...]]
    """By FQN, the targets of this rank's tensors that only the export stores; tied ones too."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of FQNs that the plan treats as one tensor because a rank found one memory."""

    @property
    def host_size(self) -> int:
        """Number of ranks of the same host."""
        return len(self.host_ranks)


@dataclass(frozen=True, slots=True)
class KeptPart:
    """Stands for a `RankPlan` that the rank has kept from an earlier save."""

    dcp: Any
    """`storage_data` of the DCP writer."""
    plan_id: str
    """Id of the global plan."""


@dataclass(frozen=True, slots=True)
class GlobalPlan:
    """The result of global planning, kept by the coordinator."""

    plans: list[SavePlan]
    """DCP's plans, one per rank, without our data."""
    layout: Layout | None
    """The export; `None` without one."""
    plan_id: str
    """Unique id. A rank must not write from another plan that it kept, even a similar one."""
    options: str
    """Fingerprint of the export options that led to this plan."""
    hosts: tuple[str, ...]
    """Host of each rank."""
    tensors: Mapping[str, PlannedTensor]
    """Every tensor of the plans, by FQN; empty without an export."""
    once: Mapping[str, tuple[PartTarget, ...]]
    """By FQN, the targets of the tensors that only the export stores."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of FQNs that the plan treats as one tensor because a rank found one memory."""
    entry: Path = ()
    """Path of the entry that holds the model."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Name within the model of each tensor of the model, by FQN; empty without an export."""
    left_out: tuple[str, ...] = ()
    """Tensors outside the model, which the export leaves out: the texts of `left_out_of_model`."""

    def without_chunks(self) -> GlobalPlan:
        """Return what a later save with the same layout needs; the plans and chunks are large."""
        tensors = {
            fqn: PlannedTensor(tensor.data, tensor.path, [], [], [])
            for fqn, tensor in self.tensors.items()
        }
        return replace(self, plans=[], tensors=tensors)


def plan_globally(
    plans: list[SavePlan],
    export: HFExport | None,
    *,
    options: str,
    file_of_key: Mapping[str, str] | None,
    architecture: Architecture | None = None,
    once: bool = False,
) -> GlobalPlan:
    """Plan the export from DCP's deduplicated plans (coordinator).

    A state dict without weights gives a plan without an export, unless the options name tensors.

    Args:
        plans: DCP's plans, one per rank.
        export: The export; `None` for the DCP half only.
        options: Fingerprint of all options that the plan depends on.
        file_of_key: File of each key, from the index of `export.like`.
        architecture: What the config beside the weights expects; `None` if nobody can tell.
        once: Whether the DCP half leaves out the tensors that the export stores bit for bit.

    Raises:
        PlanningError: If the state dict cannot be exported with these options, or if a rank's plan
            does not carry `LocalFacts`.
    """
    facts = [_facts(plan) for plan in plans]
    hosts = tuple(fact.host for fact in facts)
    without = GlobalPlan(plans, None, uuid.uuid4().hex, options, hosts, {}, {}, ())
    if export is None:
        planned_tensors(plans)  # for its check of what the ranks plan under one name
        return without
    planned = planned_tensors(plans)
    paths = {fqn: tensor.path for fqn, tensor in planned.items()}
    if holds_nothing_to_export(paths, export):
        return replace(without, left_out=tuple(left_out_of_model(paths, (), ())))
    entry, tensors = _runtime_tensors(planned, facts, export, architecture)
    found = (group for fact in facts for group in fact.tied)
    shared = shared_groups(found, (tensor.fqn for tensor in tensors))
    is_sorted = architecture is not None and architecture.is_sorted
    layout = plan_layout(tensors, export, tied=shared, file_of_key=file_of_key, sort=is_sorted)
    if architecture is not None:
        check_fit(shapes_of(layout), left_out_by(export), layout.tied, architecture)
    names = {tensor.fqn: tensor.name for tensor in tensors}
    stored = targets_stored_once(tensors, layout.targets, shared) if once else {}
    return GlobalPlan(
        plans=plans,
        layout=layout,
        plan_id=uuid.uuid4().hex,
        options=options,
        hosts=hosts,
        tensors=planned,
        once=stored,
        tied=_checked_groups(shared, export, layout, stored.keys()),
        entry=entry,
        names=names,
        left_out=tuple(left_out_of_model(paths, entry, names)),
    )


def shapes_of(layout: Layout) -> dict[str, Shape]:
    """Return the shape of each tensor of an export, by its key."""
    return {one.key: one.shape for parts in layout.targets.values() for one in parts}


def left_out_by(export: HFExport) -> frozenset[str]:
    """Return the names and keys that the options leave out."""
    specs = export.spec_by_fqn.values()
    left_out = (s for s in specs if not s.hf_keys or s.alias_of is not None)
    return frozenset({*(export.tied or {}), *(k for s in left_out for k in (s.name, *s.hf_keys))})


def rank_plans(plan: GlobalPlan, dcp: Sequence[SavePlan]) -> list[SavePlan]:
    """Attach to each rank's plan the data that this rank needs, and no data of other ranks.

    Args:
        plan: The global plan.
        dcp: The same plans, after the DCP writer prepared them.
    """
    of_host: dict[str, list[int]] = {}
    for rank, host in enumerate(plan.hosts):
        of_host.setdefault(host, []).append(rank)
    ranks_of_host = {host: tuple(ranks) for host, ranks in of_host.items()}
    seen: Counter[str] = Counter()
    files = () if plan.layout is None else tuple((f.name, f.nbytes) for f in plan.layout.files)
    exported = {} if plan.layout is None else plan.layout.targets
    with_rows = hosts_that_share_rows(exported, plan.tensors, plan.hosts)
    targets = targets_by_rank(exported, plan.tensors, world_size=len(plan.hosts))
    once = targets_by_rank(plan.once, plan.tensors, world_size=len(plan.hosts))
    result = []
    for rank, (host, prepared) in enumerate(zip(plan.hosts, dcp, strict=True)):
        data = RankPlan(
            dcp=prepared.storage_data,
            plan_id=plan.plan_id,
            host_ranks=ranks_of_host[host],
            host_rank=seen[host],
            shares_rows=host in with_rows,
            files=files,
            targets=targets[rank],
            once=once[rank],
            tied=plan.tied,
        )
        seen[host] += 1
        result.append(replace(prepared, storage_data=data))
    return result


def options_fingerprint(
    export: HFExport | None,
    file_of_key: Mapping[str, str] | None,
    architecture: Architecture | None = None,
) -> str:
    """Return a fingerprint of the options that a layout depends on; equal for equal options."""
    if export is None:
        return _DCP_ONLY
    like = None if file_of_key is None else sorted(file_of_key.items())
    text = f"{export.fingerprint} {like!r} {architecture and architecture.fingerprint}"
    return hashlib.sha256(text.encode()).hexdigest()


def _facts(plan: SavePlan) -> LocalFacts:
    facts = plan.storage_data
    if not isinstance(facts, LocalFacts):
        msg = "a rank's plan was not made by HFDualWriter"
        raise PlanningError(
            msg,
            phase="plan",
            expected="the same kind of storage_writer on every rank",
            found=type(facts).__name__,
            hint="with enable_plan_caching, use a planner that no other writer has used",
        )
    return facts


def _runtime_tensors(
    planned: Mapping[str, PlannedTensor],
    facts: Sequence[LocalFacts],
    export: HFExport,
    architecture: Architecture | None,
) -> tuple[Path, list[RuntimeTensor]]:
    """Return the path of the model's entry, and the model's tensors in state-dict order."""
    order = next((fact.order for fact in facts if fact.order is not None), ())
    ranked = {fqn: i for i, fqn in enumerate(order)}
    fqns = sorted(planned, key=lambda fqn: ranked.get(fqn, len(ranked)))
    paths = {fqn: planned[fqn].path for fqn in fqns}
    shapes = {fqn: tuple(planned[fqn].data.size) for fqn in fqns}
    entry, names = names_for_export(paths, shapes, export, architecture)
    return entry, [
        RuntimeTensor(
            fqn=fqn,
            name=name,
            shape=shapes[fqn],
            dtype=planned[fqn].data.properties.dtype,
            chunks=BoxTable(planned[fqn].offsets, planned[fqn].sizes),
        )
        for fqn, name in names.items()
    ]


def holds_nothing_to_export(paths: Mapping[str, Path], export: HFExport) -> bool:
    """Whether a state dict holds no weights, and the options name no tensor and no entry in it.

    Args:
        paths: Path of each tensor of the state dict, by FQN.
        export: Options of the export.
    """
    return not export.declared_names and export.key is None and not holds_weights(paths)


def names_for_export(
    paths: Mapping[str, Path],
    shapes: Mapping[str, Shape],
    export: HFExport,
    architecture: Architecture | None,
) -> tuple[Path, dict[str, str]]:
    """Return the path of the model's entry, and the names of the model's tensors by FQN, in order.

    Args:
        paths: Path of each tensor of the state dict, by FQN.
        shapes: Shape of each tensor, by FQN.
        export: Options of the export.
        architecture: What the config beside the weights expects; `None` if nobody can tell.

    Raises:
        ModelKeyError: If it is not clear which entry holds the model.
    """
    entry = model_prefix(paths, key=export.key)
    names = without_moments(names_in_model(paths, entry))
    names = unwrapped_names(names, export.declared_names)
    if architecture is not None and not export.spec_by_fqn:
        names = names_that_fit(names, shapes, architecture)
    return entry, names


def _checked_groups(
    shared: Iterable[tuple[str, ...]], export: HFExport, plan: Layout, once: Collection[str]
) -> tuple[tuple[str, ...], ...]:
    """Return the tied groups that every rank checks: the save leaves tensors out for them."""
    # With `HFExport(tied=...)` the user declares what the export leaves out. The ties that ranks
    # find then only let the DCP half leave out a tensor that is not exported under its own name.
    if export.tied is None:
        return tuple(shared)
    left_out = once - plan.targets.keys()
    return tuple(group for group in shared if not left_out.isdisjoint(group))


def check_tied(shared: Iterable[tuple[str, ...]], memory: Mapping[str, int], *, rank: int) -> None:
    """Check that tensors which another rank found tied are not different tensors on this rank.

    Raises:
        LayoutError: If they are different: leaving one out would lose data.
    """
    fault = tie_fault(shared, memory, phase="write")
    if fault is not None:
        fault.rank = rank
        raise fault
