"""HFDualWriter: write a DCP checkpoint and a HuggingFace directory in one save. Wiring only."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dcp_hf_writer.errors import (
    CheckpointError,
    ConfigError,
    PlanningError,
)
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.mapping.flattening import with_states
from dcp_hf_writer.mapping.hf_export import HFExport
from dcp_hf_writer.plan import global_plan
from dcp_hf_writer.preflight import check_options, rank_facts
from dcp_hf_writer.preflight.check_export_place import export_place, stores_of
from dcp_hf_writer.preflight.check_placements import refuse_partial
from dcp_hf_writer.preflight.dry_run import DryRun, fresh_planner
from dcp_hf_writer.save import coordinator, export_assets
from dcp_hf_writer.save.announced_save import own_part, planned_target
from dcp_hf_writer.save.async_stager import SlabStager
from dcp_hf_writer.save.begin_save import begin_save
from dcp_hf_writer.save.choose_target import choose_target
from dcp_hf_writer.save.finish_phase import FinishPhase
from dcp_hf_writer.save.finished_save import as_report_hooks
from dcp_hf_writer.save.kept_plans import KEPT_PLANS
from dcp_hf_writer.save.mirror_jobs import wait_for_mirrors
from dcp_hf_writer.save.mirror_to import MirrorTo, as_mirror
from dcp_hf_writer.save.owner_process import new_save_id
from dcp_hf_writer.save.places_of_steps import PlacesOfSteps
from dcp_hf_writer.save.plan_save import plan_save
from dcp_hf_writer.save.planned_export import export_of, plan_or_leave_out
from dcp_hf_writer.save.posix_target import LocalOptions
from dcp_hf_writer.save.rank_progress import MEETING, Announcement
from dcp_hf_writer.save.save_context import Membership, RankView, SentFacts
from dcp_hf_writer.save.save_target import RankWrites, SaveTarget
from dcp_hf_writer.save.sent_export import PARCELS
from dcp_hf_writer.save.writer_saves import WriterSaves, tells
from dcp_hf_writer.staging.staged_state_dict import refuse_failed
from dcp_hf_writer.storage.output_place import check_output_place
from dcp_hf_writer.storage.store_urls import is_url
from dcp_hf_writer.storage.write_slots import WriteSlots
from dcp_hf_writer.torch_seam.caller_frames import Planned, find_save, other_planner
from dcp_hf_writer.torch_seam.plan_cache import PLAN_CACHE, is_from_cache, whole_plans
from dcp_hf_writer.torch_seam.save_world import SaveWorld

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import torch.distributed as dist
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

    from dcp_hf_writer.preflight.explanation import Explanation
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.finished_save import ReportHook
    from dcp_hf_writer.staging.stager import StagingMode

_log = logging.getLogger(__name__)


class HFDualWriter(StorageWriter, SlabStager):
    """Writes a DCP checkpoint and a HuggingFace directory from one staged copy, under one commit.

        future = dcp.async_save(state_dict, storage_writer=HFDualWriter("ckpt/step-100"))

    The save makes `ckpt/step-100`, which `dcp.load` reads, and `ckpt/step-100/hf`, which
    `from_pretrained` reads. If the save fails, neither becomes visible; if only the export fails,
    see `on_export_error`. Each rank writes its own slices of the final files.

    Works with `dcp.save`, with `no_dist=True`, and with both kinds of asynchronous checkpointer.
    Use one writer for all steps (pass `checkpoint_id=`), or make a new writer for each step.

    All ranks of a process group call it. Thread safety: a writer runs one save at a time. A second
    save waits for the first.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        export: HFExport | None = HFExport(),  # noqa: B008 - frozen
        weights: Literal["both", "once"] = "both",
        staging: StagingMode = "blocking",
        overwrite: bool = False,
        share: Literal["auto", "off"] = "auto",
        reuse: str | os.PathLike[str] | None = None,
        slots: WriteSlots = WriteSlots(),  # noqa: B008 - frozen
        dcp_writer: StorageWriter | None = None,
        process_group: dist.ProcessGroup | None = None,
        on_export_error: Literal["raise", "warn"] = "raise",
        storage_options: dict[str, Any] | None = None,
        strategy: Literal["auto", "direct", "exchange"] = "auto",
        timeout_s: float = 1800,
        host_budget_bytes: int = 256 << 20,
        report_to: ReportHook | Sequence[ReportHook] | None = None,
        mirror: str | MirrorTo | None = None,
        page_cache: Literal["newest", "all"] = "newest",
    ) -> None:
        """Set up a writer. Writes no file, and starts nothing.

        Args:
            path: Directory of the checkpoint, or a URL such as `s3://bucket/run/step-100`. It may
                exist; files in it that no save made stay. `file://` and `~` work too.
            export: Options of the HuggingFace half; `None` writes the DCP half only.
            weights: `"both"` stores the weights in both halves. `"once"` stores a weight only in
                the export if its bytes are the same there; `HFDualReader` reads such a checkpoint.
            staging: `"blocking"` returns from `async_save` when everything is copied. `"overlap"`
                copies during the next forward and backward, and needs `guard(optimizer)`.
            overwrite: Replace an existing checkpoint when this one is published; not on stores.
            share: `"auto"` lets both halves share disk blocks where the file system can (XFS,
                btrfs, ZFS): the disk then holds the weights once. `"off"` writes them twice.
            reuse: Path of an earlier checkpoint; bytes that it holds too are linked or cloned.
            slots: Limit on the number of processes of a node that write at the same time.
            dcp_writer: Writes the DCP half. `None` uses torch's writer without its extra copies.
            process_group: Process group of the save; pass the same group to `async_save`.
            on_export_error: If only the export fails and the DCP half holds all weights, the DCP
                half is committed. Then `"raise"` raises `ExportError`, `"warn"` logs a warning.
            storage_options: Options for the URLs, as fsspec takes them, such as credentials.
            strategy: `"direct"`: each rank writes its own bytes, on any file system. `"exchange"`:
                ranks send each other bytes, so that each aligned part of a file has one writer.
                `"auto"` exchanges if several hosts write and the file system may not be coherent.
                Else the ranks of a host write whole rows where they hold columns.
            timeout_s: Deadline of a save in seconds, from staging to commit.
            host_budget_bytes: Memory that a rank may use in addition to the staged copy.
            report_to: Function, or list of functions, that rank 0 calls with a `FinishedSave` at
                the end of each save, published or failed. An error of one is logged.
            mirror: URL of a store, or `MirrorTo(url, ...)`: where to upload the checkpoint from its
                local files, in the background, once it is committed.
            page_cache: `"newest"` drops older checkpoints from the page cache while a save writes.

        Raises:
            ConfigError: If an option cannot be used as given, or `like` is no model directory.
            ExportError: If a path among the assets cannot be read. With `on_export_error="warn"`,
                the writer logs this error and errors of `like` instead.
            StorageError: If the path or a parent of it is a file, or may not be written to.
        """
        super().__init__()
        options = locals()
        check_options.check_writer(options)
        self.export = export
        self.weights = weights
        self.staging = staging
        self.overwrite = overwrite
        self.share = share
        self.reuse = check_options.path_to_reuse(reuse)
        self.slots = slots
        self.dcp_writer = dcp_writer
        self.process_group = process_group
        self.on_export_error = on_export_error
        self.strategy = strategy
        self.timeout_s = timeout_s
        self.host_budget_bytes = host_budget_bytes
        self.page_cache = page_cache
        place = export_place(options)
        self._stores = stores_of(options, place)
        self.path = self._path_of(path)
        to = as_mirror(mirror, path=self.path, storage_options=storage_options)
        self._places = PlacesOfSteps(self.path, to, place)
        if not is_url(self.path):
            check_output_place(self.path)
        self.report_to = as_report_hooks(report_to)
        self._saves = WriterSaves()
        self._made_in = SaveWorld.at_staging(None, None)
        self._look_at_assets()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Wait for an earlier save of this writer, then take `checkpoint_id` as the path.

        Raises:
            ConfigError: If `checkpoint_id` is not a path that this writer can write to.
            StagingBusyError: If the earlier save is still running at its deadline.
        """
        try:
            self._saves.wait_for_earlier()
            if checkpoint_id is not None:
                path = self._path_of(checkpoint_id)
                self._places.of_step(path)
                self.path = path
            self._saves.set_target(self.path)
            self._saves.renew_save_id()
        except CheckpointError:
            # An attempt gives the staged copy back when it ends; this save never makes one.
            lease = self._pending_lease()
            if lease is not None:
                lease.release()
            raise

    def _path_of(self, given: str | os.PathLike[str]) -> str:
        path = check_options.target_path(given)
        check_options.check_for_target(path, self, self._stores.options)
        return self._stores.note(path)

    @property
    def checkpoint_id(self) -> str:
        """Path of the checkpoint, or its URL without credentials."""
        return self.path

    @property
    def save_id(self) -> str:
        """Id of the saves until `reset`; `.metadata` has that of the coordinator."""
        return self._saves.save_id

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a writer of this class can write to `checkpoint_id`."""
        try:
            check_options.target_path(checkpoint_id)
        except (ConfigError, TypeError):
            return False
        return True

    def storage_meta(self) -> StorageMeta:
        """Begin a save. torch calls this method first, in the thread that runs the save."""
        self._saves.wait_for_earlier()
        target = self._saves.take_target(self.path)
        attempt = begin_save(
            target,
            timeout_s=self.timeout_s,
            made_in=self._made_in,
            pending=self._pending_lease,
            report_to=self.report_to,
        )
        self._saves.begin(attempt)
        return StorageMeta(checkpoint_id=attempt.target, save_id=self.save_id)

    @tells
    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:  # noqa: FBT001 - torch's
        """Find the planner and the state dict of the save, and meet the other ranks.

        Raises:
            ConfigError: If the save runs with `use_collectives=False`.
            UnsupportedTorchError: If torch's planner for this save cannot be found.
            CheckpointError: What was wrong when the save began, such as a failed staging.
        """
        check_options.check_collectives(is_used=kwargs.get("use_collectives", True))
        attempt = self._current()
        if attempt.context.refusal is not None:
            raise attempt.context.refusal
        save = find_save()
        view = RankView.of(Planned.of(save.planner, save.given))
        refuse_partial(view.planned.state_dict, phase="plan")
        attempt.see(view)
        rendezvous = MEETING.rendezvous_of(save.group) if save.is_distributed else None
        member = Membership.of(save.ranks, is_coordinator, rendezvous, MEETING.next_count())
        attempt.enter(member)
        planner = save.planner
        PLAN_CACHE.begin_plan(planner, view.tied())
        # Not a method of `save`: that would keep torch's `distW`, whose end is the end of the save.
        attempt.at_end(lambda: PLAN_CACHE.end_plan(planner))

    @tells
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Attach facts to DCP's plan that only this rank can tell.

        Raises:
            PlanningError: If the plan leaves out data of this rank, which DCP would then lose.
        """
        attempt = self._current()
        refuse_failed(item.index.fqn for item in plan.items)
        PLAN_CACHE.check_sent(plan, attempt.view.planned.planner)
        names = rank_facts.names_of_ties(attempt.view, self.export)
        facts = rank_facts.local_facts(
            plan,
            attempt.view,
            target=attempt.target,
            is_coordinator=attempt.member.is_coordinator,
            export=self.export,
            group=self.process_group,
            names=names,
            weights=self.weights,
        )
        facts = KEPT_PLANS.with_digest(facts, plan, attempt.view.planned.planner, rank=attempt.rank)
        error = rank_facts.export_fault(attempt.view, self.export, names, rank=attempt.rank)
        if error is not None:
            attempt.leave_out_export(error)
        attempt.send(SentFacts(facts.stamp, None if plan.usable else facts.samples))
        reach("local plan")
        return replace(plan, storage_data=facts)

    @tells
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Plan the export, and make the directory with headers and assets (coordinator only).

        A failure leaves no files behind.

        Raises:
            ConfigError: If the save runs with `use_collectives=False`.
            PlanningError: If the plans of the ranks are not this save's.
            CoverageError: If the ranks' parts do not cover a tensor of the model exactly once.
            StorageError: If the target or the file system does not allow the save.
        """
        attempt = self._current()
        attempt.check()
        check_options.check_collectives(is_used=len(plans) == attempt.member.world_size)
        rank_facts.check_targets(plans, attempt.target)
        rank_facts.check_same_options(plans)
        if len(plans) == 1:
            attempt.save_alone()
        export, assets = export_of(self.export, attempt, self._assets_of)
        whole = whole_plans(plans, attempt.view.planned.planner)
        is_cached = is_from_cache(whole)
        if not is_cached:
            rank_facts.check_facts(whole)
        untrue = None if export is None else rank_facts.untrue_tie_of_ranks(whole)
        if untrue is not None:
            attempt.leave_out_export(untrue)
        known, result = plan_or_leave_out(self._plan, whole, export, assets, attempt)
        files = coordinator.export_files(known.layout, assets, export)
        target = self._target_of(new_save_id())
        with attempt.timed("prepare"):
            try:
                target.make(attempt, overwrite=self.overwrite, new_files=files)
                is_ready = target.make_export(known, assets, attempt, subdir=self._subdir)
            except BaseException:
                attempt.clean_up()
                raise
        if not is_ready:
            known, result = self._plan(whole, None, None)
        attempt.plan(known, are_facts_checked=not is_cached)
        member = attempt.member
        if member.rendezvous is not None:
            told = target.told()
            announcement = Announcement(target.save_id, known.plan_id, member.count, told)
            member.rendezvous.announce(attempt.target, announcement)
        return plans if result is None else result

    def _target_of(self, save_id: str, told: Mapping[str, Any] | None = None) -> SaveTarget:
        attempt = self._current()
        places = self._places.of_step(attempt.target)
        local = LocalOptions.of(self, places.mirror)
        return choose_target(
            attempt,
            save_id,
            self._stores,
            local,
            told,
            host_budget_bytes=self.host_budget_bytes,
            export_at=places.export,
        )

    def _plan(
        self, whole: list[SavePlan], export: HFExport | None, assets: export_assets.Assets | None
    ) -> tuple[global_plan.GlobalPlan, list[SavePlan] | None]:
        return plan_save(
            self._current(),
            whole,
            export,
            assets,
            dcp_writer=self.dcp_writer,
            weights=self.weights,
        )

    @tells
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of both halves; the files are durable on return.

        Raises:
            CheckpointError: If the DCP half failed on this rank, or if the save was given up.
        """
        attempt = self._current()
        attempt.check_world()
        attempt.seconds.setdefault("plan", time.monotonic() - attempt.context.began)
        try:
            if attempt.view.planned.planner is not planner:
                raise other_planner("save", rank=attempt.rank)  # noqa: TRY301 - others must hear
            PLAN_CACHE.end_plan(planner)
            own = own_part(plan, rank=attempt.rank)
            target = planned_target(attempt, own, self._target_of)
            attempt.post("write")
            target.check_visible(attempt)
            global_plan.check_tied(own.tied, attempt.view.memory, rank=attempt.rank)
            bare = replace(plan, storage_data=own.dcp)
            results = target.write(
                attempt, RankWrites(bare, own, planner, self._subdir, self.host_budget_bytes)
            )
            PLAN_CACHE.settle_plan(attempt.global_plan)
            attempt.check()
            reach("before report")
        except BaseException:
            attempt.post("failed")
            if attempt.member.rendezvous is None:
                attempt.clean_up()
            raise
        attempt.post("written")
        target.end_news(attempt)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    @tells
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that the files are complete, and publish the checkpoint (coordinator only).

        Raises:
            CoverageError: If the parts that the ranks wrote do not cover each file exactly once.
            StorageError: If the checkpoint could not be published.
            ExportError: If the DCP half was committed and the export failed.
        """
        attempt = self._current()
        attempt.check_world()
        attempt.begin_finish()
        try:
            error = FinishPhase(
                attempt=attempt,
                export=self.export,
                subdir=self._subdir,
                overwrite=self.overwrite,
                save_id=self.save_id,
                check_facts=rank_facts.check_reported_facts,
            ).run(metadata, results)
        finally:
            attempt.clean_up()
            attempt.withdraw()
        reach("before reply")
        if error is not None:
            if self.on_export_error == "raise":
                raise error
            _log.warning("a checkpoint has no export: %s", error)

    def wait_for_mirror(self, timeout_s: float | None = None) -> None:
        """Wait until the mirror of the writer's path is published, once its save is over.

        Returns at once if no mirror is unfinished. Any rank may call it; the others need not.

        Args:
            timeout_s: How long to wait, in seconds; `None` for the deadline of the upload.

        Raises:
            CheckpointError: What kept the mirror from being published.
            SaveTimeoutError: If it is not published in time.
        """
        mirror = self._places.mirror
        if mirror is not None:
            wait_s = mirror.timeout_s if timeout_s is None else timeout_s
            wait_for_mirrors(self.path, timeout_s=wait_s)

    def explain(
        self, state_dict: dict[str, Any], *, planner: SavePlanner | None = None
    ) -> Explanation:
        """Explain what a save would write, where, and what it would leave out. Writes nothing.

        All ranks of the process group call it, with no save in flight. All get the same result;
        `print` it to see tables. The tensors may be on the meta device.

        Args:
            state_dict: The state dict that the save would get.
            planner: Planner of the save. It stays unchanged: a copy makes the plan.

        Raises:
            PlanningError: If the save would raise it too.
            StagingBusyError: If an earlier save of this writer is still running at its deadline.
        """
        self._saves.wait_for_earlier()
        run = DryRun(self.path, self.export, self.process_group, fresh_planner(planner), self._once)
        return run.run(with_states(state_dict))

    @property
    def _once(self) -> bool:
        return self.weights == "once"

    def _current(self) -> Attempt:
        if self._saves.current() is None:
            self.storage_meta()
        attempt = self._saves.current()
        if attempt is None:
            msg = "this writer has no save in flight"
            raise PlanningError(msg, path=self.path)
        return attempt

    def __getstate__(self) -> dict[str, Any]:
        """Pickle for a checkpointer process, with the export's files instead of its objects."""
        # The parent of a checkpointer process reports its saves.
        state = {**self.__dict__, "report_to": ()}
        if self.export is not None:
            sent, assets, error = export_assets.to_send(self.export, self._assets_error)
            state["export"] = PARCELS.parcel(self.export, sent, assets)
            state["_assets_error"] = error
        for name in ("process_group", "_copies", "_lease"):
            state[name] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle in a checkpointer process, which saves with its default process group."""
        self.__dict__.update(state)
        sent = state["export"]
        if sent is not None:
            self.export = sent.export
            if sent.assets is not None:
                export_assets.preset(sent.export, sent.assets)
