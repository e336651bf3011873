"""What travels with DCP's plans, and the global plan that DCP's cache hides from us."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.mapping.model_entry import model_prefix, names_in_model
from dcp_hf_writer.mapping.tied_names import shared_groups, tie_fault
from dcp_hf_writer.plan.assign_keys import RuntimeTensor
from dcp_hf_writer.plan.layout import Layout, PartTarget, plan_layout
from dcp_hf_writer.plan.regions import TargetTable
from dcp_hf_writer.plan.weights_once import targets_stored_once
from dcp_hf_writer.tensors.boxes import BoxTable, Shape

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.mapping.model_entry import Path

_DCP_ONLY = "dcp-only"


@dataclass(frozen=True, slots=True)
class LocalFacts:
    """What only a rank knows before the global plan; its local plan carries it."""

    host: str
    """Id of its kernel instance."""
    order: tuple[str, ...] | None
    """FQNs in state-dict order, from the coordinator; `None` from the others."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of FQNs whose tensors are the same memory."""
    samples: bytes = b""
    """Of the tensors that may pass for replicas, as `detect_hand_sharded` compares them."""
    stamp: str = ""
    """Unique to this rank and save: with plan caching DCP shows the facts of an earlier save."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What a rank needs to write its part; its final plan carries it.

    Holds no path, time or id of a save: with plan caching DCP hands out that of an earlier save.
    """

    dcp: Any
    """`storage_data` of the DCP writer."""
    plan_id: str
    """Of the global plan; the coordinator announces the one that it works from."""
    host_rank: int
    """Index among the ranks of the same host."""
    host_size: int
    """Number of ranks of the same host."""
    files: tuple[tuple[str, int], ...]
    """`(name, bytes)` of each output file."""
    targets: Mapping[str, tuple[PartTarget, ...]]
    """Where the parts of each tensor go that this rank writes, by FQN."""
    once: Mapping[str, tuple[PartTarget, ...]]
    """Where tensors are that the DCP half leaves to the export, by FQN; as `targets`, and tied."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of FQNs that are taken for one tensor because ranks found them to be."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """What all ranks together write of one tensor, in columns: there are millions of items."""

    data: TensorWriteData
    """Shape and dtype, from the first item."""
    path: Path
    """Keys that lead to it in the state dict."""
    ranks: list[int]
    """Rank that writes each chunk."""
    offsets: list[Shape]
    """First indices of each chunk."""
    sizes: list[Shape]
    """Extents of each chunk."""


@dataclass(frozen=True, slots=True)
class GlobalPlan:
    """The coordinator's result."""

    plans: list[SavePlan]
    """One a rank, as DCP made them, without ours."""
    layout: Layout | None
    """The export; `None` without one."""
    plan_id: str
    """Unique: a rank that kept a part of another plan must not write it, be it ever so similar."""
    options: str
    """Fingerprint of the export options that led to it."""
    hosts: tuple[str, ...]
    """Host of each rank."""
    tensors: Mapping[str, PlannedTensor]
    """Every tensor of the plans, by FQN; empty without an export."""
    once: Mapping[str, tuple[PartTarget, ...]]
    """Where tensors are that the DCP half leaves to the export, by FQN."""
    tied: tuple[tuple[str, ...], ...]
    """Groups of FQNs that are taken for one tensor because ranks found them to be."""


def plan_globally(
    plans: list[SavePlan],
    export: HFExport | None,
    *,
    options: str,
    file_of_key: Mapping[str, str] | None,
    once: bool = False,
) -> GlobalPlan:
    """Plan the export from DCP's deduplicated plans (coordinator).

    Args:
        plans: DCP's plans, one a rank.
        export: The export; `None` for the DCP half only.
        options: Fingerprint of all options that the plan follows from.
        file_of_key: File of each key, from the index of `export.like`.
        once: Whether the DCP half leaves to the export what it holds bit for bit.

    Raises:
        PlanningError: If the state dict cannot be exported as asked.
    """
    facts = [_facts(plan) for plan in plans]
    hosts = tuple(fact.host for fact in facts)
    if export is None:
        return GlobalPlan(plans, None, uuid.uuid4().hex, options, hosts, {}, {}, ())
    planned = _planned_tensors(plans)
    tensors = _runtime_tensors(planned, facts, export.key)
    found = (group for fact in facts for group in fact.tied)
    shared = shared_groups(found, (tensor.fqn for tensor in tensors))
    layout = plan_layout(tensors, export, tied=shared, file_of_key=file_of_key)
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
    )


def rank_plans(plan: GlobalPlan, dcp: Sequence[SavePlan]) -> list[SavePlan]:
    """Attach to each rank's plan what it needs, and nothing of the others'.

    Args:
        plan: The global plan.
        dcp: The same plans as the DCP writer prepared them.
    """
    seen: dict[str, int] = {}
    sizes = {host: plan.hosts.count(host) for host in set(plan.hosts)}
    files = () if plan.layout is None else tuple((f.name, f.nbytes) for f in plan.layout.files)
    targets = _by_rank({} if plan.layout is None else plan.layout.targets, plan)
    once = _by_rank(plan.once, plan)
    result = []
    for rank, (host, prepared) in enumerate(zip(plan.hosts, dcp, strict=True)):
        host_rank = seen.get(host, 0)
        seen[host] = host_rank + 1
        data = RankPlan(
            dcp=prepared.storage_data,
            plan_id=plan.plan_id,
            host_rank=host_rank,
            host_size=sizes[host],
            files=files,
            targets=targets[rank],
            once=once[rank],
            tied=plan.tied,
        )
        result.append(replace(prepared, storage_data=data))
    return result


def _by_rank(
    targets: Mapping[str, tuple[PartTarget, ...]], plan: GlobalPlan
) -> list[dict[str, tuple[PartTarget, ...]]]:
    """Return the targets of what each rank writes: an expert of its own, not those of the rest."""
    found: list[dict[str, tuple[PartTarget, ...]]] = [{} for _ in plan.plans]
    for fqn, parts in targets.items():
        tensor = plan.tensors[fqn]
        if len(parts) == 1 or not tensor.data.size:
            for rank in tensor.ranks:
                found[rank][fqn] = parts
            continue
        table = TargetTable(parts)
        rows: dict[int, set[tuple[int, int]]] = {}
        for rank, offsets, sizes in zip(tensor.ranks, tensor.offsets, tensor.sizes, strict=True):
            rows.setdefault(rank, set()).add((offsets[0], offsets[0] + sizes[0]))
        for rank, wanted in rows.items():
            found[rank][fqn] = table.near_rows(frozenset(wanted))
    return found


def options_fingerprint(export: HFExport | None, file_of_key: Mapping[str, str] | None) -> str:
    """Name the options that a layout follows from, equal for equal options."""
    if export is None:
        return _DCP_ONLY
    like = None if file_of_key is None else sorted(file_of_key.items())
    return hashlib.sha256(f"{export.fingerprint} {like!r}".encode()).hexdigest()


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


def _planned_tensors(plans: Iterable[SavePlan]) -> dict[str, PlannedTensor]:
    """Collect what the ranks write of each tensor."""
    # The one pass over every item of every rank: this is what grows with the job. Each attribute is
    # read once, as most of the time goes into fetching the objects from memory.
    found: dict[str, PlannedTensor] = {}
    for rank, plan in enumerate(plans):
        paths = plan.planner_data if isinstance(plan.planner_data, dict) else {}
        for item in plan.items:
            data = item.tensor_data
            if data is None:
                continue
            fqn = item.index.fqn
            tensor = found.get(fqn)
            if tensor is None:
                path = tuple(paths.get(fqn, (fqn,)))
                tensor = found[fqn] = PlannedTensor(data, path, [], [], [])
            chunk = data.chunk
            tensor.ranks.append(rank)
            tensor.offsets.append(chunk.offsets)
            tensor.sizes.append(chunk.sizes)
    return found


def _runtime_tensors(
    planned: Mapping[str, PlannedTensor], facts: Sequence[LocalFacts], key: str | None
) -> list[RuntimeTensor]:
    """Return the model's tensors, in state-dict order."""
    order = next((fact.order for fact in facts if fact.order is not None), ())
    ranked = {fqn: i for i, fqn in enumerate(order)}
    fqns = sorted(planned, key=lambda fqn: ranked.get(fqn, len(ranked)))
    paths = {fqn: planned[fqn].path for fqn in fqns}
    names = names_in_model(paths, model_prefix(paths, key=key))
    return [
        RuntimeTensor(
            fqn=fqn,
            name=name,
            shape=tuple(planned[fqn].data.size),
            dtype=planned[fqn].data.properties.dtype,
            chunks=BoxTable(planned[fqn].offsets, planned[fqn].sizes),
        )
        for fqn, name in names.items()
    ]


def _checked_groups(
    shared: Iterable[tuple[str, ...]], export: HFExport, plan: Layout, once: Collection[str]
) -> tuple[tuple[str, ...], ...]:
    """Return the groups by which something is stored once only, in the export or altogether."""
    # Ties that are given are taken as given: those found then save no more than a second copy in
    # the DCP half.
    if export.tied is None:
        return tuple(shared)
    leaning = once - plan.targets.keys()
    return tuple(group for group in shared if not leaning.isdisjoint(group))


def check_tied(shared: Iterable[tuple[str, ...]], memory: Mapping[str, int], *, rank: int) -> None:
    """Check that tensors which some rank found tied are not different ones here.

    Raises:
        LayoutError: If they are, so that leaving one out would lose data.
    """
    fault = tie_fault(shared, memory, phase="write")
    if fault is not None:
        fault.rank = rank
        raise fault
