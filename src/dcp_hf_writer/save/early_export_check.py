"""Tell before the first save that a checkpoint would have no export."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.mapping.architecture import check_fit
from dcp_hf_writer.mapping.flattening import flat_tensors
from dcp_hf_writer.plan.assign_hf_keys import RuntimeTensor
from dcp_hf_writer.plan.global_plan import (
    holds_nothing_to_export,
    left_out_by,
    names_for_export,
    shapes_of,
)
from dcp_hf_writer.plan.layout import plan_layout
from dcp_hf_writer.save.planned_export import unplanned_export
from dcp_hf_writer.staging.same_memory import memory_of, tied_groups
from dcp_hf_writer.tensors.boxes import Box
from dcp_hf_writer.tensors.dtypes import safetensors_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.save.export_assets import Assets

_log = logging.getLogger(__name__)


def warn_without_export(
    state_dict: Mapping[str, Any], export: HFExport, assets: Assets, *, world_size: int
) -> None:
    """Log a warning if a save of this state dict would have no export (coordinator).

    With several ranks this looks at the coordinator's own tensors only, and not for missing ones:
    another rank may hold them. `explain` asks all ranks.

    Args:
        state_dict: The state dict that will be saved.
        export: Options of the export.
        assets: Its assets.
        world_size: Number of ranks of the save.
    """
    try:
        tensors = flat_tensors(state_dict)
        paths = {fqn: path for fqn, (path, _) in tensors.items()}
        if holds_nothing_to_export(paths, export):
            _log.warning("a checkpoint would have no export: the state dict holds no weights")
            return
        held = {fqn: tensor for fqn, (_, tensor) in tensors.items()}
        shapes = {fqn: tuple(tensor.shape) for fqn, tensor in held.items()}
        _, names = names_for_export(paths, shapes, export, assets.architecture)
        if world_size == 1:
            _plan_alone(held, names, export, assets)
        else:
            _look_at_own(held, names, export, assets)
    except Exception as error:  # noqa: BLE001 - whatever it is, the save would meet it too
        _log.warning("a checkpoint would have no export: %s", unplanned_export(error))


def _plan_alone(
    tensors: Mapping[str, torch.Tensor], names: Mapping[str, str], export: HFExport, assets: Assets
) -> None:
    runtime = [
        RuntimeTensor(fqn, name, shape, tensors[fqn].dtype, (Box((0,) * len(shape), shape),))
        for fqn, name in names.items()
        for shape in [tuple(tensors[fqn].shape)]
    ]
    tied = tied_groups(memory_of(tensors))
    layout = plan_layout(runtime, export, tied=tied, file_of_key=assets.file_of_key)
    if assets.architecture is not None:
        check_fit(shapes_of(layout), left_out_by(export), layout.tied, assets.architecture)


def _look_at_own(
    tensors: Mapping[str, torch.Tensor], names: Mapping[str, str], export: HFExport, assets: Assets
) -> None:
    for fqn in names:
        safetensors_name(tensors[fqn].dtype, fqn=fqn)
    if assets.architecture is None or export.spec_by_fqn:
        return
    others = frozenset(name for keys in assets.architecture.key_sets for name in keys.required)
    shapes = {name: tuple(tensors[fqn].shape) for fqn, name in names.items()}
    check_fit(shapes, others, {}, assets.architecture)
