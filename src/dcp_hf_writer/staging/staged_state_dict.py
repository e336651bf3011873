"""A state dict that was staged, or could not be, on its way to the save of it."""

from __future__ import annotations

import io
import pickle
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
"""The one entry of a state dict that could not be staged."""


class FailedStaging:
    """Stands in a state dict for all that could not be staged, with the reason.

    An empty state dict would be saved as a checkpoint without this rank. This value reaches any
    storage writer as an item to write, and raises the reason when one writes it.
    """

    def __init__(self, error: CheckpointError) -> None:
        """Keep the reason."""
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        raise self.error


class StagedStateDict(dict[str, Any]):
    """A state dict whose tensors lie in the slab.

    Sent to another process it travels as the slab's descriptor and offsets, whatever the number of
    tensors; torch would open one descriptor for each.
    """

    lease: Lease | None = None
    """Of the slab; `None` if nothing could be staged, and in a checkpointer process."""
    offsets: Mapping[int, tuple[int, torch.Tensor]] = MappingProxyType({})
    """Place in the slab of each tensor, by `id`, with the tensor itself."""
    on_send: Callable[[], None] = staticmethod(lambda: None)
    """Called by the thread that sends it to a checkpointer process."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled by the thread that waits for the checkpointer process: its end is the save's end.
        lease = self.lease
        if lease is None:
            self.on_send()
            return _rebuild_failed, (failure_in(self),)
        lease.take_up()
        try:
            self.on_send()
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
        """Map a slab tensor."""
        offset, dtype, shape, spec = pid
        return with_spec(self._slab.tensor(offset, dtype, shape), spec)


def _rebuild_staged(slab: Slab, payload: bytes, handover: Handover | None) -> StagedStateDict:
    # Sent by our own parent over its pipe, as every other argument of the save.
    staged = StagedStateDict(_SlabUnpickler(io.BytesIO(payload), slab).load())
    slab.handover = handover
    return staged


def _rebuild_failed(error: CheckpointError | None) -> StagedStateDict:
    return StagedStateDict() if error is None else failed_state_dict(error)


def failed_state_dict(error: CheckpointError) -> StagedStateDict:
    """Return a state dict whose save raises why staging failed."""
    return StagedStateDict({FAILED_KEY: FailedStaging(error)})


def failure_in(state_dict: Mapping[str, Any]) -> CheckpointError | None:
    """Return why a state dict could not be staged; `None` if it could."""
    failed = state_dict.get(FAILED_KEY)
    return failed.error if isinstance(failed, FailedStaging) else None


def refuse_failed(fqns: Iterable[str]) -> None:
    """Refuse a plan of what could not be staged, whatever became of the reason.

    Raises:
        StagingError: If one of the planned names is that of a failed staging.
    """
    if FAILED_KEY in fqns:
        msg = "the state dict could not be staged"
        raise StagingError(msg, phase="plan", expected="a staged state dict", found=FAILED_KEY)


def staging_error(error: BaseException) -> CheckpointError:
    """Return an error of staging as one of ours, which can be sent to the other ranks."""
    if isinstance(error, CheckpointError):
        return error
    msg = "the state dict could not be staged"
    staging = StagingError(msg, phase="stage", found=f"{type(error).__name__}: {error}")
    staging.__cause__ = error
    return staging
