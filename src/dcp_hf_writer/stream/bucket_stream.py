"""iter_hf_buckets: stream the HuggingFace tensors of a sharded model, one bucket at a time."""

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
from dcp_hf_writer.staging.same_memory import memory_of, tied_groups
from dcp_hf_writer.stream.buckets import Bucket, fill_buckets, hf_tensors
from dcp_hf_writer.stream.fill_buckets import Filler
from dcp_hf_writer.stream.local_shards import Stock, complete_by_hand, take_stock
from dcp_hf_writer.stream.mesh_groups import Groups, meet_groups, model_tensors
from dcp_hf_writer.stream.plan_gathers import Steps, plan_steps
from dcp_hf_writer.stream.rank_agreement import Facts, check_alike, exchange, raise_first

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

    This is a collective. All ranks that share a mesh (or `group`) must call it with the same
    arguments and take the same number of buckets. If you stop early or close the iterator, do so on
    all ranks after the same bucket. All ranks get the same tensors in the same buckets and order,
    except with `preserve`. Names, shapes, dtypes and bits are those that `HFDualWriter` would save.

    Two buffers alternate, so a bucket is valid until you request the second bucket after it; clone
    the tensors that you keep longer. On a GPU, the current stream fills the bucket: another stream
    or process must first wait for that stream. Change the state dict only after the last bucket.
    No collective of this iterator runs while you hold a bucket.

    Memory: two buckets, and one buffer for the exchange between the ranks. The buffer has the size
    of a bucket, plus up to an eighth for each mesh dimension with uneven parts. If `device` is not
    the device of the exchange, `device` holds the two buckets, and the device of the exchange holds
    one bucket and the buffer. A tensor larger than `bucket_bytes` comes alone in a bucket; it has
    its own memory, which is freed with it. Runtime tensors that fuse several HuggingFace tensors
    are never assembled on any rank.

    Args:
        state_dict: The state dict of the model (FQN -> tensor), or one that contains it as an
            entry, `"model"`. DTensors are gathered over the groups of their meshes. Plain tensors
            are replicas, unless their specs have `shards`.
        specs: Specs of the tensors that are not streamed under their own name and shape, as for
            `HFExport`. Or the `HFExport` of the save: its `key`, `dtype`, `keep_dtype` and `tied`
            apply here too.
        bucket_bytes: Largest size of a bucket in bytes, alignment included: an int, or text such as
            `"1GB"`.
        group: The ranks that together hold the plain tensors whose specs have `shards`; several
            ranks may hold the same part. `None` is the default group. Other tensors do not use it.
        preserve: Name of a mesh dimension that stays sharded, such as `"ep"`. All ranks first get
            the tensors that are not sharded along it. Then each rank gets the HuggingFace tensors
            of its own index along it. A rank with fewer tensors gets empty buckets at the end, so
            that all ranks get the same number of buckets.
        dtype: As in `HFExport`: floating-point tensors are cast to it. They are cast before they
            are sent, unless that makes them larger.
        device: Device of the tensors in a bucket. `None` leaves them where the ranks exchange them:
            on the device type of their mesh.

    Returns:
        An iterator over the buckets. A bucket is a list of `(HuggingFace name, tensor)`. Of several
        tied names, the iterator yields only one.

    Raises:
        PlanningError: If a tensor cannot be streamed. All ranks raise it, before anything is sent.
            It may be a `SpecError`, a `LayoutError` or a `ModelKeyError`.
        CoverageError: If the parts of a tensor that is sharded by hand do not make up the tensor.
        ConfigError: If an option cannot be used as given.
    """
    export = _export_of(specs, dtype)
    stock, groups, plan = _agree(
        state_dict, export, group=group, preserve=preserve, bucket_bytes=bucket_bytes
    )
    # `device` may lack an index. The device of an empty tensor has that of the current device.
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
    """Inspect the tensors of this rank, exchange the facts with the other ranks, and plan."""
    tensors, names = model_tensors(state_dict, key=export.key, wanted=export.declared_names)
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
            fqn=drifted.dropped,
            expected=f"the values of {drifted.kept!r}, because only these are streamed",
            found=drifted.found,
            hint=HOW_TO_TIE,
        )


def _stream(plan: _Plan, filler: Filler) -> Generator[list[tuple[str, torch.Tensor]], None, None]:
    for number, bucket in enumerate(plan.buckets):
        # Bind the bucket to no name here: a tensor with its own memory must be freed when the
        # caller drops it.
        yield filler.fill(number, bucket, plan.steps(number))


def _export_of(specs: Any, dtype: torch.dtype | str | None) -> HFExport:
    if isinstance(specs, HFExport):
        return specs if dtype is None else replace(specs, dtype=dtype)
    return _export(tuple(specs_by_name(specs).values()), dtype)


@functools.lru_cache(maxsize=2)
def _export(specs: tuple[LoadSpec, ...], dtype: torch.dtype | str | None) -> HFExport:
    # Cached, because the fingerprint of an export reads every piece of every spec.
    return HFExport(specs=specs, dtype=dtype)


class _Inputs:
    """The inputs of a plan; two compare equal if their plans are equal."""

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
    """The buckets, and the steps that fill each. Kept from sync to sync; holds no tensors."""

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
        """Return the steps that fill a bucket; they are planned once, at the first call."""
        if number not in self._steps:
            self._steps[number] = plan_steps(
                self.buckets[number], places=self.places, limit_nbytes=self.limit_nbytes
            )
        return self._steps[number]


# Two plans are kept: a process may stream a policy and a critic.
@functools.lru_cache(maxsize=2)
def _plan(inputs: _Inputs, *, limit_nbytes: int, preserve: str | None) -> _Plan:
    return _Plan(inputs, limit_nbytes=limit_nbytes, preserve=preserve)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
