"""The staging side of the writer: what runs in the training thread, before the save."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import AsyncStager

from dcp_hf_writer import _assets
from dcp_hf_writer._guards import guard_process_save
from dcp_hf_writer._hooks import reach
from dcp_hf_writer.errors import StagingBusyError
from dcp_hf_writer.staging import (
    Staged,
    StagedInfo,
    StagedStateDict,
    Stager,
    StagingMode,
    staging_error,
    wait_before_step,
)

if TYPE_CHECKING:
    import torch

    from dcp_hf_writer._slab import Lease
    from dcp_hf_writer.errors import CheckpointError
    from dcp_hf_writer.export import HFExport

# The slab outlives the writers of this process.
_stager = Stager()


@dataclass(frozen=True, slots=True)
class Handover:
    """What `stage` leaves for the save that follows it; empty for a synchronous save."""

    deadline: float | None = None
    """`time.monotonic()` by which the save must be done."""
    info: StagedInfo | None = None
    """What staging found out."""
    lease: Lease | None = None
    """Of the slab; stays in the process that staged."""
    error: CheckpointError | None = None
    """Why staging failed."""


class SlabStager(AsyncStager):
    """Stages into the slab of the process; the part of `HFDualWriter` that trainers wait for."""

    path: str
    export: HFExport | None
    staging: StagingMode
    timeout_s: float
    process_group: dist.ProcessGroup | None
    handover: Handover
    _staged: Staged | None = None

    def stage(self, state_dict: dict[str, Any]) -> Any:
        """Copy a state dict into the slab; what changes afterwards reaches no file.

        Called by `async_save` in the training thread, on every rank. Waits for a save in flight.

        Returns:
            The staged state dict, or with overlapped staging its future. If it cannot be staged,
            an empty one: the error is raised in the plan, so that every rank gets it and none waits
            for this one in a collective.

        Raises:
            StagingBusyError: If an earlier save is still in flight at the deadline.
        """
        deadline = time.monotonic() + self.timeout_s
        self._read_assets()
        state_dict_or_future: Any
        try:
            staged = _stager.stage(state_dict, mode=self.staging, what=self.path, deadline=deadline)
        except StagingBusyError:
            # The save in flight is stuck in a collective: another one must not begin beside it.
            raise
        except Exception as error:  # noqa: BLE001 - raised in the plan
            self._staged, lease, result = None, None, StagedStateDict()
            self.handover = Handover(deadline, error=staging_error(error))
            state_dict_or_future = result if self.staging == "blocking" else _done(result)
        else:
            reach("staged")
            self._staged, lease, result = staged, staged.lease, staged.state_dict
            self.handover = Handover(deadline, staged.info, lease)
            state_dict_or_future = (
                result if staged.copying is None else self._when_copied(staged, deadline)
            )
        target = self.path
        result.on_send = lambda: guard_process_save(lease, deadline=deadline, target=target)
        return state_dict_or_future

    def _when_copied(self, staged: Staged, deadline: float) -> Future[Any]:
        """Return the future of the staged state dict; of an empty one if a copy failed."""
        result: Future[Any] = Future()

        def done(copying: Future[None]) -> None:
            error = copying.exception()
            if error is None:
                result.set_result(staged.state_dict)
                return
            staged.lease.release()
            # Raised in the plan: an error here would leave the others in a collective.
            self.handover = Handover(deadline, error=staging_error(error))
            empty = StagedStateDict()
            empty.on_send = staged.state_dict.on_send
            result.set_result(empty)

        if staged.copying is not None:
            staged.copying.add_done_callback(done)
        return result

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether `async_save` shall wait for staging: never, it is done or the guard waits."""
        return False

    def synchronize_staging(self) -> None:
        """Wait until the copies of the latest `stage` are done."""
        if self._staged is not None and self._staged.copying is not None:
            self._staged.copying.result(timeout=self.timeout_s)

    def close(self) -> None:
        """Nothing to give back: the slab is the process's, for its next save."""

    def guard(self, optimizer: torch.optim.Optimizer) -> Any:
        """Make `optimizer.step()` wait for overlapped copies; for `staging="overlap"`.

        On CUDA the device waits. Parameters must be changed by optimizers that are guarded, or not
        before `staging_completion` is done.

        Returns:
            The handle of the hook; `remove()` undoes it.
        """
        return wait_before_step(optimizer, lambda: self._staged)

    def warm_up(self, state_dict: dict[str, Any]) -> int:
        """Allocate the slab and read the assets before the first save, off the training's clock.

        Returns:
            Bytes of the staged copy on this rank.
        """
        self._read_assets()
        return _stager.warm_up(state_dict, deadline=time.monotonic() + self.timeout_s)

    def _read_assets(self) -> None:
        # Now, in the training thread: config objects may change while the save runs. Errors are
        # kept and raised in the plan, where every rank learns of them.
        is_first = not dist.is_initialized() or dist.get_rank(self.process_group) == 0
        if self.export is not None and is_first:
            _assets.preload(self.export)


def _done(value: Any) -> Future[Any]:
    result: Future[Any] = Future()
    result.set_result(value)
    return result
