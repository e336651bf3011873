"""iter_hf_buckets: the HuggingFace tensors of a sharded model, a bucket at a time."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.errors import CheckpointError, LayoutError
from dcp_hf_writer.mapping.hf_export import HFExport, size_in_bytes, specs_by_name
from dcp_hf_writer.mapping.tied_names import shared_groups, tie_fault
from dcp_hf_writer.plan.layout import plan_layout
from dcp_hf_writer.preflight.drifted_ties import HOW_TO_TIE, drifted_tie
from dcp_hf_writer.staging.memory_identity import memory_of, tied_groups
from dcp_hf_writer.stream.agreement import Facts, check_alike, exchange, raise_first
from dcp_hf_writer.stream.buckets import Bucket, fill_buckets, hf_tensors
from dcp_hf_writer.stream.fill_buckets import Filler
from dcp_hf_writer.stream.gather_steps import Steps, plan_steps
from dcp_hf_writer.stream.held_shards import Stock, complete_by_hand, take_stock
from dcp_hf_writer.stream.mesh_groups import Groups, meet_groups, model_tensors

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    from torch.distributed import ProcessGroup

    from dcp_hf_writer.mapping.load_spec import LoadSpec


def iter_hf_buckets(
    state_dict: Mapping[str, Any],
    specs: HFExport | Mapping[str, LoadSpec] | Iterable[LoadSpec] | None = None,
    *,
    bucket_bytes: int | str,
    group: ProcessGroup | None = None,
    preserve: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Generator[list[tuple[str, torch.Tensor]], None, None]:
    """Stream a sharded model as HuggingFace tensors, for the weight sync of an inference engine.

        for bucket in iter_hf_buckets(model.state_dict(), specs, bucket_bytes="1GB"):
            engine.update_weights(bucket)  # [(HuggingFace name, tensor), ...]

    A collective: every rank that shares a mesh (or `group`) with another calls it alike, and takes
    as many buckets as the others; one that stops early, or closes the iterator, must do so on all
    ranks after the same bucket. All ranks get the same tensors in the same buckets and order. Their
    names, shapes, dtypes and bits are those that `HFDualWriter` would save.

    A bucket is valid until the next but one is asked for, since two memories of a bucket are used
    in turn; clone what shall stay. On a GPU it is filled in order of the current stream: another
    stream or process must wait for that first. The state dict must not change on the way, and no
    collective of the stream is under way while the caller has a bucket.

    Memory: two buckets, and one more for what the ranks exchange, which is up to an eighth larger
    for each mesh dimension where parts are uneven. Where `device` is another one than that of the
    exchange, it holds the two, and the other one bucket and the exchange. A tensor larger than
    `bucket_bytes` comes alone, in memory that is its own and freed with it. Runtime tensors that
    fuse several HuggingFace tensors are never whole anywhere.

    Args:
        state_dict: Of the model (FQN -> tensor), or one with an entry for it, `"model"`. DTensors
            come together over the groups of their meshes; plain tensors are replicas.
        specs: What is not streamed under its own name and shape: specs, as for `HFExport`, or the
            export of the save, whose `key`, `dtype`, `keep_dtype` and `tied` hold here too.
        bucket_bytes: Most bytes of a bucket, alignment included; as an int or text, `"1GB"`.
        group: The ranks that together hold the plain tensors whose specs have `shards`; several may
            hold the same part. `None` is the default group. Other tensors do not need it.
        preserve: Name of a mesh dimension that stays sharded, such as `"ep"`: each rank gets the
            HuggingFace tensors of its own place along it, after those that are not sharded along it
            and come to all. A place with fewer gets empty buckets at the end, so that all ranks get
            as many.
        dtype: As of `HFExport`: floating-point tensors are cast to it, before they are sent where
            that makes them no larger.
        device: Where the tensors shall be; `None` for where the ranks exchange them, which is the
            device type of their mesh.

    Returns:
        The buckets: lists of name and tensor. Tied names come once.

    Raises:
        PlanningError: Before anything is sent, on all ranks alike, if a tensor cannot be streamed;
            as `SpecError`, `LayoutError` or `ModelKeyError` where those say more.
        CoverageError: If the parts that are sharded by hand are not the whole tensor.
        ConfigError: If an option cannot be used as given.
    """
    export = _export_of(specs, dtype)
    stock, groups, plan = _agree(
        state_dict, export, group=group, preserve=preserve, bucket_bytes=bucket_bytes
    )
    # An empty tensor says which of several devices is the current one.
    where = None if device is None else torch.empty(0, device=device).device
    filler = Filler(
        stock.local, groups.all, stock.devices, device=where, slab_nbytes=plan.slab_nbytes
    )
    return _stream(plan, filler)


def _agree(
    state_dict: Mapping[str, Any],
    export: HFExport,
    *,
    group: ProcessGroup | None,
    preserve: str | None,
    bucket_bytes: int | str,
) -> tuple[Stock, Groups, _Plan]:
    """Look at what this rank holds, let the ranks tell one another, and plan from that."""
    tensors, names = model_tensors(state_dict, key=export.key)
    groups, number = meet_groups(tensors, names, export, group)
    stock, error, limit_nbytes = Stock(), None, 0
    memory = memory_of(tensors)
    try:
        limit_nbytes = size_in_bytes(bucket_bytes, option="bucket_bytes")
        stock = take_stock(tensors, names, export, groups=groups, preserve=preserve)
        _check_declared_ties(tensors, names, export, memory)
    except CheckpointError as raised:
        error = raised
    fingerprint = _digest(stock.described, export.fingerprint, limit_nbytes, preserve)
    facts = exchange(Facts(fingerprint, tied_groups(memory), stock.by_hand, error), groups.all)
    raise_first({rank: fact.error for rank, fact in facts.items()})
    check_alike(facts)
    cuts_of = {rank: fact.cuts for rank, fact in facts.items()}
    complete_by_hand(stock, cuts_of, groups=groups, number=number)
    found = () if export.tied is not None else (g for fact in facts.values() for g in fact.tied)
    shared = shared_groups(found, names)
    if shared:
        raise_first(exchange(tie_fault(shared, memory, phase="plan"), groups.all))
    inputs = _Inputs(fingerprint, stock, export, shared, tuple(groups.places))
    return stock, groups, _plan(inputs, limit_nbytes=limit_nbytes, preserve=preserve)


def _check_declared_ties(
    tensors: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    export: HFExport,
    memory: Mapping[str, int],
) -> None:
    drifted = drifted_tie(tensors, names, export, memory)
    if drifted is not None:
        raise LayoutError(
            "tensors that are declared to be tied are not equal",
            phase="plan",
            fqn=drifted[0],
            expected=f"the values of {drifted[1]!r}, as only these would be streamed",
            found="others",
            hint=HOW_TO_TIE,
        )


def _stream(plan: _Plan, filler: Filler) -> Generator[list[tuple[str, torch.Tensor]], None, None]:
    for number, bucket in enumerate(plan.buckets):
        # Kept by no name here: a tensor with memory of its own is freed when the caller drops it.
        yield filler.fill(number, bucket, plan.steps(number))


def _export_of(specs: Any, dtype: torch.dtype | str | None) -> HFExport:
    if isinstance(specs, HFExport):
        return specs if dtype is None else replace(specs, dtype=dtype)
    return _export(tuple(specs_by_name(specs).values()), dtype)


@functools.lru_cache(maxsize=2)
def _export(specs: tuple[LoadSpec, ...], dtype: torch.dtype | str | None) -> HFExport:
    # Kept, since it reads each piece of each spec to name them all.
    return HFExport(specs=specs, dtype=dtype)


class _Inputs:
    """What a plan follows from; equal for equal plans."""

    def __init__(
        self,
        fingerprint: str,
        stock: Stock,
        export: HFExport,
        shared: tuple[tuple[str, ...], ...],
        places: tuple[int, ...],
    ) -> None:
        self.tensors, self.held = stock.tensors, list(stock.held.values())
        self.export, self.shared, self.places, self.place = export, shared, places, stock.place
        by_hand = [stock.held[fqn] for fqn in stock.by_hand]
        self._name = _digest(fingerprint, shared, places, self.place, by_hand)

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Inputs) and self._name == other._name


class _Plan:
    """The buckets, and how each is filled; kept from sync to sync, and holds no tensors."""

    def __init__(self, inputs: _Inputs, *, limit_nbytes: int, preserve: str | None) -> None:
        layout = plan_layout(inputs.tensors, inputs.export, tied=inputs.shared)
        tensors = hf_tensors(inputs.held, layout.targets, preserve=preserve)
        self.limit_nbytes, self.places = limit_nbytes, inputs.places
        self.buckets: list[Bucket] = fill_buckets(
            tensors, place=inputs.place, limit_nbytes=limit_nbytes
        )
        sizes = [bucket.nbytes for bucket in self.buckets]
        self.slab_nbytes = max((n for n in sizes if n <= self.limit_nbytes), default=0)
        self._steps: dict[int, Steps] = {}

    def steps(self, number: int) -> Steps:
        """Return how to fill a bucket; planned when it is first asked for."""
        if number not in self._steps:
            self._steps[number] = plan_steps(
                self.buckets[number], places=self.places, limit_nbytes=self.limit_nbytes
            )
        return self._steps[number]


# Of a policy and a critic, say.
@functools.lru_cache(maxsize=2)
def _plan(inputs: _Inputs, *, limit_nbytes: int, preserve: str | None) -> _Plan:
    return _Plan(inputs, limit_nbytes=limit_nbytes, preserve=preserve)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
