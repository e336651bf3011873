"""Run planned reads in several threads, straight into tensors or through a reused buffer.

System calls and copies release the interpreter lock, so the threads run them in parallel.
"""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar

import torch

from dcp_hf_writer.load.read_plan import BOUNCE_NBYTES, Bounce, Direct
from dcp_hf_writer.storage.open_inputs import OpenInputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcp_hf_writer.load.read_plan import Read, Scatter
    from dcp_hf_writer.storage.input_contract import InputFiles

# The extra bytes leave room to align the parts of one read.
_BUFFER_NBYTES = BOUNCE_NBYTES + (128 << 10)
_MAX_SPARE = 4

# The kernel reads ahead in a file that is read in sequence. So each thread opens the file itself
# and reads its whole share in sequence. Measured from disk with two ranks and two threads, 1 GiB:
# 0.35 s with one share per thread, 0.45 s with shares of 64 MiB, 0.52 s with shares of 32 MiB.
# Threads that took turns with reads of 8 MiB in one open file took twice as long, and three times
# the processor time.
_MIN_SHARE_NBYTES = 32 << 20

_NO_MEMORY = torch.empty(0, dtype=torch.uint8, device="cpu")

# Each part of the buffer starts at a multiple of this, so that it can be viewed as any dtype.
_ALIGN = 64


def is_direct(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether stored elements of `dtype` can be read straight into the memory of a tensor."""
    return target.device.type == "cpu" and target.dtype == dtype and not target.is_conj()


def run_reads(
    inputs: OpenInputs,
    reads: Sequence[Read],
    targets: Sequence[torch.Tensor],
    *,
    readers: int | None = None,
) -> list[int]:
    """Run all reads, or stop at the first error. All threads have ended on return.

    Args:
        inputs: The files.
        reads: The planned reads, in any order.
        targets: The tensors in memory, by number; on any device, with any strides.
        readers: Number of reads in flight; `None` takes the number that suits the storage.

    Returns:
        The number of each `Expected` whose bytes differ from the file.

    Raises:
        ReadError: If the storage refuses, or a file is shorter than planned.
        CorruptCheckpointError: If a file name leads out of the directory.
    """
    if not reads:
        return []
    readers = readers or inputs.files.readers
    shared = _Shared(inputs, _shares(reads, readers, inputs.files), targets)
    helpers = min(readers, shared.count) - 1
    if not helpers:
        shared.work()
        return shared.landing.differing
    with ThreadPoolExecutor(helpers, thread_name_prefix="dcp-hf-read") as pool:
        working = [pool.submit(shared.work) for _ in range(helpers)]
        shared.work()
    # Several threads may have failed. One error is enough: the first `result` that fails raises.
    for future in working:
        future.result()
    return shared.landing.differing


def _shares(reads: Sequence[Read], readers: int, files: InputFiles) -> Sequence[Sequence[Read]]:
    """Divide reads into shares, one thread for each; a share keeps the order of its reads."""
    if not files.reads_ahead:
        return [[read] for read in reads]
    nbytes = max(_MIN_SHARE_NBYTES, -(-sum(read.nbytes for read in reads) // readers))
    shares: list[list[Read]] = []
    filled = nbytes
    for read in reads:
        if filled >= nbytes:
            shares.append([])
            filled = 0
        shares[-1].append(read)
        filled += read.nbytes
    return shares


class _Shared:
    """The state that the threads of one load share."""

    def __init__(
        self,
        inputs: OpenInputs,
        shares: Sequence[Sequence[Read]],
        targets: Sequence[torch.Tensor],
    ) -> None:
        self.count = len(shares)
        self._inputs = inputs
        self._todo = iter(shares)
        self._lock = threading.Lock()
        self.landing = Landing(targets)
        self._is_stopped = False

    def work(self) -> None:
        """Run shares until none is left, or until a read fails in any thread."""
        buffer = self.landing.buffer()
        try:
            while not self._is_stopped:
                with self._lock:
                    share = next(self._todo, None)
                if share is None:
                    break
                self._run(share, buffer)
        except BaseException:
            self._is_stopped = True
            raise
        finally:
            buffer.give_back()

    def _run(self, share: Sequence[Read], buffer: Buffer) -> None:
        own = self._inputs
        if self._inputs.files.reads_ahead and self.count > 1:
            own = OpenInputs(self._inputs.files)
        try:
            for read in share:
                if self._is_stopped:
                    return
                with own.use(read.file) as file:
                    file.read_into(self.landing.memory(read, buffer), read.start)
                self.landing.scatter(read, buffer)
        finally:
            if own is not self._inputs:
                own.close()


class Landing:
    """The memory that planned reads fill: the tensors of a load, directly or through a buffer."""

    def __init__(self, targets: Sequence[torch.Tensor]) -> None:
        """Fill `targets`; a read names a tensor by its index."""
        self._targets = [target.detach() for target in targets]
        self._is_pinned = any(target.is_cuda for target in self._targets)
        self.differing: list[int] = []
        """The number of each `Expected` whose bytes differ from the file."""

    def buffer(self) -> Buffer:
        """Return a buffer for one read at a time."""
        return Buffer(is_pinned=self._is_pinned)

    def memory(self, read: Read, buffer: Buffer) -> list[memoryview]:
        """Return the memory to read the bytes of each part of a read into."""
        found, used = [], 0
        bounced = sum(_aligned(part.nbytes) for part in read.parts if isinstance(part, Bounce))
        scratch = buffer.view(bounced) if bounced else memoryview(b"")
        for part in read.parts:
            if isinstance(part, Direct):
                found.append(_bytes_of(self._targets[part.target], part))
            else:
                found.append(scratch[used : used + part.nbytes])
                used += _aligned(part.nbytes)
        return found

    def scatter(self, read: Read, buffer: Buffer) -> None:
        """Compare the bytes that a read put into the buffer, and copy them to their tensors."""
        used = 0
        for part in read.parts:
            if not isinstance(part, Bounce):
                continue
            for comparison in part.comparisons:
                first = used + comparison.start
                found = buffer.bytes[first : first + len(comparison.content)]
                if found != comparison.content:
                    self.differing.append(comparison.number)
            for scatter in part.scatters:
                self._copy(buffer.tensor, used, scatter)
            used += _aligned(part.nbytes)

    def _copy(self, buffer: torch.Tensor, start: int, scatter: Scatter) -> None:
        target, dtype = self._targets[scatter.target], scatter.dtype
        if target.dtype == dtype and dtype.itemsize == 1:
            # torch cannot copy every dtype of one byte, so copy the bytes.
            target, dtype = target.view(torch.uint8), torch.uint8
        sizes = [extent for extent, _, _ in scatter.loops]
        strides = [stride for _, stride, _ in scatter.loops]
        first = (start + scatter.start) // dtype.itemsize
        whole = buffer[: buffer.numel() // _ALIGN * _ALIGN].view(dtype)
        source = whole.as_strided(sizes, strides, first)
        strides = [stride for _, _, stride in scatter.loops]
        offset = target.storage_offset() + scatter.target_start
        target.as_strided(sizes, strides, offset).copy_(source)


class Buffer:
    """The buffer of one thread; its memory is kept for the next load, as new pages are slow."""

    _spare: ClassVar[list[torch.Tensor]] = []

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self.tensor = _NO_MEMORY
        self.bytes = memoryview(b"")
        """The memory of `tensor`."""

    def view(self, nbytes: int) -> memoryview:
        """Return memory of at least `nbytes`; its old content may be lost."""
        if self.tensor.numel() < nbytes:
            self.tensor = self._memory(max(nbytes, _BUFFER_NBYTES))
            self.bytes = self.tensor.numpy().data
        return self.bytes

    def _memory(self, nbytes: int) -> torch.Tensor:
        if not self._is_pinned:
            with contextlib.suppress(IndexError):
                spare = self._spare.pop()
                if spare.numel() >= nbytes:
                    return spare
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self._is_pinned)

    def give_back(self) -> None:
        """Keep the memory for the next thread that needs a buffer."""
        if self.tensor.numel() == _BUFFER_NBYTES and not self._is_pinned:
            if len(self._spare) < _MAX_SPARE:
                self._spare.append(self.tensor)
            self.tensor, self.bytes = _NO_MEMORY, memoryview(b"")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _bytes_of(tensor: torch.Tensor, part: Direct) -> memoryview:
    """Return the memory of a part of a tensor; the tensor is in host memory."""
    first, itemsize = part.target_start // tensor.itemsize, tensor.itemsize
    flat = tensor.as_strided((part.nbytes // itemsize,), (1,), tensor.storage_offset() + first)
    found: memoryview = flat.view(torch.uint8).numpy().data
    return found
