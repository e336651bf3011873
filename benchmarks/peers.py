"""The contenders: this package, torch's own ways, and the floor that no way goes below.

Each one saves what it is given, blocks until its files are durable, and says for how long the
trainer was blocked. What a trainer would do between saves (keep a cache, remove old steps) is not
timed.
"""

from __future__ import annotations

import abc
import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._state_dict_utils import _create_cpu_state_dict
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from contents import check_content, read_phases
from machine import file_system
from states import Workload, local_tensors, nbytes_by_key, split_into_files

if TYPE_CHECKING:
    from collections.abc import Callable

FILES = 4
"""Number of weight files in each export."""
_PIECE_NBYTES = 16 << 20
_RESERVES_CHEAPLY = ("ext4", "xfs")
"""Where fallocate costs next to nothing; tmpfs touches each page once more for it."""


@dataclass(frozen=True, slots=True)
class Saved:
    """How one save went on this rank."""

    stall_s: float
    """How long the trainer was blocked."""
    total_s: float
    """From the call until this rank's result was there and its files durable."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase, the slowest rank's, where the contender reports them."""


class Contender(abc.ABC):
    """One way to save; one instance a rank lives through a whole run, as in a trainer."""

    name: ClassVar[str]
    title: ClassVar[str]
    formats: ClassVar[str]

    def __init__(self, workload: Workload, state_dict: dict[str, Any]) -> None:
        self.workload = workload
        self.max_shard_size, self.file_of_key = split_into_files(nbytes_by_key(workload), FILES)
        self.prepare(state_dict)

    def prepare(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 - most keep nothing
        """Set up what is kept between saves."""

    @abc.abstractmethod
    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Save into the new directory `directory`; all ranks call it together."""

    def check(self, state_dict: dict[str, Any], directory: str) -> None:  # noqa: B027 - ours only
        """Check that what is on storage is what was saved; all ranks call it together."""


class Ours(Contender):
    """Both formats by this package: a new writer a step, as a trainer would have it."""

    name = "ours"
    title = "HFDualWriter"
    formats = "DCP + HF"
    weights: Literal["both", "once"] = "both"

    def prepare(self, state_dict: dict[str, Any]) -> None:  # noqa: ARG002 - its contract
        """Make the export's options once, as they are the same for each step."""
        # Imported here, so that the peers can be measured where this package is not installed.
        from dcp_hf_writer import HFDualWriter, HFExport  # noqa: PLC0415

        config = {"config.json": json.dumps({"model_type": "qwen2"}).encode()}
        self._export = HFExport(max_shard_size=self.max_shard_size, assets=config)
        self._writer_class = HFDualWriter

    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Save both formats by one call."""
        writer = self._writer_class(directory, export=self._export, weights=self.weights)
        start = time.perf_counter()
        future = dcp.async_save(state_dict, storage_writer=writer)
        stall = time.perf_counter() - start
        future.result()
        total = time.perf_counter() - start
        return Saved(stall, total, read_phases(directory))

    def check(self, state_dict: dict[str, Any], directory: str) -> None:
        """Read both formats back by stock torch and stock safetensors."""
        check_content(state_dict, directory, os.path.join(directory, "hf"))


class OursOnce(Ours):
    """The same with each weight stored once: what the trainer resumes from is what it serves."""

    name = "ours_once"
    title = "HFDualWriter, once"
    weights = "once"

    def check(self, state_dict: dict[str, Any], directory: str) -> None:
        """Read the DCP half back by our reader, which alone can, and the other by safetensors."""
        from dcp_hf_writer import HFDualReader  # noqa: PLC0415 - as above

        reader = HFDualReader(directory)
        check_content(state_dict, directory, os.path.join(directory, "hf"), reader=reader)


class Torch(Contender):
    """torch's `async_save` with its own writer as documented."""

    name = "torch"
    title = "torch async_save"
    formats = "DCP"

    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Save by a fresh `FileSystemWriter`, which fsyncs its files itself."""
        return _async_save(state_dict, dcp.FileSystemWriter(directory))


class TorchById(Contender):
    """The shortest call, by path alone: torch then stages by a fresh `DefaultStager`."""

    name = "torch_id"
    title = "torch, path alone"
    formats = "DCP"

    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Save without naming a writer."""
        return _async_save(state_dict, None, checkpoint_id=directory)


class TorchCached(Contender):
    """The best DCP-only peer: one writer, and the memory it stages into, kept for the run."""

    name = "torch_cached"
    title = "torch, staging kept"
    formats = "DCP"

    def prepare(self, state_dict: dict[str, Any]) -> None:
        """Make the cache by hand: torch's own would be pinned, which needs CUDA."""
        self._writer = dcp.FileSystemWriter("unused", cache_staged_state_dict=True)
        self._writer.state_dict_cache = _create_cpu_state_dict(state_dict)

    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Save by the kept writer."""
        return _async_save(state_dict, self._writer, checkpoint_id=directory)


class TorchHf(Contender):
    """torch's two writers one after the other, the second consolidating its shards."""

    name = "torch_hf"
    title = "torch DCP, then HF"
    formats = "DCP + HF"

    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Save twice; the trainer is blocked by both stagings, not while it waits between."""
        first = _async_save(state_dict, dcp.FileSystemWriter(os.path.join(directory, "dcp")))
        target = os.path.join(directory, "hf")
        writer = HuggingFaceStorageWriter(
            target,
            fqn_to_index_mapping=self.file_of_key,
            save_distributed=True,
            enable_consolidation=True,
        )
        # It fsyncs only the shards that it reads back, not the files that it leaves.
        second = _async_save(
            state_dict["model"], writer, then=lambda: _fsync_files(target, on_rank=0)
        )
        return Saved(first.stall_s + second.stall_s, first.total_s + second.total_s)


class Floor(Contender):
    """One memcpy into warm memory, then the bytes of both formats from there, as they are."""

    name = "floor"
    title = "floor: memcpy, pwrite"
    formats = "raw bytes"

    def prepare(self, state_dict: dict[str, Any]) -> None:
        """Touch the buffer."""
        sources = _written_by_this_rank(state_dict)
        self._buffer = torch.ones(sum(t.nbytes for t in sources), dtype=torch.uint8)

    def save(self, state_dict: dict[str, Any], directory: str) -> Saved:
        """Copy, then write a file for each format."""
        sources = _written_by_this_rank(state_dict)
        weights_nbytes = sum(t.nbytes for t in _written_by_this_rank(state_dict["model"]))
        os.makedirs(directory, exist_ok=True)
        reserve = file_system(directory) in _RESERVES_CHEAPLY
        start = time.perf_counter()
        position = 0
        for tensor in sources:
            flat = tensor.view(-1).view(torch.uint8)
            self._buffer[position : position + flat.numel()].copy_(flat)
            position += flat.numel()
        stall = time.perf_counter() - start
        memory = memoryview(self._buffer.numpy())
        path = os.path.join(directory, str(dist.get_rank()))
        # The disk works on the first file while the second is written, or this were no floor.
        dcp_file = _write_file(f"{path}.dcp", memory, reserve)
        flush = threading.Thread(target=os.fsync, args=(dcp_file,))
        flush.start()
        hf_file = _write_file(f"{path}.hf", memory[:weights_nbytes], reserve)
        os.fsync(hf_file)
        flush.join()
        os.close(dcp_file)
        os.close(hf_file)
        return Saved(stall, time.perf_counter() - start)


CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (Ours, OursOnce, Torch, TorchById, TorchCached, TorchHf, Floor)
}


def _async_save(
    state_dict: dict[str, Any],
    writer: dcp.FileSystemWriter | None,
    *,
    checkpoint_id: str | None = None,
    then: Callable[[], None] = lambda: None,
) -> Saved:
    start = time.perf_counter()
    future = dcp.async_save(state_dict, checkpoint_id=checkpoint_id, storage_writer=writer)
    stall = time.perf_counter() - start
    future.result()
    then()
    return Saved(stall, time.perf_counter() - start)


def _written_by_this_rank(tree: Any) -> list[torch.Tensor]:
    """Local tensors in order, of replicas only those of rank 0."""
    if isinstance(tree, DTensor):
        mine = tree.placements[0].is_shard() or dist.get_rank() == 0
        return local_tensors(tree) if mine else []
    if isinstance(tree, torch.Tensor):
        return [tree] if dist.get_rank() == 0 else []
    children = tree.values() if isinstance(tree, dict) else ()
    return [tensor for child in children for tensor in _written_by_this_rank(child)]


def _write_file(path: str, data: memoryview, reserve: bool) -> int:  # noqa: FBT001
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    if reserve and len(data):
        os.posix_fallocate(file, 0, len(data))
    position = 0
    while position < len(data):
        position += os.pwrite(file, data[position : position + _PIECE_NBYTES], position)
    return file


def _fsync_files(directory: str, *, on_rank: int) -> None:
    if dist.get_rank() != on_rank:
        return
    for entry in os.scandir(directory):
        if entry.is_file():
            file = os.open(entry.path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
