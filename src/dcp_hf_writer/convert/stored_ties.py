"""Compare the stored tensors that are declared to be tied, before an export leaves one out.

A tie can drift: FSDP2 keeps it only within one group, so a trainer may have trained two separate
tensors although the config says that they are one. An export of only one of them would serve
another model than the trained one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.formats.parse_dcp_metadata import paths_in
from dcp_hf_writer.mapping.spec_match import model_names
from dcp_hf_writer.mapping.tied_names import declared_ties
from dcp_hf_writer.tensors.boxes import whole
from dcp_hf_writer.tensors.row_major_parts import row_major_parts

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

    from dcp_hf_writer.convert.stored_tensors import DCPTensors
    from dcp_hf_writer.mapping.hf_export import HFExport

_PART_NBYTES = 16 << 20
"""Bytes of each of the two tensors that are compared at a time."""


def refuse_drifted_ties(
    path: str, tensors: DCPTensors, metadata: Metadata, export: HFExport
) -> None:
    """Refuse tensors that are declared to be tied, and are stored with different values.

    Tensors are read only if the checkpoint holds both of a tie.

    Args:
        path: The checkpoint, for the error.
        tensors: Its tensors.
        metadata: Its metadata.
        export: Options of the export, which declare the ties.

    Raises:
        PlanningError: If there are such tensors; names the first one.
        ReadError: If a file cannot be read.
        CorruptCheckpointError: If a file contradicts the metadata.
    """
    known = paths_in(metadata)
    paths = {fqn: tuple(known.get(fqn, (fqn,))) for fqn in tensors.kinds}
    names = model_names(paths, key=export.key, wanted=export.declared_names)
    fqn_of = {name: fqn for fqn, name in names.items()}
    for drop, keep in declared_ties(export, fqn_of):
        one, other = fqn_of.get(drop), fqn_of.get(keep)
        if one is None or other is None or _are_equal(tensors, one, other):
            continue
        raise PlanningError(
            "tensors that are declared to be tied are stored with different values",
            phase="plan",
            path=path,
            fqn=one,
            expected=f"the values of {other!r}, because the export keeps only those",
            found="two tensors that were trained apart",
            hint="to export both, set tie_word_embeddings to false in the config, "
            "or leave tied and alias_of out of the options",
        )


def _are_equal(tensors: DCPTensors, one: str, other: str) -> bool:
    """Whether two stored tensors have equal bytes; planning refuses those of different shapes."""
    kind = tensors.kinds[one]
    if kind.shape != tensors.kinds[other].shape:
        return True
    if kind.dtype != tensors.kinds[other].dtype:
        return False
    for box in row_major_parts(whole(kind.shape), max(1, _PART_NBYTES // kind.dtype.itemsize)):
        parts = [torch.empty(box.sizes, dtype=kind.dtype, device="cpu") for _ in range(2)]
        for name, part in zip((one, other), parts, strict=True):
            tensors.read(name, box, part)
        # Compare bytes: NaN is not equal to itself.
        left, right = (part.reshape(-1).view(torch.uint8) for part in parts)
        if not torch.equal(left, right):
            return False
    return True
