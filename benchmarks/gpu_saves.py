"""Measure whole saves of four ranks that share one GPU, beside torch's own, in turns."""

from __future__ import annotations

import gc
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh

from contents import count_bytes
from gpu_device import Device, PeerFailedError, Reporter, allow_many_files, lacks_shared_memory
from gpu_stagers import kept_stager, reuse_problem
from peers import Contender, Ours, Saved, Torch, TorchById
from save import remove, slowest
from states import Workload, build_state_dict

if TYPE_CHECKING:
    from ranks import Rank


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


class TorchKept(Contender):
    """torch's own writer behind a kept `DefaultStager` with all options on."""

    name = "torch_kept"
    title = "DefaultStager kept, all options"
    formats = "DCP"

    def prepare(self, state_dict: dict[str, Any]) -> None:  # noqa: ARG002 - its contract
        """Make the stager; its memory comes with the first save, which is not counted."""
        self._stager = kept_stager(Device("cuda" if torch.cuda.is_initialized() else "cpu"))

    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Save by a fresh writer; the stager is the one of all steps."""
        start = time.perf_counter()
        response: Any = dcp.async_save(
            state_dict, storage_writer=dcp.FileSystemWriter(directory), async_stager=self._stager
        )
        stall = time.perf_counter() - start
        getattr(response, "upload_completion", response).result()
        return Saved(stall, time.perf_counter() - start)


KINDS: tuple[type[Contender], ...] = (Ours, OursOverlap, Torch, TorchById, TorchKept)


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
        if reuse_problem() is not None:
            report.fact(reuse_problem=reuse_problem())
    # A collection before each save would look at all of torch's objects again.
    gc.collect()
    gc.freeze()
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
            try:
                saved, written = _save_once(contender, state_dict, rank, setting, number)
            except PeerFailedError as error:
                contenders.remove(contender)
                if rank.rank == 0:
                    report.skip(contender.name, str(error))
                continue
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
    lacking = lacks_shared_memory(nbytes)
    # The same answer on every rank, or they would not save together.
    is_lacking = _agreed(lacking is not None)
    kinds = [kind for kind in KINDS if not (is_lacking and kind is TorchKept)]
    if is_lacking and rank.rank == 0:
        report.skip(TorchKept.name, lacking or "too little shared memory on another rank")
    return [kind(setting.workload, state_dict) for kind in kinds]


def _save_once(
    contender: Contender,
    state_dict: dict[str, Any],
    rank: Rank,
    setting: SaveSetting,
    number: int,
) -> tuple[Saved, int]:
    """Save from an idle device, check the first one, and remove it.

    Raises:
        PeerFailedError: On all ranks, if one of torch's own ways failed on any of them.
    """
    directory = os.path.join(setting.directory, f"{contender.name}-step-{number}")
    gc.collect()
    Device(setting.device).synchronize()
    dist.barrier()
    saved = slowest(_saved_by_all(contender, state_dict, directory))
    if number == 0:
        contender.check(state_dict, directory)
    written = count_bytes(directory).total if rank.rank == 0 else 0
    remove(directory, rank)
    return saved, written


def _saved_by_all(contender: Contender, state_dict: dict[str, Any], directory: str) -> Saved:
    if isinstance(contender, Ours):
        return contender.save(state_dict, directory)
    saved: Saved | PeerFailedError
    try:
        saved = contender.save(state_dict, directory)
    except Exception as error:  # noqa: BLE001 - a peer that fails is a result
        saved = PeerFailedError.of(error)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, str(saved) if isinstance(saved, PeerFailedError) else None)
    failed = [text for text in of_ranks if text is not None]
    if failed:
        # A rank may have begun to write.
        shutil.rmtree(directory, ignore_errors=True)
        raise PeerFailedError(failed[0])
    assert isinstance(saved, Saved)
    return saved


def _agreed(mine: bool) -> bool:  # noqa: FBT001 - one value that all ranks take from rank 0
    said = [mine]
    dist.broadcast_object_list(said)
    return said[0]
