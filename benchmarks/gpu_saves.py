"""Measure whole saves of four ranks that share one GPU, beside torch's own, in turns."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.device_mesh import DeviceMesh

from contents import count_bytes
from gpu_device import Device, Reporter, allow_many_files, lacks_shared_memory
from gpu_stagers import pinned_and_shared
from peers import Contender, Ours, Saved, Torch, TorchById
from save import remove, slowest
from states import Workload, build_state_dict

if TYPE_CHECKING:
    from ranks import Rank

_SHARE = 2
"""Kept stagers that hold the state dict in shared memory."""


@dataclass(frozen=True, slots=True)
class SaveSetting:
    """What the ranks measure."""

    workload: Workload
    """The state dict of all ranks together."""
    device: str
    """`cuda` or `cpu`."""
    directory: str
    """Where checkpoints are written; each is removed when it is measured."""
    rounds: int
    """Most rounds that count."""
    deadline: float
    """`time.monotonic()` after which no round begins."""


class OursOverlap(Ours):
    """Both formats by this package, the copies beside what the trainer does next."""

    name = "ours_overlap"
    title = "HFDualWriter, overlap"

    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Save both formats by one call."""
        writer = self._writer_class(directory, export=self._export, staging="overlap")
        start = time.perf_counter()
        response: Any = dcp.async_save(state_dict, storage_writer=writer)
        stall = time.perf_counter() - start
        response.upload_completion.result()
        return Saved(stall, time.perf_counter() - start)


class TorchPinned(Contender):
    """torch's own writer behind a kept `DefaultStager` with pinned and shared memory."""

    name = "torch_pinned"
    title = "DefaultStager pinned, shared"
    formats = "DCP"
    is_async = False

    def prepare(self, state_dict: dict[str, Any]) -> None:  # noqa: ARG002 - its contract
        """Make the stager; its memory comes with the first save, which is not counted."""
        self._device = Device("cuda" if torch.cuda.is_initialized() else "cpu")
        self._stager = DefaultStager(pinned_and_shared(self._device, is_async=self.is_async))

    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Save by a fresh writer; the stager is the one of all steps."""
        start = time.perf_counter()
        response: Any = dcp.async_save(
            state_dict, storage_writer=dcp.FileSystemWriter(directory), async_stager=self._stager
        )
        stall = time.perf_counter() - start
        getattr(response, "upload_completion", response).result()
        return Saved(stall, time.perf_counter() - start)


class TorchPinnedAsync(TorchPinned):
    """The same, with the copies in a thread of the stager."""

    name = "torch_pinned_async"
    title = "the same, asynchronous"
    is_async = True


KINDS: tuple[type[Contender], ...] = (
    Ours,
    OursOverlap,
    Torch,
    TorchById,
    TorchPinned,
    TorchPinnedAsync,
)


def measure_saves(rank: Rank, setting: SaveSetting) -> None:
    """Body of a rank: all contenders in turns; rank 0 reports each save."""
    device, report = Device(setting.device), Reporter(rank, setting.deadline)
    allow_many_files()
    device.select()
    # Of the gloo group: `init_device_mesh` may make one of NCCL, whose ranks cannot share a GPU.
    mesh = DeviceMesh.from_group(dist.group.WORLD, setting.device)
    state_dict = build_state_dict(setting.workload, mesh)
    contenders = _contenders(rank, setting, state_dict, report)
    if rank.rank == 0:
        report.fact(device=device.facts(), workload=setting.workload.describe())
    took_s = 0.0
    for number in range(setting.rounds + 1):
        # One rank decides for all: their clocks would not agree on a round.
        if number and not _agreed(report.left_s > took_s):
            if rank.rank == 0:
                report.skip(f"rounds from {number} on", "no time was left")
            return
        start = time.monotonic()
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            saved, written = _save_once(contender, state_dict, rank, setting, number)
            if rank.rank == 0:
                prefix = "first: " if number == 0 else ""
                report.sample(
                    prefix + contender.name,
                    stall_s=saved.stall_s,
                    total_s=saved.total_s,
                    written_nbytes=written,
                )
        took_s = time.monotonic() - start


def _contenders(
    rank: Rank, setting: SaveSetting, state_dict: dict[str, Any], report: Reporter
) -> list[Contender]:
    nbytes = setting.workload.weights_nbytes + setting.workload.optim_nbytes
    lacking = lacks_shared_memory(_SHARE * nbytes)
    # The same answer on every rank, or they would not save together.
    is_lacking = _agreed(lacking is not None)
    kinds = [kind for kind in KINDS if not (is_lacking and issubclass(kind, TorchPinned))]
    if is_lacking and rank.rank == 0:
        report.skip("torch_pinned", lacking or "too little shared memory on another rank")
    return [kind(setting.workload, state_dict) for kind in kinds]


def _save_once(
    contender: Contender,
    state_dict: dict[str, Any],
    rank: Rank,
    setting: SaveSetting,
    number: int,
) -> tuple[Saved, int]:
    """Save from an idle device, check the first one, and remove it."""
    directory = os.path.join(setting.directory, f"{contender.name}-step-{number}")
    gc.collect()
    Device(setting.device).synchronize()
    dist.barrier()
    saved = slowest(contender.save(state_dict, directory))
    if number == 0:
        contender.check(state_dict, directory)
    written = count_bytes(directory).total if rank.rank == 0 else 0
    remove(directory, rank)
    return saved, written


def _agreed(mine: bool) -> bool:  # noqa: FBT001 - one value that all ranks take from rank 0
    said = [mine]
    dist.broadcast_object_list(said)
    return said[0]
