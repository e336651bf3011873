"""The staging side of the writer: what runs in the training thread, before the save."""

from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import AsyncStager

from dcp_hf_writer.errors import StagingBusyError, StagingError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.save import export_assets
from dcp_hf_writer.save.failure_explanations import guard_process_save
from dcp_hf_writer.staging.staged_state_dict import (
    StagedStateDict,
    failed_state_dict,
    failure_in,
    staging_error,
)
from dcp_hf_writer.staging.stager import STAGER, Copies, Staged, StagingMode, wait_before_step

if TYPE_CHECKING:
    import torch

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.staging.slab import Lease


class SlabStager(AsyncStager):
    """Stages state dicts into the slab of this process; trainers wait for this part of a save."""

    path: str
    export: HFExport | None
    staging: StagingMode
    timeout_s: float
    process_group: dist.ProcessGroup | None
    _copies: Copies | None = None
    """Copies of the latest overlapped staging. Its state dict is not kept: the lease ends when the
    state dict is freed."""
    _lease: weakref.ref[Lease] | None = None
    """Lease of the latest staging. A weak reference, because a lease keeps its slab mapped."""

    def stage(self, state_dict: dict[str, Any]) -> Any:
        """Copy a state dict into the slab; later changes to the tensors do not reach the files.

        `async_save` calls this in the training thread, on every rank. Waits for a save in flight.

        Returns:
            The staged state dict, or with overlapped staging a future of it. If staging fails, the
            returned state dict holds only the error. The planning step raises it, so that every
            rank gets it and no rank waits for this one in a collective.

        Raises:
            StagingBusyError: If an earlier save is still in flight at the deadline.
        """
        deadline = time.monotonic() + self.timeout_s
        self._read_assets()
        broken = failure_in(state_dict)
        if broken is not None:
            # The caller could not make the state dict on this rank.
            return _failed(deadline, broken, self.path)
        try:
            staged = STAGER.stage(state_dict, mode=self.staging, what=self.path, deadline=deadline)
        except StagingBusyError:
            # The save in flight may be stuck in a collective: no other save may begin beside it.
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

    def stage_again(self, staged: StagedStateDict) -> StagedStateDict:
        """Return what `stage` returned for another try at its save, which must be over.

        Copies nothing. If the content is gone, the save of the returned state dict raises the
        reason in the planning step, on every rank.
        """
        deadline, target = time.monotonic() + self.timeout_s, self.path
        try:
            again = STAGER.stage_again(staged, deadline=deadline)
        except StagingError as error:
            return _failed(deadline, error, target)
        lease = again.lease
        again.on_send = lambda: guard_process_save(lease, deadline=deadline, target=target)
        return again

    @property
    def copies(self) -> Copies | None:
        """The copies of the latest overlapped staging; `None` if there was none."""
        return self._copies

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Always `False`: staging has finished, or `guard` waits for it."""
        return False

    def synchronize_staging(self) -> None:
        """Wait until the copies of the latest `stage` are complete."""
        if self._copies is not None:
            self._copies.copying.result(timeout=self.timeout_s)

    def close(self) -> None:
        """Do nothing: the slab belongs to the process, which reuses it in its next save."""

    def guard(self, optimizer: torch.optim.Optimizer) -> Any:
        """Make `optimizer.step()` wait for overlapped copies; use it with `staging="overlap"`.

        On CUDA the device waits, not the host. Change parameters only with guarded optimizers, or
        wait for `staging_completion` first.

        Returns:
            The handle of the hook; its `remove()` removes the hook.
        """
        return wait_before_step(optimizer, lambda: self._copies)

    def warm_up(self, state_dict: dict[str, Any]) -> int:
        """Allocate the slab and read the assets, so that the first save does not have to.

        Returns:
            Size of the staged copy on this rank, in bytes.
        """
        self._read_assets()
        return STAGER.warm_up(state_dict, deadline=time.monotonic() + self.timeout_s)

    def _give_back_staged(self) -> None:
        """Release the latest lease if it still waits for a save that will not come.

        A synchronous save runs in the thread that stages. It leaves the lease alone, because the
        lease belongs to an asynchronous save that comes later.
        """
        lease = None if self._lease is None else self._lease()
        is_mine = lease is not None and lease.stager is threading.current_thread()
        if lease is not None and lease.is_pending and not is_mine:
            lease.release()

    def _read_assets(self) -> None:
        # Read now, in the training thread: config objects may change while the save runs. Errors
        # are kept and raised in the planning step, where every rank learns of them.
        is_first = not dist.is_initialized() or dist.get_rank(self.process_group) == 0
        if self.export is not None and is_first:
            export_assets.preload(self.export)


def _done(value: Any) -> Future[Any]:
    result: Future[Any] = Future()
    result.set_result(value)
    return result


def _failed(deadline: float, error: BaseException, target: str) -> StagedStateDict:
    """Return a state dict whose save raises the error that staging met."""
    failed = failed_state_dict(staging_error(error))
    failed.on_send = lambda: guard_process_save(None, deadline=deadline, target=target)
    return failed


def _when_copied(staged: Staged, deadline: float, target: str) -> Future[Any]:
    """Return a future of the staged state dict; if a copy fails, of one that holds the error."""
    result: Future[Any] = Future()
    lease, copies = staged.lease, staged.copies
    # If no save takes up the lease, it ends when the state dict is freed. The writer keeps `done`,
    # and the result holds the state dict too: so `done` must drop its references to both.
    handed = [(result, staged.state_dict)]

    def done(copying: Future[None]) -> None:
        future, state_dict = handed.pop()
        error = copying.exception()
        if error is None:
            future.set_result(state_dict)
        else:
            lease.release()
            # The planning step raises it: an error here would leave the other ranks waiting in a
            # collective.
            future.set_result(_failed(deadline, error, target))

    if copies is not None:
        copies.copying.add_done_callback(done)
    return result
