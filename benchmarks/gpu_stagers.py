"""Ways to copy a state dict from the device to the host, each with memory that it keeps or not."""

from __future__ import annotations

import abc
import functools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dcp_hf_writer import HFDualWriter
from gpu_device import PeerFailedError
from llama import tensors_of

if TYPE_CHECKING:
    from gpu_device import Device

TIMEOUT_S = 60.0
"""Deadline of a staging: a lease that was kept must not hold up the run for half an hour."""

_FAULTING_THREADS = 8
"""Fault in the memory of the bare copies; one thread alone takes 10 s for 12 GB."""

_ALIGN_NBYTES = 64
"""Tensors start on a cache line, as in the slab."""


@dataclass(frozen=True, slots=True)
class Copied:
    """How one copy went."""

    stall_s: float
    """How long the caller was kept."""
    total_s: float
    """Until all bytes were in host memory."""


class Copier(abc.ABC):
    """One way to copy; its `copy` starts with an idle device."""

    name: ClassVar[str]
    title: ClassVar[str]
    keeps_memory: ClassVar[bool] = True
    """Whether the first call makes memory for the others, so that it does not count."""

    def __init__(self, state_dict: dict[str, Any], device: Device) -> None:
        self.state_dict, self.device = state_dict, device

    @abc.abstractmethod
    def copy(self) -> Copied:
        """Copy all tensors; the first call also makes the memory that the copier keeps."""

    def timed(self) -> Copied:
        """Copy from an idle device."""
        self.device.synchronize()
        return self.copy()


class Ours(Copier):
    """`HFDualWriter`, which returns when all is copied."""

    name = "ours"
    title = "HFDualWriter"
    staging: ClassVar[Any] = "blocking"

    def __init__(self, state_dict: dict[str, Any], device: Device) -> None:
        super().__init__(state_dict, device)
        # The writer touches no storage before a save.
        self.writer = HFDualWriter("unused", export=None, staging=self.staging, timeout_s=TIMEOUT_S)

    def copy(self) -> Copied:
        """Stage; the slab is free again when the staged state dict is dropped."""
        start = time.perf_counter()
        staged = self.writer.stage(self.state_dict)
        stall = time.perf_counter() - start
        whole = staged.result() if isinstance(staged, Future) else staged
        total = time.perf_counter() - start
        del staged, whole
        return Copied(stall, total)


class OursOverlap(Ours):
    """`HFDualWriter`, which copies beside what the caller does next."""

    name = "ours_overlap"
    title = "HFDualWriter, overlap"
    staging = "overlap"


class BareOne(Copier):
    """The same bytes as one tensor, copied once into one pinned tensor: what the link gives."""

    name = "bare_one"
    title = "bare copy of one tensor"

    def __init__(self, state_dict: dict[str, Any], device: Device) -> None:
        super().__init__(state_dict, device)
        self.host: torch.Tensor | None = None

    def memory(self) -> torch.Tensor:
        """Return the host tensor; large enough for all tensors with their alignment."""
        if self.host is None:
            nbytes = sum(_aligned(t.nbytes) for t in on_device(self.state_dict, self.device))
            self.host = _pinned(nbytes, self.device)
            self._source = torch.ones(nbytes, dtype=torch.uint8, device=self.device.kind)
        return self.host

    def copy(self) -> Copied:
        """Copy on the current stream."""
        host = self.memory()
        self.device.synchronize()
        start = time.perf_counter()
        host.copy_(self._source, non_blocking=True)
        self.device.synchronize()
        seconds = time.perf_counter() - start
        return Copied(seconds, seconds)


class BareEach(Copier):
    """Each tensor copied into its place in the same pinned tensor, in one go."""

    name = "bare_each"
    title = "bare copy of each tensor"

    def __init__(self, one: BareOne) -> None:
        super().__init__(one.state_dict, one.device)
        self._one = one
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(self) -> Copied:
        """Copy on the current stream."""
        if not self._pairs:
            self._pairs = self._places()
        self.device.synchronize()
        start = time.perf_counter()
        for target, source in self._pairs:
            target.copy_(source, non_blocking=True)
        self.device.synchronize()
        seconds = time.perf_counter() - start
        return Copied(seconds, seconds)

    def _places(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        host, start, pairs = self._one.memory(), 0, []
        for source in on_device(self.state_dict, self.device):
            place = host[start : start + source.nbytes].view(source.dtype).view(source.shape)
            pairs.append((place, source))
            start += _aligned(source.nbytes)
        return pairs


class TorchDefault(Copier):
    """What `async_save` does without a writer: a new `DefaultStager` with all options off."""

    name = "torch_default"
    title = "torch async_save default"
    keeps_memory = False

    def copy(self) -> Copied:
        """Stage by a new stager."""
        stager = DefaultStager(StagingOptions(*[False] * 4))
        copied = _timed_stage(stager, self.state_dict)
        stager.close()
        return copied


class TorchKept(Copier):
    """A kept `DefaultStager` with all options on, which torch's documentation calls best."""

    name = "torch_kept"
    title = "DefaultStager kept, all options"

    def __init__(self, state_dict: dict[str, Any], device: Device) -> None:
        super().__init__(state_dict, device)
        self._stager = kept_stager(device)

    def copy(self) -> Copied:
        """Stage into the memory that the stager keeps."""
        return _timed_stage(self._stager, self.state_dict)


def kept_stager(device: Device) -> DefaultStager:
    """Make a stager for all saves of a run, with all options on.

    Without CUDA it can neither pin nor copy without blocking. Where `reuse_problem` finds one, the
    stager is kept open by hand, so that its steady state can be measured at all.
    """
    cuda = device.is_cuda
    stager = DefaultStager(StagingOptions(cuda, True, True, cuda))  # noqa: FBT003 - torch's order
    if reuse_problem() is not None:
        # torch 2.11 closes this part at the end of each call, and then cannot copy any more.
        vars(stager._state_dict_stager)["close"] = lambda: None
    return stager


@functools.cache
def reuse_problem() -> str | None:
    """Stage one small tensor twice by one `DefaultStager`; say how the second call fails."""
    stager = DefaultStager(StagingOptions(*[False] * 4))
    stager.stage({"weight": torch.ones(1)})
    try:
        stager.stage({"weight": torch.ones(1)})
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the result
        what = f"{type(error).__name__}: {error}"
        return f"DefaultStager fails on its second call in torch {torch.__version__} ({what})"
    return None


def on_device(state_dict: dict[str, Any], device: Device) -> list[torch.Tensor]:
    """Tensors of the state dict that lie on the device: all but Adam's step counters."""
    return [t for t in tensors_of(state_dict) if t.device.type == device.kind]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN_NBYTES) * _ALIGN_NBYTES


def _pinned(nbytes: int, device: Device) -> torch.Tensor:
    """Make host memory, faulted in by several threads, and pin it where the device is a GPU."""
    host = torch.empty(nbytes, dtype=torch.uint8)
    with ThreadPoolExecutor(_FAULTING_THREADS) as threads:
        list(threads.map(torch.Tensor.zero_, host.chunk(_FAULTING_THREADS)))
    if device.is_cuda:
        # It stays pinned until the process ends.
        result = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), nbytes, 0))
        if result != 0:
            msg = f"cudaHostRegister of {nbytes} bytes: CUDA error {result}"
            raise RuntimeError(msg)
    return host


def _timed_stage(stager: Any, state_dict: dict[str, Any]) -> Copied:
    """Stage by one of torch's ways; `PeerFailedError` if it raises."""
    start = time.perf_counter()
    try:
        staged = stager.stage(state_dict)
        stall = time.perf_counter() - start
        whole = staged.result(TIMEOUT_S) if isinstance(staged, Future) else staged
    except Exception as error:
        raise PeerFailedError.of(error) from error
    total = time.perf_counter() - start
    del staged, whole
    return Copied(stall, total)
