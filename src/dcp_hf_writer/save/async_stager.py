"""The staging side of the writer: what runs in the training thread, before the save."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch.distributed.checkpoint.staging import AsyncStager

from dcp_hf_writer.errors import CheckpointError, StagingBusyError, StagingError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.mapping.flattening import with_states
from dcp_hf_writer.mapping.hf_export import HFExport
from dcp_hf_writer.save import export_assets, save_log
from dcp_hf_writer.save.early_export_check import warn_without_export
from dcp_hf_writer.save.failure_explanations import check_world, watch_pending
from dcp_hf_writer.save.owner_process import is_on_first_host
from dcp_hf_writer.save.process_saves import guard_process_save
from dcp_hf_writer.save.rank_progress import MEETING
from dcp_hf_writer.save.store_access import StoreAccess
from dcp_hf_writer.staging.staged_state_dict import (
    StagedStateDict,
    failed_state_dict,
    failure_in,
    staging_error,
)
from dcp_hf_writer.staging.stager import STAGER, Copies, Staged, StagingMode, wait_before_step
from dcp_hf_writer.torch_seam.caller_frames import find_async_save
from dcp_hf_writer.torch_seam.save_world import SaveWorld

if TYPE_CHECKING:
    import torch

    from dcp_hf_writer.save.export_assets import Assets
    from dcp_hf_writer.save.finished_save import ReportHook
    from dcp_hf_writer.staging.slab import Lease


_log = logging.getLogger(__name__)


class SlabStager(AsyncStager):
    """Stages state dicts into the slab of this process; trainers wait for this part of a save."""

    path: str
    export: HFExport | None
    staging: StagingMode
    timeout_s: float
    process_group: dist.ProcessGroup | None
    on_export_error: str
    report_to: tuple[ReportHook, ...] = ()
    _stores = StoreAccess(None)
    _copies: Copies | None = None
    """Copies of the latest overlapped staging. Its state dict is not kept: the lease ends when the
    state dict is freed."""
    _lease: weakref.ref[Lease] | None = None
    """Lease of the latest staging. A weak reference, because a lease keeps its slab mapped."""
    _assets_error: CheckpointError | None = None
    """Why the latest staging could not read the assets; its save raises it."""

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
        began = time.monotonic()
        call = find_async_save()
        target = self.path if call is None or call.checkpoint_id is None else call.checkpoint_id
        shown = self._stores.note(os.fspath(target))
        place = _Place(shown, self._subdir, self.report_to, self._stores)
        deadline = began + self.timeout_s
        world = SaveWorld.at_staging(call, self.process_group)
        self._assets_error = self._read_assets(is_first=world.rank == 0)
        try:
            broken = failure_in(state_dict)
            if broken is not None:
                raise broken  # noqa: TRY301 - as a value that cannot be staged
            staged = STAGER.stage(
                state_dict, mode=self.staging, what=target, deadline=deadline, world=world
            )
        except StagingBusyError:
            # The save in flight may be stuck in a collective: no other save may begin beside it.
            raise
        except Exception as error:  # noqa: BLE001 - raised in the plan
            lease = STAGER.take_turn(what=target, deadline=deadline, world=world)
            self._copies, self._lease = None, weakref.ref(lease)
            failed = _failed(lease, error, place)
            return failed if self.staging == "blocking" else _done(failed)
        reach("staged")
        save_log.log_phase(target, world.rank, "stage", time.monotonic() - began)
        self._copies, self._lease = staged.copies, weakref.ref(staged.lease)
        result = staged.state_dict
        _attend(result, staged.lease, place)
        return result if staged.copies is None else _when_copied(staged, place)

    def stage_again(self, staged: StagedStateDict) -> StagedStateDict:
        """Return what `stage` returned for another try at its save, which must be over.

        Copies nothing. If the content is gone, the save of the returned state dict raises the
        reason in the planning step, on every rank.

        Raises:
            StagingBusyError: If another save is still in flight at the deadline.
        """
        deadline, target = time.monotonic() + self.timeout_s, self.path
        place = _Place(target, self._subdir, self.report_to, self._stores)
        world = SaveWorld.at_staging(find_async_save(), self.process_group)
        try:
            again = STAGER.stage_again(staged, deadline=deadline, world=world)
        except StagingError as error:
            lease = STAGER.take_turn(what=target, deadline=deadline, world=world)
            self._lease = weakref.ref(lease)
            return _failed(lease, error, place)
        assert again.lease is not None
        self._lease = weakref.ref(again.lease)
        _attend(again, again.lease, place)
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

        If it can already tell that a checkpoint would have no export, it logs a warning.

        Returns:
            Size of the staged copy on this rank, in bytes.

        Raises:
            ExportError: If an asset cannot be read; on the coordinator only.
            ConfigError: If `assets` or `like` is invalid; on the coordinator only.
        """
        error = self._read_assets(is_first=self._plans_export())
        if error is not None:
            raise error
        state_dict = with_states(state_dict)
        self._warn_without_export(state_dict)
        return STAGER.warm_up(state_dict, deadline=time.monotonic() + self.timeout_s)

    def _pending_lease(self) -> Lease | None:
        """Return the latest lease if it still waits for its save, and this thread may run it.

        A synchronous save runs in the thread that stages. It leaves the lease alone, because the
        lease belongs to an asynchronous save that comes later.
        """
        lease = None if self._lease is None else self._lease()
        is_mine = lease is not None and lease.stager is threading.current_thread()
        return lease if lease is not None and lease.is_pending and not is_mine else None

    def _warn_without_export(self, state_dict: dict[str, Any]) -> None:
        assets = None if self.export is None else export_assets.known(self.export)
        if self.export is not None and assets is not None:
            size = dist.get_world_size(self.process_group) if dist.is_initialized() else 1
            warn_without_export(state_dict, self.export, assets, world_size=size)

    def _read_assets(self, *, is_first: bool) -> CheckpointError | None:
        # Read now, in the training thread: config objects may change while the save runs. A save
        # raises the error in its planning step, where every rank learns of it.
        if self.export is None or not is_first:
            return None
        return export_assets.preload(self.export)

    def _assets_of(self, export: HFExport, *, is_staged: bool) -> Assets:
        """Return the assets for a save; raise, once, what kept its staging from reading them."""
        error, self._assets_error = self._assets_error, None
        if is_staged and error is not None:
            raise error
        return export_assets.assets_of(export)

    def _look_at_assets(self) -> None:
        """Check early that `like` and paths among the assets are there.

        Only the coordinator reads them later. The other ranks of its host look too, so that all of
        them raise together. On other hosts, the paths may be missing.

        Raises:
            ConfigError: If `like` or an asset cannot be used as given.
            ExportError: If a path among the assets cannot be read.
        """
        if self.export is None or not (self._plans_export() or is_on_first_host()):
            return
        try:
            export_assets.look_at(self.export)
        except CheckpointError as error:
            if self.on_export_error == "raise":
                raise
            _log.warning("a checkpoint would have no export now: %s", error)

    @property
    def _subdir(self) -> str:
        return HFExport.subdir if self.export is None else self.export.place_subdir

    def _plans_export(self) -> bool:
        """Whether this rank is the coordinator, the only one that reads `like` and assets."""
        return not dist.is_initialized() or dist.get_rank(self.process_group) == 0


def _done(value: Any) -> Future[Any]:
    result: Future[Any] = Future()
    result.set_result(value)
    return result


class _Place(NamedTuple):
    """Where a save writes. Not the writer: what is staged must not keep the writer alive."""

    target: str
    """Path of the checkpoint."""
    subdir: str
    """Directory of the export within it."""
    report_to: tuple[ReportHook, ...]
    """Functions of the user that get the report of the save."""
    stores: StoreAccess
    """How to reach the store of a URL."""


def _attend(staged: StagedStateDict, lease: Lease, place: _Place) -> None:
    """Check the save of a staged state dict when it begins; guard it if a process runs it."""
    handover = lease.handover
    assert handover is not None
    target, subdir, report_to, stores = place
    staged.on_send = lambda: guard_process_save(
        lease, handover, target=target, subdir=subdir, stores=stores, report_to=report_to
    )
    world = handover.world
    if world is not None and world.size > 1:
        # The records of the ranks need the group, which may be gone when the save begins.
        MEETING.rendezvous_of(None if world.group is None else world.group())
        staged.on_save = lambda: check_world(lease, world, target=target)
        if world.group is not None:
            watch_pending(lease, world, target=target)


def _failed(lease: Lease, error: BaseException, place: _Place) -> StagedStateDict:
    """Return a state dict whose save raises the error that staging met."""
    failed = failed_state_dict(staging_error(error), lease)
    _attend(failed, lease, place)
    return failed


def _when_copied(staged: Staged, place: _Place) -> Future[Any]:
    """Return a future of the staged state dict; if a copy fails, of one with the error."""
    result: Future[Any] = Future()
    lease, copies = staged.lease, staged.copies
    # If no save takes up the lease, it ends when the state dict is freed. The writer keeps
    # `done`, and the result holds the state dict too: so `done` must drop both references.
    handed = [(result, staged.state_dict)]

    def done(copying: Future[None]) -> None:
        future, state_dict = handed.pop()
        error = copying.exception()
        # The planning step raises the error: here it would leave the other ranks waiting in a
        # collective.
        future.set_result(state_dict if error is None else _failed(lease, error, place))

    if copies is not None:
        copies.copying.add_done_callback(done)
    return result
