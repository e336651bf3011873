"""Fill buckets: pack, gather and unpack, in memory that is reused from bucket to bucket."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dcp_hf_writer.tensors.strided_copies import hf_view, runtime_view

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import ProcessGroup

    from dcp_hf_writer.stream.buckets import Bucket, Chain, StreamedTensor
    from dcp_hf_writer.stream.plan_gathers import Gather, Round, Steps
    from dcp_hf_writer.tensors.strided_copies import Copy

# Integers to copy without a cast: torch cannot copy some packed dtypes.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# torch 2.13 added the new name, and warns about the old one.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Number of slabs that alternate: a bucket must not change while the next one is filled.
_IN_TURN = 2


class Filler:
    """Fills one bucket after another; holds all memory that the stream needs."""

    def __init__(
        self,
        local: Mapping[str, torch.Tensor],
        groups: Sequence[ProcessGroup],
        devices: Mapping[Chain, torch.device],
        *,
        device: torch.device | None,
        slab_nbytes: int,
    ) -> None:
        """Set up; allocates no memory yet.

        Args:
            local: This rank's part of each runtime tensor, by FQN.
            groups: Process groups by number.
            devices: The device on which the groups of each chain exchange tensors.
            device: Device of the tensors in a bucket; `None` leaves them where they are gathered.
            slab_nbytes: Size of the largest bucket that is kept in reused memory.
        """
        self._local, self._groups, self._devices = local, groups, devices
        first = next((one for chain, one in devices.items() if chain.groups), None)
        self._work = first or next((one.device for one in local.values()), torch.device("cpu"))
        self._target = self._work if device is None else device
        self._slab_nbytes = slab_nbytes
        self._slabs: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._buffers: dict[torch.device, torch.Tensor] = {}

    @torch.no_grad()
    def fill(self, number: int, bucket: Bucket, steps: Steps) -> list[tuple[str, torch.Tensor]]:
        """Fill a bucket; a collective over the groups of the bucket.

        Args:
            number: Index of the bucket; every second bucket shares memory.
            bucket: The bucket to fill.
            steps: The steps that fill it.

        Returns:
            `(HuggingFace name, tensor)` of each tensor, in the order of the bucket.
        """
        slab = self._slab(number % _IN_TURN, self._target, bucket.nbytes)
        is_elsewhere = self._target != self._work
        work = self._slab(_IN_TURN, self._work, bucket.nbytes) if is_elsewhere else slab
        tensors = _tensors(work, bucket)
        for move in steps.moves:
            _copy(hf_view, tensors[move.number], runtime_view, self._local[move.source], move.copy)
        for chain, round_ in steps.rounds:
            self._run(self._devices[chain], round_, tensors)
        if is_elsewhere:
            slab.copy_(work)
            tensors = _tensors(slab, bucket)
        return [(one.key, tensor) for one, tensor in zip(bucket.tensors, tensors, strict=True)]

    def _run(self, device: torch.device, round_: Round, tensors: Sequence[torch.Tensor]) -> None:
        buffer = self._buffer(device, round_.nbytes)
        for move in round_.packs:
            vector = buffer.view(move.dtype)
            _copy(hf_view, vector, runtime_view, self._local[move.source], move.copy)
        for gather in round_.gathers:
            _gather(buffer, gather, self._groups[gather.group])
        for move in round_.unpacks:
            vector = buffer.view(move.dtype)
            _copy(hf_view, tensors[move.number], runtime_view, vector, move.copy)

    def _slab(self, number: int, device: torch.device, nbytes: int) -> torch.Tensor:
        """Return the first bytes of a reused slab, or new memory if the slab is too small."""
        is_pinned = device.type == "cpu" != self._work.type
        if nbytes > self._slab_nbytes:
            return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=is_pinned)
        key = number, device
        if key not in self._slabs:
            self._slabs[key] = torch.empty(
                self._slab_nbytes, dtype=torch.uint8, device=device, pin_memory=is_pinned
            )
        return self._slabs[key][:nbytes]

    def _buffer(self, device: torch.device, nbytes: int) -> torch.Tensor:
        known = self._buffers.get(device)
        if known is None or known.nbytes < nbytes:
            # Free the old buffer before the larger one is allocated: they must not add up.
            self._buffers.pop(device, None)
            del known
            self._buffers[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self._buffers[device]


def _tensors(slab: torch.Tensor, bucket: Bucket) -> list[torch.Tensor]:
    places = zip(bucket.tensors, bucket.starts, strict=True)
    return [_tensor(slab, one, start) for one, start in places]


def _tensor(slab: torch.Tensor, one: StreamedTensor, start: int) -> torch.Tensor:
    if not math.prod(one.shape):
        return torch.empty(one.shape, dtype=one.dtype, device=slab.device)
    return slab[start : start + one.nbytes].view(one.dtype).view(one.shape)


def _copy(
    to_view: Any, target: torch.Tensor, from_view: Any, source: torch.Tensor, copy: Copy
) -> None:
    if target.dtype is source.dtype:
        bits = _BITS[target.itemsize]
        target, source = target.view(bits), source.view(bits)
    to_view(target, copy).copy_(from_view(source, copy))


def is_gloo(group: ProcessGroup, device: torch.device) -> bool:
    """Whether a group exchanges the tensors of a device by gloo.

    gloo's all-gather allocates memory for all parts once more in each of its threads. It takes ten
    times as long as broadcasts (32 MiB, measured with 2 and with 4 ranks, torch 2.13).
    """
    return f"{device.type}:gloo" in dist.get_backend_config(group)


def _gather(buffer: torch.Tensor, gather: Gather, group: ProcessGroup) -> None:
    if gather.is_even and not is_gloo(group, buffer.device):
        own, nbytes = gather.slots[dist.get_rank(group)]
        start = gather.slots[0][0]
        whole = buffer[start : start + nbytes * len(gather.slots)]
        # In place: the input is this rank's slot of the output.
        _all_gather(whole, buffer[own : own + nbytes], group=group)
        return
    works = [
        dist.broadcast(buffer[start : start + nbytes], group=group, group_src=member, async_op=True)
        for member, (start, nbytes) in enumerate(gather.slots)
        if nbytes
    ]
    for work in works:
        assert work is not None  # torch returns None only on ranks outside the group
        work.wait()
