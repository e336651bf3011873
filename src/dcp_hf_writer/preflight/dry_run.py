"""A dry run of a save: it plans with the same functions as a save, and writes no bytes.

It stages nothing and does not touch the target's storage.
"""

from __future__ import annotations

import copy
import socket
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType

from dcp_hf_writer.digests.digest_sweep import extent_of
from dcp_hf_writer.errors import CoverageError, PlanningError
from dcp_hf_writer.formats.names_on_disk import INDEX_NAME
from dcp_hf_writer.plan.global_plan import GlobalPlan, RankPlan, plan_globally, rank_plans
from dcp_hf_writer.preflight.explanation import Explanation
from dcp_hf_writer.preflight.explanation_rows import FileSum, RankSum, Row, left_out
from dcp_hf_writer.preflight.rank_facts import (
    check_facts,
    export_fault,
    local_facts,
    names_of_ties,
    untrue_tie_of_ranks,
)
from dcp_hf_writer.preflight.value_checks import pickle_faults, storage_faults
from dcp_hf_writer.save.coordinator import export_files
from dcp_hf_writer.save.export_assets import assets_of
from dcp_hf_writer.save.hf_half import regions_by_file, way_of
from dcp_hf_writer.save.planned_export import unplanned_export
from dcp_hf_writer.save.save_context import RankView
from dcp_hf_writer.save.tensor_bytes import TensorSource, chunk_of
from dcp_hf_writer.tensors.dtypes import NAME_BY_TORCH
from dcp_hf_writer.tensors.strided_copies import hf_box
from dcp_hf_writer.torch_seam.caller_frames import Planned
from dcp_hf_writer.torch_seam.dtensor import local_of
from dcp_hf_writer.torch_seam.future_guard import own_error
from dcp_hf_writer.torch_seam.plan_cache import without_cache
from dcp_hf_writer.torch_seam.planning_collectives import steps_of
from dcp_hf_writer.torch_seam.tensor_forms import is_whole_form, plain_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.layout import Layout
    from dcp_hf_writer.plan.planned_tensors import PlannedTensor
    from dcp_hf_writer.plan.regions import Region


@dataclass(frozen=True, slots=True)
class _Local:
    """What one rank contributes to the explanation."""

    rows: list[Row]
    total: RankSum
    error: ExportError | None
    """Why the checkpoint would have no export."""
    refusals: tuple[str, ...]
    """Why the save would be refused on this rank."""


@dataclass(slots=True)
class DryRun:
    """A dry run on one rank."""

    path: str
    export: HFExport | None
    group: dist.ProcessGroup | None
    planner: SavePlanner
    """A planner that no save uses (`fresh_planner`)."""
    is_once: bool
    """Whether only the export stores the weights (`weights="once"`)."""
    _rank: int = field(init=False)
    _is_coordinator: bool = field(init=False)
    _view: RankView = field(init=False)
    _error: ExportError | None = field(init=False, default=None)
    """Why the checkpoint would have no export, as far as this rank knows."""
    _plan: GlobalPlan | None = field(init=False, default=None)
    """The global plan; only the coordinator has it."""
    _files: Mapping[str, str] | None = field(init=False, default=None)
    """File name of each key in `like`; only the coordinator has it."""

    def run(self, state_dict: Mapping[str, Any]) -> Explanation:
        """Plan a save, and gather what each rank would write (collective: all ranks call it).

        Raises:
            CheckpointError: If planning fails; every rank raises what the save would raise.
        """
        ranks = steps_of(self.group)
        self._rank, self._is_coordinator = ranks.rank, ranks.is_coordinator
        try:
            plan = ranks.reduce_scatter(
                "plan", lambda: self._plan_local(state_dict), self._plan_all
            )
            return ranks.all_reduce("explain", lambda: self._explain_local(plan), self._explain_all)
        except CheckpointException as error:
            own = own_error(error)
            if own is None:
                raise
            raise own from error

    def _plan_local(self, state_dict: Mapping[str, Any]) -> SavePlan:
        self.planner.set_up_planner(
            state_dict=dict(state_dict),
            storage_meta=StorageMeta(checkpoint_id=self.path),
            is_coordinator=self._is_coordinator,
        )
        plan = self.planner.create_local_plan()
        view = self._view = RankView.of(Planned.of(self.planner, state_dict))
        names = names_of_ties(view, self.export)
        facts = local_facts(
            plan,
            view,
            target=self.path,
            is_coordinator=self._is_coordinator,
            export=self.export,
            group=self.group,
            names=names,
            is_dry_run=True,
        )
        self._error = export_fault(view, self.export, names, rank=self._rank)
        return replace(plan, storage_data=facts)

    def _plan_all(self, plans: list[SavePlan]) -> list[SavePlan]:
        found, _ = self.planner.create_global_plan(plans)
        check_facts(found)
        self._error = self._error or untrue_tie_of_ranks(found)
        try:
            plan = self._plan_both(found)
        except CoverageError:
            raise
        except Exception as error:  # noqa: BLE001 - the save would report it, whatever it is
            self._error = self._error or unplanned_export(error, rank=self._rank)
            plan = plan_globally(found, None, options="", file_of_key=None)
        self._plan = plan
        return rank_plans(plan, [replace(one, storage_data=None) for one in found])

    def _plan_both(self, found: list[SavePlan]) -> GlobalPlan:
        if self.export is None:
            return plan_globally(found, None, options="", file_of_key=None)
        assets = assets_of(self.export)
        self._files = files = assets.file_of_key
        export = _without_expectations(self.export)

        def planned(file_of_key: Mapping[str, str] | None) -> GlobalPlan:
            return plan_globally(
                found,
                export,
                options="",
                file_of_key=file_of_key,
                architecture=assets.architecture,
                once=self.is_once,
            )

        # If the index of `like` lacks some keys, the explanation shows those keys, and the files
        # are those of an export without `like`.
        plan = planned(None)
        if files is not None and set(_keys(plan.layout)) <= files.keys():
            plan = planned(files)
        export_files(plan.layout, assets, export)
        return plan

    def _explain_local(self, plan: SavePlan) -> _Local:
        own: RankPlan = plan.storage_data
        source, names = TensorSource(self.planner), [name for name, _ in own.files]
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        work = regions_by_file(tensors, own.targets)
        rows = [
            self._row(item, region, names, source)
            for _, blocks in sorted(work.items())
            for item, region in blocks
            if _is_plain(self._view.planned.state_dict.get(item.index.fqn))
        ]
        kept = [item for item in tensors if item.index.fqn not in own.once]
        total = RankSum(
            rank=self._rank,
            host=socket.gethostname(),
            dcp_nbytes=sum(map(_item_nbytes, kept)),
            dcp_tensors=len(kept),
            values=len(plan.items) - len(tensors),
            hf_nbytes=sum(row.nbytes for row in rows),
            blocks=len(rows),
            files=len(work),
        )
        planned = self._view.planned
        faults = (*storage_faults(planned, on_meta=True), *pickle_faults(planned))
        return _Local(rows, total, self._error, tuple(map(str, faults)))

    def _row(
        self, item: WriteItem, region: Region, files: Sequence[str], source: TensorSource
    ) -> Row:
        chunk, target, runs = chunk_of(item), region.target, region.hf_runs()
        box = hf_box(region.copy)
        tensor = self._as_staged(item, source.tensor(item))
        return Row(
            fqn=item.index.fqn,
            shape=tuple(item.tensor_data.size) if item.tensor_data is not None else (),
            dtype=NAME_BY_TORCH[tensor.dtype],
            rank=self._rank,
            chunk_offsets=chunk.offsets,
            chunk_sizes=chunk.sizes,
            key=target.key,
            hf_shape=target.shape,
            hf_dtype=target.dtype,
            hf_offsets=region.copy.hf_start,
            hf_sizes=None if box is None else box.sizes,
            file=files[target.file],
            start=runs.start,
            stop=runs.start + extent_of(runs),
            runs=runs.count,
            run_nbytes=runs.nbytes,
            way=way_of(tensor, region),
        )

    def _as_staged(self, item: WriteItem, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor with the strides that `way_of` sees in a save.

        Staging makes a whole local tensor contiguous, so this returns an empty contiguous tensor
        for one that is not. A block of a local tensor keeps its strides.
        """
        held = self._view.planned.state_dict.get(item.index.fqn)
        local = local_of(held) if isinstance(held, torch.Tensor) else None
        if tensor.is_contiguous() or local is None or local.shape != tensor.shape:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def _explain_all(self, found: list[_Local]) -> Explanation:
        if self._plan is None:
            msg = "the coordinator made no global plan"
            raise PlanningError(msg, phase="plan", path=self.path)
        plan, export = self._plan, self.export
        errors: list[object] = [one.error for one in found if one.error is not None]
        if export is not None and plan.layout is None and not errors:
            errors.append("the state dict holds no weights")
        keys = set(_keys(plan.layout))
        wanted = None if export is None else export.expect_keys
        expected = set(wanted if wanted is not None else self._files or keys)
        missing, unexpected = expected - keys, keys - expected
        values = {
            item.index.fqn: None
            for one in plan.plans
            for item in one.items
            if item.type == WriteItemType.BYTE_IO
        }
        return Explanation(
            path=self.path,
            entry=".".join(map(str, plan.entry)),
            rows=_in_order(plan, [row for one in found for row in one.rows]),
            files=tuple(_file_sums(plan.layout)),
            ranks=tuple(one.total for one in found),
            left_out=tuple(left_out(plan, _ordered(plan), values, export)),
            stored_once=tuple(plan.once),
            missing_keys=tuple(sorted(missing)),
            unexpected_keys=tuple(sorted(unexpected)),
            problems=(
                *(f"the save would be refused: {text}" for one in found for text in one.refusals),
                *_problems(errors, missing if wanted is not None else set(), unexpected),
            ),
        )


def fresh_planner(planner: SavePlanner | None) -> SavePlanner:
    """Return a planner that plans like the given one, and keeps nothing for a later save."""
    if planner is None:
        return DefaultSavePlanner()
    return without_cache(planner)


def _without_expectations(export: HFExport) -> HFExport:
    # The names stay declared: they tell a wrapper's prefix from a name of the model.
    names = export.declared_names
    relaxed = copy.copy(export)
    object.__setattr__(relaxed, "expect_keys", None)
    object.__setattr__(relaxed, "declared_names", names)
    return relaxed


def _is_plain(value: Any) -> bool:
    """Whether the export stores a value as it is; what a planner makes of others is plain."""
    if not isinstance(value, torch.Tensor):
        return True
    plain = plain_of(value)
    return not is_whole_form(value) if plain is None else plain.layout is torch.strided


def _keys(layout: Layout | None) -> list[str]:
    return [] if layout is None else [key for file in layout.files for key in file.keys]


def _item_nbytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else chunk_of(item).numel * data.properties.dtype.itemsize


def _ordered(plan: GlobalPlan) -> dict[str, PlannedTensor]:
    """Return the tensors of a plan in state-dict order."""
    orders = (one.storage_data.order for one in plan.plans)
    order = next((found for found in orders if found is not None), ())
    first = [fqn for fqn in dict.fromkeys(order) if fqn in plan.tensors]
    return {fqn: plan.tensors[fqn] for fqn in dict.fromkeys((*first, *plan.tensors))}


def _in_order(plan: GlobalPlan, rows: Iterable[Row]) -> tuple[Row, ...]:
    """Sort rows by the order of the state dict, then of the specs, then of the bytes."""
    targets = {} if plan.layout is None else plan.layout.targets
    names = ((fqn, target.key) for fqn in _ordered(plan) for target in targets.get(fqn, ()))
    place = {name: i for i, name in enumerate(names)}
    return tuple(sorted(rows, key=lambda row: (place[row.fqn, row.key], row.start, row.rank)))


def _file_sums(layout: Layout | None) -> Iterator[FileSum]:
    if layout is None:
        return
    for file in layout.files:
        yield FileSum(file.name, file.nbytes, len(file.keys), len(file.header))
    if layout.index is not None:
        yield FileSum(INDEX_NAME, len(layout.index), 0, 0)


def _problems(errors: Iterable[object], missing: set[str], unexpected: set[str]) -> Iterator[str]:
    for error in errors:
        yield f"the checkpoint would have no export: {error}"
    if missing or unexpected:
        yield (
            "the save would be refused: the export would not have the expected keys, "
            f"{len(missing):,} missing and {len(unexpected):,} not expected"
        )
