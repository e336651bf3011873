"""The slab: one reused block of host memory per process that holds the staged copy of a state dict.

The slab is a memory file without a name, so it needs only one file descriptor. A checkpointer
process maps the same file. The kernel frees it when the last process that maps it has ended, so a
dead run leaves nothing behind. The slab faults in all its pages when it is made: a fault takes ten
times as long as the copy into the page. If CUDA is in use, the slab is pinned.
"""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import os
import threading
import time
import uuid
import weakref
from collections import deque
from dataclasses import dataclass
from multiprocessing import reduction
from typing import TYPE_CHECKING, Any

import torch

from dcp_hf_writer.errors import StagingBusyError, StagingError
from dcp_hf_writer.staging.kernel_copies import view_on_device
from dcp_hf_writer.storage.host_memory import free_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dcp_hf_writer.torch_seam.save_world import SaveWorld

_log = logging.getLogger(__name__)

# Tensors start on a cache line, which is also the alignment of torch's own allocator.
ALIGN_NBYTES = 64

# Linux 5.14: fault in all pages now. Python has no name for it before 3.12.
_MADV_POPULATE_WRITE = 23

# cudaHostRegisterPortable: pinned for all contexts of the process.
_PORTABLE = 1

# A state dict that grows a little (a new buffer, a longer list of metrics) must still fit.
_HEADROOM = 1 / 64

_POLL_S = 0.02
_SAY_AFTER_S = 1.0


@dataclass(frozen=True)
class StagedInfo:
    """Facts about a state dict that staging collects; they travel with the save."""

    nbytes: int
    """Bytes copied."""
    waited_s: float
    """Seconds spent waiting for the slab; part of `stall_s`."""
    stall_s: float
    """Seconds for which staging blocked the caller, waiting included."""


@dataclass(frozen=True, slots=True)
class Handover:
    """What staging passes to the save that follows. It belongs to the slab that staging filled.

    The save whose tensors lie in that slab takes it, in this process or in a checkpointer process.
    """

    deadline: float
    """`time.monotonic()` by which the save must be done; processes of a host share the clock."""
    info: StagedInfo
    """The facts that staging collected."""
    began: float
    """`time.monotonic()` when staging began."""
    world: SaveWorld | None = None
    """The ranks of the save; `None` if nobody asked for them."""


class Slab:
    """A shared memory file of fixed size, mapped into this process. Not thread-safe."""

    def __init__(self, nbytes: int, *, fd: int | None = None, slab_id: str | None = None) -> None:
        """Make a slab, or map an existing one by its `fd`, which the new object then owns.

        Raises:
            StagingError: If there is too little free memory, or it cannot be allocated or mapped.
        """
        self.slab_id = slab_id or uuid.uuid4().hex
        self.handover: Handover | None = None
        """What staging passed to the latest save that a parent process sent in this slab."""
        self.nbytes = nbytes
        self.pid = os.getpid()
        is_new = fd is None
        if is_new:
            _check_free_memory(nbytes)
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
        # Only the process that stages pins the slab. A checkpointer process only reads from it, and
        # needs no CUDA.
        self._is_mine = is_new
        self.is_pinned = False
        self._device_view: torch.Tensor | None = None
        self.pin()

    def _fault_in(self) -> None:
        # Huge pages make both the faults and the copies faster. Both calls are hints: on an old
        # kernel that lacks one, the first copy faults the pages in.
        for advice in (mmap.MADV_HUGEPAGE, _MADV_POPULATE_WRITE):
            try:
                self._map.madvise(advice)
            except OSError as error:
                if error.errno == errno.ENOMEM:
                    # Otherwise the first copy into the slab would kill the process.
                    raise _no_memory(self.nbytes, error) from error
                _log.debug("madvise(%d) on the slab: %s", advice, error)

    def pin(self) -> None:
        """Pin the memory once CUDA is in use, which may be after the slab was made."""
        if self._is_mine and not self.is_pinned and torch.cuda.is_initialized():
            self.is_pinned = self._pin()

    def _pin(self) -> bool:
        result = int(torch.cuda.cudart().cudaHostRegister(self._address, self.nbytes, _PORTABLE))
        if result != 0:
            _log.warning("the staging slab could not be pinned (CUDA error %d)", result)
            return False
        # Unregister before the memory is unmapped: another slab may get the same address later.
        weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, self._address)
        return True

    def device_view(self) -> torch.Tensor | None:
        """Return the slab as a GPU tensor that kernels can write to; `None` if it is not pinned.

        Returns:
            uint8 of shape `(nbytes,)`, over the same memory. Its device is the one that was current
            when the slab was pinned.
        """
        if self._device_view is None and self.is_pinned:
            self._device_view = view_on_device(self._address, self.nbytes, self._map)
        return self._device_view

    @property
    def fd(self) -> int:
        """Descriptor of the memory file; the slab owns it."""
        return self._fd

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a contiguous tensor over the slab whose storage is exactly its own bytes.

        torch's writer would clone each tensor that is a view into one large storage.

        Args:
            offset: First byte within the slab, a multiple of `ALIGN_NBYTES`.
            dtype: Dtype of the tensor.
            shape: Shape of the tensor.
        """
        count = 1
        for n in shape:
            count *= n
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)

    def holds(self, address: int) -> bool:
        """Whether an address in the memory of this process lies in the slab."""
        return 0 <= address - self._address < self.nbytes

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.slab_id, self.nbytes, reduction.DupFd(self._fd))


def _check_free_memory(nbytes: int) -> None:
    """Refuse a slab that does not fit: filling it, the kernel would kill a process of the host."""
    free = free_memory()
    if free is not None and free.nbytes < nbytes:
        raise StagingError(
            "there is not enough free memory for the staged copy",
            phase="stage",
            expected=f"{nbytes} bytes free ({nbytes / (1 << 30):.2f} GiB)",
            found=f"{free.nbytes} bytes ({free.nbytes / (1 << 30):.2f} GiB) by {free.limit}",
            hint="free host memory, raise the memory limit of the container, or save fewer tensors "
            "from this rank",
        )


def _no_memory(nbytes: int, error: Exception) -> StagingError:
    return StagingError(
        "host memory for the staged copy could not be allocated",
        phase="stage",
        expected=f"{nbytes} bytes of shared memory",
        found=str(error),
        hint="free host memory, or save fewer tensors from this rank",
    )


def _attach(slab_id: str, nbytes: int, shared: Any) -> Slab:
    """Map a slab of another process."""
    return SLABS.attach(slab_id, nbytes, fd=shared.detach())


class Lease:
    """The turn of one save, and its right to use the slab; it ends with the save.

    A save without tensors, and one whose staging failed, takes its turn too: all saves of a process
    use the collectives of one group, so two of them must never run at the same time.

    DCP makes no last call to a storage writer whose save fails. So the lease ends at the first of
    these events: `release` is called, the thread that runs the save ends, or the staged state dict
    is dropped before any thread has taken it up.
    """

    def __init__(self, what: str) -> None:
        """Take the turn for the save that `what` describes."""
        self.what = what
        self.stager = threading.current_thread()
        self.handover: Handover | None = None
        """What staging passes to the save; set when all copies are done or have started."""
        self._slab: Slab | None = None
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        self._tie: Any = None

    @property
    def slab(self) -> Slab:
        """The slab, which only `SlabPool.acquire` gives to a lease."""
        assert self._slab is not None
        return self._slab

    def use(self, slab: Slab) -> None:
        """Give the slab to this save."""
        self._slab = slab

    def release(self) -> None:
        """End the lease; safe to call twice and from any thread."""
        self._released.set()

    def take_up(self) -> None:
        """Record that the calling thread runs the save.

        Raises:
            StagingError: If the lease has ended, or another save has taken it up.
        """
        with self._lock:
            if not self.is_active or self._thread is not None:
                raise _given_back(self.what)
            self._thread = threading.current_thread()

    def tie_to(self, staged: object) -> None:
        """End the lease if `staged` is dropped before a thread has taken it up.

        A second call replaces the first: what failed to be copied is dropped for its error.
        """
        if self._tie is not None:
            self._tie.detach()
        self._tie = weakref.finalize(staged, self._drop)

    def _drop(self) -> None:
        if self._thread is None:
            self.release()

    @property
    def is_pending(self) -> bool:
        """Whether the lease goes on but no save has taken it up yet."""
        return self._thread is None and not self._released.is_set()

    @property
    def is_taken_by_me(self) -> bool:
        """Whether the save that the calling thread runs has taken up the lease."""
        return self._thread is threading.current_thread()

    @property
    def is_active(self) -> bool:
        """Whether the save may still read the slab."""
        if self._released.is_set() or self._pid != os.getpid():
            # A forked child has a copy of the lease, but it does not run the save.
            return False
        return self._thread is None or self._thread.is_alive()


def _given_back(what: str) -> StagingError:
    msg = "the staged copy was released or already saved before this save began"
    return StagingError(msg, path=what, hint="save each staged state dict exactly once")


class SlabPool:
    """The staging memory of a process: its own slab, the lease on it, and a parent's slab."""

    def __init__(self) -> None:
        """Start without memory."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        """Guards the two members below; nobody waits while holding it."""
        self._waiting: deque[object] = deque()
        """One object for each caller that waits for its turn, in the order of their calls."""
        self._lease: Lease | None = None
        self._slab: Slab | None = None
        self._attached: Slab | None = None

    def attach(self, slab_id: str, nbytes: int, *, fd: int) -> Slab:
        """Map a slab of another process, or return it if it is mapped already.

        Another slab that was mapped before is dropped: its owner has replaced it by a larger one.

        Args:
            slab_id: Its id.
            nbytes: Its size.
            fd: Descriptor of its memory file. This method closes it, or the slab owns it.
        """
        slab = self._attached
        if slab is not None and slab.slab_id == slab_id:
            os.close(fd)
            return slab
        self._attached = None
        self._attached = Slab(nbytes, fd=fd, slab_id=slab_id)
        return self._attached

    def handover_over(self, addresses: Iterable[int]) -> tuple[Handover | None, Lease | None]:
        """Return what staging passed to the save of some tensors, and the lease on their memory.

        Args:
            addresses: Address of one byte of each tensor.

        Returns:
            `(None, None)` if no address lies in a slab. In a checkpointer process the lease is
            `None`: the guard in the parent holds it.

        Raises:
            StagingError: If an address lies in the slab, but staging left nothing for a save: the
                next save writes over the slab.
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

    def take_again(self, lease: Lease) -> Lease:
        """Take the slab for another try at the save that `lease` served, with the same content.

        Raises:
            StagingError: If the save may still run, or another save was staged since.
        """
        with self._lock:
            if self._lease is not lease or lease.is_active or self._slab is not lease.slab:
                raise _given_back(lease.what)
            self._lease = Lease(lease.what)
            self._lease.use(lease.slab)
            return self._lease

    def acquire(
        self, nbytes: int, *, what: str, deadline: float, before_growth: Callable[[], None]
    ) -> tuple[Lease, float]:
        """Take the slab; wait while an earlier save uses it.

        Args:
            nbytes: Size needed; a smaller slab is replaced by one of this size and some headroom.
            what: Names the save in messages.
            deadline: `time.monotonic()` after which waiting ends.
            before_growth: Called before the old slab is replaced, to drop tensors that map it.

        Returns:
            The lease, and how long the caller waited for earlier saves, in seconds.

        Raises:
            StagingBusyError: If the slab is still in use at the deadline.
            StagingError: If memory cannot be allocated.
        """
        lease, waited_s = self.take_turn(what=what, deadline=deadline)
        if waited_s > _SAY_AFTER_S:
            _log.info("save of %s waited %.1f s for staging memory", what, waited_s)
        try:
            lease.use(self._slab_of(nbytes, before_growth))
        except BaseException:
            lease.release()
            raise
        return lease, waited_s

    def take_turn(self, *, what: str, deadline: float) -> tuple[Lease, float]:
        """Take a turn without the slab; callers get their turns in the order of their calls.

        Args:
            what: Names the save in messages.
            deadline: `time.monotonic()` after which waiting ends.

        Returns:
            The lease, and how long the caller waited, in seconds.

        Raises:
            StagingBusyError: If an earlier save still has the turn at the deadline.
        """
        began = time.monotonic()
        if self._pid != os.getpid():
            # A forked child: the threads that waited, or held the lock, are not here.
            self._pid, self._lock, self._waiting = os.getpid(), threading.Lock(), deque()
        me = object()
        with self._lock:
            self._waiting.append(me)
        try:
            is_said = False
            while (lease := self._turn_of(me, what)) is None:
                waited = time.monotonic() - began
                if time.monotonic() > deadline:
                    raise self._busy(waited)
                if waited > _SAY_AFTER_S and not is_said:
                    is_said = True
                    self._say_waiting(what)
                time.sleep(_POLL_S if waited > _POLL_S else _POLL_S / 20)
        finally:
            with self._lock:
                self._waiting.remove(me)
        return lease, time.monotonic() - began

    def _turn_of(self, me: object, what: str) -> Lease | None:
        """Return a new lease if the turn has come to `me`."""
        with self._lock:
            is_busy = self._lease is not None and self._lease.is_active
            if is_busy or self._waiting[0] is not me:
                return None
            self._lease = Lease(what)
            return self._lease

    def _busy(self, waited_s: float) -> StagingBusyError:
        msg = "an earlier save still uses the staging memory"
        earlier = "unknown" if self._lease is None else self._lease.what
        return StagingBusyError(
            msg,
            phase="stage",
            expected=f"free within {waited_s:.0f} s",
            found=f"in use by the save of {earlier}",
            hint="save less often, or raise timeout_s",
        )

    def _say_waiting(self, what: str) -> None:
        earlier = self._lease
        if earlier is not None:
            _log.info("save of %s waits for the save of %s", what, earlier.what)
        # An earlier save may have failed. The frames in the traceback of its error then hold the
        # staged copy in a reference cycle.
        gc.collect()

    def _slab_of(self, nbytes: int, before_growth: Callable[[], None]) -> Slab:
        """Return a slab of at least `nbytes` bytes; only the owner of the lease calls this."""
        slab = self._slab
        if slab is not None and slab.pid != os.getpid():
            slab = None  # A forked child must not write into its parent's staged copy.
        if slab is None or slab.nbytes < nbytes:
            before_growth()
            self._slab = slab = None
            size = nbytes + int(nbytes * _HEADROOM)
            slab = Slab(-(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE)
        slab.pin()
        self._slab = slab
        return slab


SLABS = SlabPool()
"""The slabs of this process: they outlive its writers, and all of its saves share them."""
