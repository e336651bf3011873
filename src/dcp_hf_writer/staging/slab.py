"""The slab: one reused block of host memory per process that holds the staged copy of a state dict.

It is a memory file without a name: one file descriptor in all, which a checkpointer process maps as
well, and which the kernel frees when the last process that maps it is gone, so that a dead run
leaves nothing behind. Its pages are faulted in when it is made: a fresh page costs ten times the
copy that goes into it. Where CUDA is present it is pinned.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
import time
import uuid
import weakref
from dataclasses import dataclass
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.errors import StagingBusyError, StagingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_log = logging.getLogger(__name__)

# Tensors start on a cache line, which is also the alignment of torch's own allocator.
ALIGN_NBYTES = 64

# Linux 5.14: fault in all pages now. Python has no name for it before 3.12.
_MADV_POPULATE_WRITE = 23

# cudaHostRegisterPortable: pinned for all contexts of the process.
_PORTABLE = 1

# Small growth of a state dict (a new buffer, a longer list of metrics) must not move the slab.
_HEADROOM = 1 / 64

_POLL_S = 0.02
_SAY_AFTER_S = 1.0


@dataclass(frozen=True)
class StagedInfo:
    """What staging found out about a state dict; travels with the save."""

    memory: dict[str, int]
    """Number of the memory of each tensor, by FQN; equal for tied ones, absent if empty here."""
    nbytes: int
    """Bytes copied."""
    waited_s: float
    """Seconds spent waiting for the slab, within the stall."""
    stall_s: float
    """Seconds for which the caller was held up, waiting included."""


@dataclass(frozen=True, slots=True)
class Handover:
    """What staging leaves for the save that follows it; belongs to the slab that it fills.

    The save whose tensors lie in that memory takes it, in this process or a checkpointer process.
    """

    deadline: float
    """`time.monotonic()` by which the save must be done; one clock for the processes of a host."""
    info: StagedInfo
    """What staging found out."""


class Slab:
    """A shared memory file of fixed size, mapped into this process. Not thread-safe by itself."""

    def __init__(self, nbytes: int, *, fd: int | None = None, slab_id: str | None = None) -> None:
        """Make a slab, or map the one behind `fd`, which is taken over.

        Raises:
            StagingError: If the memory cannot be had.
        """
        self.slab_id = slab_id or uuid.uuid4().hex
        self.handover: Handover | None = None
        """Of the latest save whose copy a parent process has sent in this slab."""
        self.nbytes = nbytes
        self.pid = os.getpid()
        is_new = fd is None
        try:
            if fd is None:
                fd = os.memfd_create(f"dcp-hf-{self.slab_id[:8]}", os.MFD_CLOEXEC)
                os.ftruncate(fd, nbytes)
            self._map = mmap.mmap(fd, nbytes)
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            if fd is not None:
                os.close(fd)
            raise _no_memory(nbytes, error) from error
        self._fd = fd
        weakref.finalize(self, os.close, fd)
        self._address = self.tensor(0, torch.uint8, (1,)).data_ptr()
        if is_new:
            self._fault_in()
        # The process that stages pins; a checkpointer process only reads, and needs no CUDA.
        self._is_mine = is_new
        self.is_pinned = False
        self.pin()

    def _fault_in(self) -> None:
        # Huge pages shorten both the faults and the copies; both calls are hints, and an old kernel
        # that lacks one of them faults the pages in at the first copy.
        for advice in (mmap.MADV_HUGEPAGE, _MADV_POPULATE_WRITE):
            try:
                self._map.madvise(advice)
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    # Without this the first copy into the slab would kill the process.
                    raise _no_memory(self.nbytes, error) from error
                _log.debug("madvise(%d) on the slab: %s", advice, error)

    def pin(self) -> None:
        """Pin the memory where CUDA is in use; once, also if that came after the slab was made."""
        if self._is_mine and not self.is_pinned and torch.cuda.is_initialized():
            self.is_pinned = self._pin()

    def _pin(self) -> bool:
        result = int(torch.cuda.cudart().cudaHostRegister(self._address, self.nbytes, _PORTABLE))
        if result != 0:
            _log.warning("the staging slab could not be pinned (CUDA error %d)", result)
            return False
        # Before the memory is unmapped: another slab may come to lie at the same address.
        weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, self._address)
        return True

    @property
    def fd(self) -> int:
        """Descriptor of the memory file; owned by the slab."""
        return self._fd

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a contiguous tensor over the slab whose storage is exactly its own bytes.

        A view into one large storage would be cloned by torch's writer, item by item.

        Args:
            offset: First byte within the slab, a multiple of `ALIGN_NBYTES`.
            dtype: Its dtype.
            shape: Its shape.
        """
        count = 1
        for n in shape:
            count *= n
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)

    def holds(self, address: int) -> bool:
        """Whether a byte of this process's memory lies in the slab."""
        return 0 <= address - self._address < self.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.slab_id, self.nbytes, reduction.DupFd(self._fd))


def _no_memory(nbytes: int, error: Exception) -> StagingError:
    return StagingError(
        "host memory for the staged copy could not be had",
        phase="stage",
        expected=f"{nbytes} bytes of shared memory",
        found=str(error),
        hint="free host memory, or save fewer tensors from this rank",
    )


def _attach(slab_id: str, nbytes: int, shared: Any) -> Slab:
    """Map a slab of another process."""
    return SLABS.attach(slab_id, nbytes, fd=shared.detach())


class Lease:
    """The right of one save to the slab; ends with the save.

    A save that fails gives a storage writer no last call, so the lease ends by whichever comes
    first: `release`, the end of the thread that runs the save, or the staged state dict being
    dropped before any thread took it up.
    """

    def __init__(self, slab: Slab, what: str) -> None:
        """Take the slab for the save that `what` describes."""
        self.slab = slab
        self.what = what
        self.stager = threading.current_thread()
        self.handover: Handover | None = None
        """What staging leaves for the save; set when all is staged, or under way."""
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def release(self) -> None:
        """Give the slab back; safe to call twice and from any thread."""
        self._released.set()

    def take_up(self) -> None:
        """Note that the calling thread runs the save.

        Raises:
            StagingError: If the lease has ended, or another save has taken it up.
        """
        with self._lock:
            if not self.is_active or self._thread is not None:
                raise _given_back(self.what)
            self._thread = threading.current_thread()

    def tie_to(self, staged: object) -> None:
        """End the lease when `staged` is dropped before a thread took it up."""
        weakref.finalize(staged, self._drop)

    def _drop(self) -> None:
        if self._thread is None:
            self.release()

    @property
    def is_pending(self) -> bool:
        """Whether no save has taken up what was staged."""
        return self._thread is None and not self._released.is_set()

    @property
    def is_active(self) -> bool:
        """Whether the save may still read the slab."""
        if self._released.is_set() or self.slab.pid != os.getpid():
            # A forked child has the lease, but neither the save nor a use for the parent's slab.
            return False
        return self._thread is None or self._thread.is_alive()


def _given_back(what: str) -> StagingError:
    msg = "the staged copy was given back, or saved, before its save began"
    return StagingError(msg, path=what, hint="save what async_save staged, once")


class SlabPool:
    """The staging memory of a process: its own slab, the save that holds it, a parent's slab."""

    def __init__(self) -> None:
        """Start without memory."""
        self._lock = threading.Lock()
        self._slab: Slab | None = None
        self._lease: Lease | None = None
        self._attached: Slab | None = None

    def attach(self, slab_id: str, nbytes: int, *, fd: int) -> Slab:
        """Map a slab of another process, once; an older one is dropped when the owner has grown.

        Args:
            slab_id: Its id.
            nbytes: Its size.
            fd: Descriptor of its memory file; taken over.
        """
        slab = self._attached
        if slab is not None and slab.slab_id == slab_id:
            os.close(fd)
            return slab
        self._attached = None
        self._attached = Slab(nbytes, fd=fd, slab_id=slab_id)
        return self._attached

    def handover_over(self, addresses: Iterable[int]) -> tuple[Handover | None, Lease | None]:
        """Return what staging left for the save of some memory, and the lease of it.

        Args:
            addresses: A byte of each piece of the memory.

        Returns:
            `(None, None)` if none of it lies in a slab. In a checkpointer process there is no
            lease: the guard in the parent holds it.

        Raises:
            StagingError: If it lies in the slab, and nothing is left: the next save writes over it.
        """
        attached, own = self._attached, self._slab
        if attached is None and own is None:
            return None, None
        for address in addresses:
            if attached is not None and attached.holds(address):
                return attached.handover, None
            if own is not None and own.holds(address):
                if self._lease is None or self._lease.handover is None:
                    raise _given_back("unknown")
                return self._lease.handover, self._lease
        return None, None

    def acquire(
        self, nbytes: int, *, what: str, deadline: float, before_growth: Callable[[], None]
    ) -> tuple[Lease, float]:
        """Take the slab, waiting for a save that is in flight.

        Args:
            nbytes: Size needed; a smaller slab is replaced by one of this size and some headroom.
            what: The save, for messages.
            deadline: `time.monotonic()` after which waiting ends.
            before_growth: Called before the old slab is replaced, to drop tensors that map it.

        Returns:
            The lease, and how long the caller waited, in seconds.

        Raises:
            StagingBusyError: If the slab is still in use at the deadline.
            StagingError: If memory cannot be had.
        """
        began = time.monotonic()
        is_said = False
        with self._lock:
            while self._lease is not None and self._lease.is_active:
                waited = time.monotonic() - began
                if time.monotonic() > deadline:
                    msg = "an earlier save still uses the staging memory"
                    raise StagingBusyError(
                        msg,
                        phase="stage",
                        expected=f"free within {waited:.0f} s",
                        found=f"in use by the save of {self._lease.what}",
                        hint="save less often, or raise timeout_s",
                    )
                if waited > _SAY_AFTER_S and not is_said:
                    is_said = True
                    _log.info("save of %s waits for that of %s", what, self._lease.what)
                time.sleep(_POLL_S if waited > _POLL_S else _POLL_S / 20)
            slab = self._slab
            if slab is not None and slab.pid != os.getpid():
                slab = None  # A forked child must not write into its parent's staged copy.
            if slab is None or slab.nbytes < nbytes:
                before_growth()
                self._slab = self._lease = slab = None
                size = nbytes + int(nbytes * _HEADROOM)
                slab = Slab(-(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE)
            slab.pin()
            self._slab, self._lease = slab, Lease(slab, what)
        waited = time.monotonic() - began
        if waited > _SAY_AFTER_S:
            _log.info("save of %s waited %.1f s for staging memory", what, waited)
        return self._lease, waited


SLABS = SlabPool()
"""The slabs of this process: they outlive its writers, and all of its saves share them."""
