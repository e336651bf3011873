"""The staging side of the writer: what runs in the training thread, before the save."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import AsyncStager

from dcp_hf_writer.errors import StagingBusyError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.save import export_assets
from dcp_hf_writer.save.failure_explanations import guard_process_save
from dcp_hf_writer.staging.staged_state_dict import (
    StagedStateDict,
    failed_state_dict,
    staging_error,
)
from dcp_hf_writer.staging.stager import STAGER, Copies, Staged, StagingMode, wait_before_step

if TYPE_CHECKING:
    import torch

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.staging.slab import Lease


class SlabStager(AsyncStager):
    """Stages into the slab of the process; the part of `HFDualWriter` that trainers wait for."""

    path: str
    export: HFExport | None
    staging: StagingMode
    timeout_s: float
    process_group: dist.ProcessGroup | None
    _copies: Copies | None = None
    """Of the latest overlapped staging; not its state dict, whose end must be seen."""
    _lease: weakref.ref[Lease] | None = None
    """Of the latest staging; weak, since a lease keeps its slab mapped."""

    def stage(self, state_dict: dict[str, Any]) -> Any:
        """Copy a state dict into the slab; what changes afterwards reaches no file.

        Called by `async_save` in the training thread, on every rank. Waits for a save in flight.

        Returns:
            The staged state dict, or with overlapped staging its future. If it cannot be staged,
            one that holds the error alone: it is raised in the plan, so that every rank gets it and
            none waits for this one in a collective.

        Raises:
            StagingBusyError: If an earlier save is still in flight at the deadline.
        """
        deadline = time.monotonic() + self.timeout_s
        self._read_assets()
        try:
            staged = STAGER.stage(state_dict, mode=self.staging, what=self.path, deadline=deadline)
        except StagingBusyError:
            # The save in flight is stuck in a collective: another one must not begin beside it.
            raise
        except Exception as error:  # noqa: BLE001 - raised in the plan
            self._copies = None
            failed = _failed(deadline, error, self.path)
            return failed if self.staging == "blocking" else _done(failed)
        reach("staged")
        self._copies, self._lease = staged.copies, weakref.ref(staged.lease)
        result, lease, target = staged.state_dict, staged.lease, self.path
        result.on_send = lambda: guard_process_save(lease, deadline=deadline, target=target)
        return result if staged.copies is None else _when_copied(staged, deadline, target)

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether `async_save` shall wait for staging: never, it is done or the guard waits."""
        return False

    def synchronize_staging(self) -> None:
        """Wait until the copies of the latest `stage` are done."""
        if self._copies is not None:
            self._copies.copying.result(timeout=self.timeout_s)

    def close(self) -> None:
        """Nothing to give back: the slab is the process's, for its next save."""

    def guard(self, optimizer: torch.optim.Optimizer) -> Any:
        """Make `optimizer.step()` wait for overlapped copies; for `staging="overlap"`.

        On CUDA the device waits. Parameters must be changed by optimizers that are guarded, or not
        before `staging_completion` is done.

        Returns:
            The handle of the hook; `remove()` undoes it.
        """
        return wait_before_step(optimizer, lambda: self._copies)

    def warm_up(self, state_dict: dict[str, Any]) -> int:
        """Allocate the slab and read the assets before the first save, off the training's clock.

        Returns:
            Bytes of the staged copy on this rank.
        """
        self._read_assets()
        return STAGER.warm_up(state_dict, deadline=time.monotonic() + self.timeout_s)

    def _give_back_staged(self) -> None:
        """End the latest lease if a save was to take it up, and will not.

        A synchronous save, in the thread that stages, leaves it to the save that it is for.
        """
        lease = None if self._lease is None else self._lease()
        is_mine = lease is not None and lease.stager is threading.current_thread()
        if lease is not None and lease.is_pending and not is_mine:
            lease.release()

    def _read_assets(self) -> None:
        # Now, in the training thread: config objects may change while the save runs. Errors are
        # kept and raised in the plan, where every rank learns of them.
        is_first = not dist.is_initialized() or dist.get_rank(self.process_group) == 0
        if self.export is not None and is_first:
            export_assets.preload(self.export)


def _done(value: Any) -> Future[Any]:
    result: Future[Any] = Future()
    result.set_result(value)
    return result


def _failed(deadline: float, error: BaseException, target: str) -> StagedStateDict:
    """Return a state dict whose save raises what went wrong while it was staged."""
    failed = failed_state_dict(staging_error(error))
    failed.on_send = lambda: guard_process_save(None, deadline=deadline, target=target)
    return failed


def _when_copied(staged: Staged, deadline: float, target: str) -> Future[Any]:
    """Return the future of the staged state dict; of a failed one if a copy failed."""
    result: Future[Any] = Future()
    lease, copies = staged.lease, staged.copies
    # Emptied by `done`, which the writer keeps: the lease ends with the state dict where no save
    # takes it up, and the result holds it too.
    handed = [(result, staged.state_dict)]

    def done(copying: Future[None]) -> None:
        future, state_dict = handed.pop()
        error = copying.exception()
        if error is None:
            future.set_result(state_dict)
        else:
            lease.release()
            # Raised in the plan: an error here would leave the others in a collective.
            future.set_result(_failed(deadline, error, target))

    if copies is not None:
        copies.copying.add_done_callback(done)
    return result
