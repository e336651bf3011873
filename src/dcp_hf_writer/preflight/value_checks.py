"""Check on this rank that each tensor and value can be saved, and each weight exported."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.errors import ExportError, ModelKeyError, PlanningError
from dcp_hf_writer.mapping.spec_match import model_names
from dcp_hf_writer.preflight.digest_values import digest_value
from dcp_hf_writer.staging.take_apart import storage_fault
from dcp_hf_writer.torch_seam.dtensor import local_of
from dcp_hf_writer.torch_seam.tensor_forms import is_whole_form

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dcp_hf_writer.errors import StagingError
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.torch_seam.caller_frames import Planned


def check_tensors(planned: Planned) -> None:
    """Check that each tensor of this rank can be saved.

    Raises:
        StagingError: If one cannot. A synchronous save stages nothing, and refuses the same.
    """
    for fault in storage_faults(planned, on_meta=False):
        raise fault


def storage_faults(planned: Planned, *, on_meta: bool) -> Iterator[StagingError]:
    """Yield why tensors cannot be saved, one error for each.

    Args:
        planned: What this rank plans to save.
        on_meta: Whether tensors without data are allowed, as in a dry run.
    """
    for fqn, value in planned.state_dict.items():
        if isinstance(value, torch.Tensor):
            fault = storage_fault(planned.path_of(fqn), value, on_meta=on_meta)
            if fault is not None:
                yield fault


def pickle_faults(planned: Planned) -> Iterator[PlanningError]:
    """Yield why values that are no tensors cannot be saved, one error for each.

    Args:
        planned: What this rank plans to save.
    """
    for fqn, value in planned.state_dict.items():
        if isinstance(value, torch.Tensor) or digest_value(value, []) is not None:
            continue
        try:
            # As DCP stores a value.
            torch.save(value, io.BytesIO())
        except Exception as error:  # noqa: BLE001 - `__reduce__` of any class may raise anything
            yield PlanningError(
                "a value cannot be pickled",
                phase="plan",
                fqn=fqn,
                expected="a value that torch.save can store",
                found=f"{type(value).__name__}: {error}",
                hint="leave it out of the state dict, or save its state instead",
            )


def encoded_weight(planned: Planned, export: HFExport, *, rank: int) -> ExportError | None:
    """Return why a weight cannot be exported: its class encodes its values (8-bit, quantised).

    Args:
        planned: What this rank plans to save.
        export: Options of the export.
        rank: This rank.
    """
    tensors = planned.paths_of_tensors()
    encoded = [fqn for fqn in tensors if is_whole_form(planned.state_dict[fqn])]
    if not encoded:
        return None
    try:
        names = model_names(tensors, key=export.key)
    except ModelKeyError:
        # Global planning finds the same, and says so.
        return None
    for fqn in encoded:
        if fqn in names:
            local = local_of(planned.state_dict[fqn])
            return ExportError(
                "a weight of this kind cannot be exported",
                rank=rank,
                phase="plan",
                fqn=fqn,
                expected="a tensor whose memory holds its values",
                found=f"{type(local).__name__}, {local.dtype}"
                + (", quantised" if local.is_quantized else ""),
                hint="only the DCP half can store it; dequantise it in the state dict, or pass "
                "export=None",
            )
    return None
