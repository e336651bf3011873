"""Copy a state dict into the slab, so that training goes on while the save writes the copy."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from dcp_hf_writer.errors import StagingError
from dcp_hf_writer.mapping.flattening import walk_tensors
from dcp_hf_writer.staging.kernel_copies import KERNEL_DTYPES, copy_by_kernel, mapped_over
from dcp_hf_writer.staging.same_memory import memory_identity
from dcp_hf_writer.staging.slab import (
    ALIGN_NBYTES,
    SLABS,
    Handover,
    Lease,
    Slab,
    SlabPool,
    StagedInfo,
)
from dcp_hf_writer.staging.staged_state_dict import StagedStateDict
from dcp_hf_writer.staging.take_apart import Leaf, plain_leaves, put_together, take_apart
from dcp_hf_writer.torch_seam.dtensor import spec_of, with_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcp_hf_writer.torch_seam.save_world import SaveWorld

# Overlapped staging copies smaller tensors before anything that the caller does next. Among them
# are buffers that a forward pass changes in place, such as batch-norm statistics.
EAGER_NBYTES = 1 << 20

StagingMode = Literal["blocking", "overlap"]


@dataclass(eq=False)
class _Program:
    """The copies for one state-dict structure, reused from save to save."""

    signature: tuple[Any, ...]
    staged: list[Any]
    """The replacement of each leaf: a tensor over the slab, or a DTensor around one."""
    locals_: list[torch.Tensor]
    """The slab tensor of each leaf."""
    copies: list[tuple[int, int]]
    """`(index of leaf, bytes)` of each distinct memory, in slab order."""
    nbytes: int
    offsets: dict[int, tuple[int, torch.Tensor]]
    """As `StagedStateDict.offsets`."""
    slab_nbytes: int
    """Bytes of the slab that the copies take, gaps included."""
    compounds: dict[int, tuple[object, torch.Tensor]] = field(default_factory=dict)
    """Copies of tensors with several leaves, as `put_together` keeps them."""
    mapped: dict[int, torch.Tensor] = field(default_factory=dict)
    """The slab tensors that a kernel can write to, by index of the leaf; made when needed."""
    meshes: list[Any] = field(default_factory=list)
    """The meshes whose ids are in the signature. While they live, no other mesh gets such an id."""


@dataclass(frozen=True, eq=False, slots=True)
class Copies:
    """The copies of an overlapped staging that go on after `stage` has returned."""

    copying: Future[None]
    """Done when all tensors are copied."""
    host_copied: threading.Event
    """Set when the tensors in host memory are copied."""
    events: Sequence[Any]
    """One CUDA event per device, recorded after the last copy from it."""


@dataclass(frozen=True, eq=False, slots=True)
class Staged:
    """The outcome of `Stager.stage`."""

    state_dict: StagedStateDict
    info: StagedInfo
    lease: Lease
    copies: Copies | None
    """The copies that still go on; `None` if all are done."""


class Stager:
    """Copies state dicts of this process into its slab; one save at a time."""

    def __init__(self, pool: SlabPool | None = None) -> None:
        """Start without memory; make a new pool unless `pool` is given."""
        self._pool = SlabPool() if pool is None else pool
        self._program: _Program | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._streams: dict[int, Any] = {}

    def stage(
        self,
        state_dict: dict[str, Any],
        *,
        mode: StagingMode,
        what: str,
        deadline: float,
        world: SaveWorld | None = None,
    ) -> Staged:
        """Copy a state dict into the slab; later changes by the caller do not reach the copy.

        The training thread calls this. It waits while an earlier save uses the slab. After an
        overlapped staging, the caller must not change the large tensors before `copies` are done.

        Args:
            state_dict: Nested dicts, lists and tuples of tensors and other values; tensors on any
                device. Values other than tensors are deep-copied.
            mode: `"blocking"` returns when all is copied. `"overlap"` copies tensors of
                `EAGER_NBYTES` and more in the background. It copies smaller tensors in host memory
                before it returns. For smaller tensors on a GPU, the current stream of that GPU
                waits for the copies; the host does not.
            what: Names the save in messages.
            deadline: `time.monotonic()` after which waiting for the slab ends.
            world: The ranks of the save, for the save to compare.

        Raises:
            StagingError: If a value cannot be staged, if memory cannot be allocated, or if the
                slab stays busy.
        """
        began = time.monotonic()
        # Switch once for all tensors: each switch takes as long as finding one tensor.
        with torch.no_grad():
            leaves, compounds = take_apart(walk_tensors(state_dict, into_tuples=True))
        aliases = _aliases(leaves)
        signature = (tuple(leaf.signature for leaf in leaves), tuple(aliases))
        nbytes = self._slab_nbytes(leaves, aliases, signature)
        lease, waited_s = self._pool.acquire(
            nbytes, what=what, deadline=deadline, before_growth=self._forget
        )
        try:
            program = self._program_for(leaves, aliases, signature, lease.slab)
            with torch.no_grad():
                built = put_together(compounds, program.staged, program.compounds)
                staged = StagedStateDict(_replace(state_dict, built))
            staged.offsets = program.offsets
            copies = self._copy(_pairs(leaves, program, lease.slab), mode)
        except BaseException:
            lease.release()
            raise
        lease.tie_to(staged)
        info = StagedInfo(
            nbytes=program.nbytes,
            waited_s=waited_s,
            stall_s=time.monotonic() - began,
        )
        staged.lease, lease.handover = lease, Handover(deadline, info, began, world)
        return Staged(staged, info, lease, copies)

    def stage_again(
        self, staged: StagedStateDict, *, deadline: float, world: SaveWorld | None
    ) -> StagedStateDict:
        """Return what was staged for another try at a save that failed; copies nothing.

        Args:
            staged: What `stage` returned; its save must be over.
            deadline: `time.monotonic()` by which the next try must be done.
            world: The ranks of the next try.

        Raises:
            StagingError: If the slab holds the content of another save by now.
        """
        if staged.lease is None or staged.lease.handover is None:
            msg = "the state dict was not staged, so it cannot be saved again"
            raise StagingError(msg, phase="stage")
        lease = self._pool.take_again(staged.lease)
        again = StagedStateDict(staged)
        again.offsets, again.lease = staged.offsets, lease
        lease.tie_to(again)
        info = StagedInfo(staged.lease.handover.info.nbytes, waited_s=0.0, stall_s=0.0)
        lease.handover = Handover(deadline, info, time.monotonic(), world)
        return again

    def take_turn(self, *, what: str, deadline: float, world: SaveWorld | None) -> Lease:
        """Take the turn of a save that has nothing in the slab, because its staging failed.

        Raises:
            StagingBusyError: If an earlier save is still running at the deadline.
        """
        began = time.monotonic()
        lease, waited_s = self._pool.take_turn(what=what, deadline=deadline)
        lease.handover = Handover(deadline, StagedInfo(0, waited_s, waited_s), began, world)
        return lease

    def wait_for_turn(self, *, what: str, deadline: float) -> None:
        """Wait until the saves are over that this process has staged; takes nothing.

        Raises:
            StagingBusyError: If an earlier save is still running at the deadline.
        """
        lease, _ = self._pool.take_turn(what=what, deadline=deadline)
        lease.release()

    def handover_of(self, state_dict: Mapping[str, Any]) -> tuple[Handover | None, Lease | None]:
        """Return what staging passed to the save of a state dict, and the lease on its memory.

        Other code may rebuild the state dict between staging and the save. So this looks at the
        tensors: those that lie in the slab were staged.

        Returns:
            As `SlabPool.handover_over`.

        Raises:
            StagingError: If tensors lie in the slab, but staging left nothing for a save.
        """
        tensors = (one for _, one in walk_tensors(state_dict, into_tuples=True))
        plain = itertools.chain.from_iterable(map(plain_leaves, tensors))
        return self._pool.handover_over(
            one.data_ptr() for one in plain if one.layout is torch.strided and not one.is_meta
        )

    def warm_up(self, state_dict: dict[str, Any], *, deadline: float) -> int:
        """Allocate and fault in the slab for a state dict; return the bytes that staging copied."""
        staged = self.stage(state_dict, mode="blocking", what="warm_up", deadline=deadline)
        staged.lease.release()
        return staged.info.nbytes

    def _forget(self) -> None:
        self._program = None

    def _slab_nbytes(
        self, leaves: list[Leaf], aliases: list[int], signature: tuple[Any, ...]
    ) -> int:
        program = self._program
        if program is not None and program.signature[0] == signature:
            return program.slab_nbytes
        return sum(_aligned(leaf.local.nbytes) for i, leaf in enumerate(leaves) if aliases[i] == i)

    def _program_for(
        self, leaves: list[Leaf], aliases: list[int], signature: tuple[Any, ...], slab: Slab
    ) -> _Program:
        program = self._program
        if program is None or program.signature != (signature, slab.slab_id):
            program = _build_program(leaves, aliases, (signature, slab.slab_id), slab)
            self._program = program
        return program

    def _copy(self, pairs: list[_Pair], mode: StagingMode) -> Copies | None:
        if mode == "blocking":
            self._copy_now(pairs)
            return None
        events = self._copy_small([pair for pair in pairs if pair[2] < EAGER_NBYTES])
        large = [pair for pair in pairs if pair[2] >= EAGER_NBYTES]
        large_on_gpu = [pair for pair in large if pair[1].is_cuda]
        events += self._enqueue_cuda(large_on_gpu)
        for _, source, _ in large_on_gpu:
            # The allocator must not reuse the source before the copy is done.
            source.record_stream(self._streams[source.device.index])
        # Detach: the trainer may give a parameter other memory before the copy begins.
        on_host = [(to, tensor.detach(), n) for to, tensor, n in large if not tensor.is_cuda]
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="dcp-hf-staging")
        host_copied = threading.Event()

        def finish(_held: list[_Pair] = pairs) -> None:
            # While the sources are held, the allocator does not reuse their memory.
            try:
                self._copy_now(on_host)
            finally:
                host_copied.set()
            for event in events:
                event.synchronize()

        return Copies(self._executor.submit(finish), host_copied, events)

    def _copy_small(self, pairs: list[_Pair]) -> list[Any]:
        """Copy before anything that the caller enqueues next; return events after the copies."""
        events = self._enqueue_cuda([pair for pair in pairs if pair[1].is_cuda])
        for event in events:
            # The device waits. The host would have to wait for every kernel queued so far.
            torch.cuda.current_stream(event.device).wait_event(event)
        self._copy_now([pair for pair in pairs if not pair[1].is_cuda])
        return events

    def _copy_now(self, pairs: list[_Pair]) -> None:
        events = self._enqueue_cuda([pair for pair in pairs if pair[1].is_cuda])
        on_host = [pair for pair in pairs if not pair[1].is_cuda]
        if on_host:
            with torch.no_grad():
                torch._foreach_copy_([p[0] for p in on_host], [p[1] for p in on_host])
        for event in events:
            event.synchronize()

    def _enqueue_cuda(self, pairs: list[_Pair]) -> list[Any]:
        """Start device-to-host copies on side streams; return one event per device, after them.

        The caller holds the sources until the events have happened.
        """
        events = []
        for device in dict.fromkeys(pair[1].device for pair in pairs):
            stream = self._streams.get(device.index)
            if stream is None:
                stream = self._streams[device.index] = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            here = [pair for pair in pairs if pair[1].device == device]
            with torch.cuda.stream(stream), torch.no_grad():
                copy_by_kernel([pair for pair in here if pair[0].is_cuda])
                for target, source, _ in here:
                    if not target.is_cuda:
                        target.copy_(source, non_blocking=True)
                event = torch.cuda.Event()
                event.record(stream)
            events.append(event)
        return events


STAGER = Stager(SLABS)
"""The stager that all writers of this process share, because a process has one slab."""

_Pair = tuple[torch.Tensor, torch.Tensor, int]
"""Target in the slab, source, bytes. The target is a GPU tensor if a kernel writes to the slab."""


def _aliases(leaves: list[Leaf]) -> list[int]:
    """Return for each leaf the index of the first leaf with the same memory, mostly its own."""
    addresses = [leaf.local.data_ptr() for leaf in leaves]
    count = Counter(addresses)
    seen: dict[tuple[Any, ...], int] = {}
    aliases = []
    for i, (leaf, address) in enumerate(zip(leaves, addresses, strict=True)):
        # Most addresses occur once, and `memory_identity` takes longer than counting addresses.
        identity = memory_identity(leaf.tensor) if count[address] > 1 else None
        aliases.append(i if identity is None else seen.setdefault(identity, i))
    return aliases


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN_NBYTES) * ALIGN_NBYTES


def _pairs(leaves: list[Leaf], program: _Program, slab: Slab) -> list[_Pair]:
    pairs = [(program.locals_[i], leaves[i].local, nbytes) for i, nbytes in program.copies]
    view = slab.device_view()
    if view is None:
        return pairs
    for place, (i, nbytes) in enumerate(program.copies):
        target, source, _ = pairs[place]
        is_small = 0 < nbytes < EAGER_NBYTES
        if is_small and source.device == view.device and source.dtype in KERNEL_DTYPES:
            mapped = program.mapped.get(i)
            if mapped is None:
                mapped = program.mapped[i] = mapped_over(target, view)
            pairs[place] = (mapped, source, nbytes)
    return pairs


def _build_program(
    leaves: list[Leaf], aliases: list[int], signature: tuple[Any, ...], slab: Slab
) -> _Program:
    locals_: list[torch.Tensor] = []
    staged: list[Any] = []
    copies: list[tuple[int, int]] = []
    meshes: list[Any] = []
    position = 0
    for i, leaf in enumerate(leaves):
        if aliases[i] == i:
            local = slab.tensor(position, leaf.local.dtype, tuple(leaf.local.shape))
            copies.append((i, leaf.local.nbytes))
            position += _aligned(leaf.local.nbytes)
        else:
            local = locals_[aliases[i]]
        spec = spec_of(leaf.tensor)
        locals_.append(local)
        # Each leaf gets its own object, because the table of offsets is keyed by `id`.
        staged.append(local.view(local.shape) if spec is None else with_spec(local, spec))
        if spec is not None:
            meshes.append(spec.mesh)
    nbytes = sum(n for _, n in copies)
    offsets = _offsets(staged, locals_, slab)
    return _Program(signature, staged, locals_, copies, nbytes, offsets, position, meshes=meshes)


def _offsets(
    staged: list[Any], locals_: list[torch.Tensor], slab: Slab
) -> dict[int, tuple[int, torch.Tensor]]:
    base = slab.tensor(0, torch.uint8, (1,)).data_ptr()
    return {
        id(obj): (local.data_ptr() - base, local)
        for obj, local in zip(staged, locals_, strict=True)
        if local.numel()
    }


def _replace(value: Any, staged: Any, name: str = "") -> Any:
    """Rebuild the containers around the staged tensors, and deep-copy every other value."""
    if isinstance(value, torch.Tensor):
        return next(staged)
    if isinstance(value, Mapping):
        return {
            key: next(staged)
            if isinstance(item, torch.Tensor)
            else _replace(item, staged, f"{name}.{key}")
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = (_replace(item, staged, f"{name}.{n}") for n, item in enumerate(value))
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    try:
        return copy.deepcopy(value)
    except Exception as error:
        msg = "a value of the state dict cannot be copied"
        raise StagingError(
            msg,
            phase="stage",
            fqn=name.removeprefix("."),
            expected="a value that copy.deepcopy can copy",
            found=f"{type(value).__name__}: {error}",
            hint="leave it out of the state dict, or save its state instead",
        ) from error


def wait_before_step(optimizer: torch.optim.Optimizer, current: Callable[[], Copies | None]) -> Any:
    """Make `optimizer.step()` wait for the copies of the latest overlapped staging.

    On CUDA the device waits, not the host.

    Returns:
        The handle of the hook, with `remove()`.
    """

    def hook(*_: Any) -> None:
        copies = current()
        if copies is None:
            return
        copies.host_copied.wait()
        for event in copies.events:
            torch.cuda.current_stream(event.device).wait_event(event)

    return optimizer.register_step_pre_hook(hook)
