"""Run planned reads: several in flight, each straight into its tensors or through a reused buffer.

System calls and copies run without the interpreter lock, so threads do them side by side.
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

# With room for the alignment of the parts of one read.
_BUFFER_NBYTES = BOUNCE_NBYTES + (128 << 10)
_MAX_SPARE = 4

# A kernel reads ahead of whoever reads on from where it stopped. So each thread reads on to the end
# of its share, in an open file of its own. Measured from disk, two ranks and threads: in one share
# each 0.35 s for 1 GiB, in shares of 64 MiB 0.45 s, of 32 MiB 0.52 s; threads that take turns with
# reads of 8 MiB in one open file took twice as long, and three times the processor's time.
_MIN_SHARE_NBYTES = 32 << 20

_NO_MEMORY = torch.empty(0, dtype=torch.uint8, device="cpu")

# Each part of the buffer starts at a multiple of this, so that it can be seen as any dtype.
_ALIGN = 64


def is_direct(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor takes bytes of `dtype` as they are."""
    return target.device.type == "cpu" and target.dtype == dtype and not target.is_conj()


def run_reads(
    inputs: OpenInputs,
    reads: Sequence[Read],
    targets: Sequence[torch.Tensor],
    *,
    readers: int | None = None,
) -> list[int]:
    """Run reads to the end, or to the first error; no thread is left then.

    Args:
        inputs: The files.
        reads: As planned; in any order.
        targets: The tensors in memory, by number; on any device, with any strides.
        readers: Reads in flight; `None` is what suits the storage.

    Returns:
        Numbers of what was to be compared and differs.

    Raises:
        ReadError: If the storage refuses, or a file is shorter than planned.
        CorruptCheckpointError: If a file's name leads elsewhere.
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
    # What the first error stopped may have failed too, but has nothing to say.
    for future in working:
        future.result()
    return shared.landing.differing


def _shares(reads: Sequence[Read], readers: int, files: InputFiles) -> Sequence[Sequence[Read]]:
    """Divide reads among threads, each share in order."""
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
    """What the threads of one load share."""

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
        """Run reads until there are none, or one failed in some thread."""
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
    """Where planned reads land: the tensors of a load, straight or through a buffer."""

    def __init__(self, targets: Sequence[torch.Tensor]) -> None:
        """Take tensors by number."""
        self._targets = [target.detach() for target in targets]
        self._is_pinned = any(target.is_cuda for target in self._targets)
        self.differing: list[int] = []
        """Numbers of what was compared and differs."""

    def buffer(self) -> Buffer:
        """Return a buffer for one read at a time."""
        return Buffer(is_pinned=self._is_pinned)

    def memory(self, read: Read, buffer: Buffer) -> list[memoryview]:
        """Return the memory that takes the bytes of each part of a read."""
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
        """Compare what a read left in the buffer, and copy it to where it belongs."""
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
            # Not every dtype of one byte can be copied, but bytes can.
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
    """The buffer of one thread; its memory is kept for the next load: fresh pages are dear."""

    _spare: ClassVar[list[torch.Tensor]] = []

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self.tensor = _NO_MEMORY
        self.bytes = memoryview(b"")
        """The same memory."""

    def view(self, nbytes: int) -> memoryview:
        """Return at least this much memory; what was in it before is lost."""
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
    """Return the memory of a part of a tensor in host memory."""
    first, itemsize = part.target_start // tensor.itemsize, tensor.itemsize
    flat = tensor.as_strided((part.nbytes // itemsize,), (1,), tensor.storage_offset() + first)
    found: memoryview = flat.view(torch.uint8).numpy().data
    return found
