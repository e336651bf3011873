"""The state dict that staging passes to a save, or the error if staging failed."""

from __future__ import annotations

import io
import pickle
import threading
import weakref
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor

from dcp_hf_writer.errors import CheckpointError, StagingError
from dcp_hf_writer.torch_seam.dtensor import spec_of, with_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from dcp_hf_writer.staging.slab import Handover, Lease, Slab

FAILED_KEY = "dcp_hf_writer.staging_failed"
"""Key of the only entry in a state dict that stands for a failed staging."""


class FailedStaging:
    """Replaces the content of a state dict that could not be staged, and carries the reason.

    DCP would save an empty state dict as a checkpoint without this rank. This value instead reaches
    any storage writer as an item to write, and raises the reason when the writer pickles it.
    """

    def __init__(self, error: CheckpointError) -> None:
        """Keep the reason, `error`."""
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        raise self.error


class StagedStateDict(dict[str, Any]):
    """A state dict whose tensors lie in the slab.

    To another process it sends the descriptor of the slab and offsets in the slab, for any number
    of tensors. torch would open one descriptor for each tensor.
    """

    lease: Lease | None = None
    """The turn of the save, and its right to use the slab; `None` in a checkpointer process."""
    offsets: Mapping[int, tuple[int, torch.Tensor]] = MappingProxyType({})
    """By `id` of each tensor, its byte offset in the slab and its local tensor in the slab."""
    handover: Handover | None = None
    """What staging passed to the save; only in a checkpointer process, which has no lease."""
    on_send: Callable[[], None] = staticmethod(lambda: None)
    """The thread that sends this state dict to a checkpointer process calls it."""
    on_save: Callable[[], None] = staticmethod(lambda: None)
    """The thread that begins to save this state dict calls it."""

    def items(self) -> Any:
        """Return the items; `dcp.save` calls this first, before it looks for its process group.

        A save finds its staged copy by the memory of its tensors. If there are none, it finds the
        copy by this call.
        """
        _read.latest = weakref.ref(self)
        self.on_save()
        return super().items()

    def __reduce__(self) -> tuple[Any, ...]:
        # The thread that pickles it then waits for the checkpointer process. So the end of this
        # thread is the end of the save.
        lease = self.lease
        assert lease is not None
        lease.take_up()
        try:
            self.on_send()
            if (error := failure_in(self)) is not None:
                return _rebuild_failed, (error,)
            buffer = io.BytesIO()
            _SlabPickler(buffer, self.offsets).dump(dict(self))
        except BaseException:
            lease.release()
            raise
        return _rebuild_staged, (lease.slab, buffer.getvalue(), lease.handover)


class _SlabPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, offsets: Mapping[int, tuple[int, torch.Tensor]]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._offsets = offsets

    def persistent_id(self, obj: Any) -> Any:
        """Send a slab tensor as its place in the slab."""
        found = self._offsets.get(id(obj))
        if found is None:
            return None
        offset, local = found
        spec = spec_of(obj) if isinstance(obj, DTensor) else None
        return offset, local.dtype, tuple(local.shape), spec


class _SlabUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, slab: Slab) -> None:
        super().__init__(file)
        self._slab = slab

    def persistent_load(self, pid: Any) -> Any:
        """Return the tensor over the slab at the place that was sent."""
        offset, dtype, shape, spec = pid
        return with_spec(self._slab.tensor(offset, dtype, shape), spec)


def _rebuild_staged(slab: Slab, payload: bytes, handover: Handover | None) -> StagedStateDict:
    # Unpickling is safe: our own parent sent the payload over its pipe, as it sends every other
    # argument of the save.
    staged = StagedStateDict(_SlabUnpickler(io.BytesIO(payload), slab).load())
    slab.handover = staged.handover = handover
    return staged


def _rebuild_failed(error: CheckpointError) -> StagedStateDict:
    return failed_state_dict(error)


_read = threading.local()


def staged_of(given: Mapping[str, Any]) -> StagedStateDict | None:
    """Return the staged state dict that the calling thread saves; `None` if it is not known.

    Args:
        given: What torch gives to the planner: a copy of that state dict, with the same values.
    """
    latest: StagedStateDict | None = getattr(_read, "latest", lambda: None)()
    if latest is None or given.keys() != latest.keys():
        return None
    is_same = all(given[key] is latest[key] for key in latest)
    return latest if is_same else None


def failed_state_dict(error: CheckpointError, lease: Lease | None = None) -> StagedStateDict:
    """Return a state dict whose save raises the error of the staging that failed.

    Args:
        error: The error.
        lease: The turn of that save, which ends with it; `None` in a checkpointer process.
    """
    failed = StagedStateDict({FAILED_KEY: FailedStaging(error)})
    failed.lease = lease
    if lease is not None:
        lease.tie_to(failed)
    return failed


def failure_in(state_dict: Mapping[str, Any]) -> CheckpointError | None:
    """Return the error of the staging that failed; `None` if the state dict was staged."""
    failed = state_dict.get(FAILED_KEY)
    return failed.error if isinstance(failed, FailedStaging) else None


def refuse_failed(fqns: Iterable[str]) -> None:
    """Refuse to plan a state dict that could not be staged, even if the reason was lost.

    Raises:
        StagingError: If one of the planned FQNs is `FAILED_KEY`.
    """
    if FAILED_KEY in fqns:
        msg = "the state dict could not be staged"
        raise StagingError(msg, phase="plan", expected="a staged state dict", found=FAILED_KEY)


def staging_error(error: BaseException) -> CheckpointError:
    """Return an error of staging as a `CheckpointError`, which can be sent to the other ranks."""
    if isinstance(error, CheckpointError):
        return error
    msg = "the state dict could not be staged"
    staging = StagingError(msg, phase="stage", found=f"{type(error).__name__}: {error}")
    staging.__cause__ = error
    return staging
