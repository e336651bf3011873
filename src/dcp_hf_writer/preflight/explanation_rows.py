"""The parts of a dry run's result: blocks, files, ranks, and what the export leaves out.

Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.mapping.model_entry import why_left_out
from dcp_hf_writer.plan.weights_once import is_whole
from dcp_hf_writer.tensors.dtypes import NAME_BY_TORCH
from dcp_hf_writer.tensors.strided_copies import covered, runtime_loops

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Literal

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.plan.layout import PartTarget
    from dcp_hf_writer.plan.planned_tensors import PlannedTensor
    from dcp_hf_writer.tensors.boxes import Shape

    Way = Literal["direct", "cast", "strided"]
    Why = Literal["beside", "value", "tied", "padding", "unmapped", "spec"]


@dataclass(frozen=True, slots=True)
class Row:
    """One block that one rank writes into one output file."""

    fqn: str
    """FQN of the runtime tensor that the block comes from."""
    shape: Shape
    """Shape of the whole runtime tensor."""
    dtype: str
    """Dtype of the runtime tensor, as safetensors names it."""
    rank: int
    """Rank that writes the block, within the process group of the save."""
    chunk_offsets: Shape
    """First index of this rank's chunk of the runtime tensor per dimension, in elements."""
    chunk_sizes: Shape
    """Extents of that chunk, in elements."""
    key: str
    """HuggingFace name of the tensor that the block goes to."""
    hf_shape: Shape
    """Shape of the whole HuggingFace tensor."""
    hf_dtype: str
    """Dtype of the HuggingFace tensor on disk."""
    hf_offsets: Shape
    """Index of the block's first element in the HuggingFace tensor."""
    hf_sizes: Shape | None
    """Extents of the block in the HuggingFace tensor; `None` for a block with gaps."""
    file: str
    """Name of the output file."""
    start: int
    """First byte of the block in that file."""
    stop: int
    """One past the last byte of the block; other blocks may lie between its runs."""
    runs: int
    """Number of runs of consecutive bytes."""
    run_nbytes: int
    """Length of each run, in bytes."""
    way: Way
    """How the bytes get into the file. `direct`: from the staged copy, unchanged. `cast`: through
    the bounce buffer, which changes the dtype. `strided`: through the bounce buffer, which brings
    the elements into the order of the file, for example for a transpose."""

    @property
    def nbytes(self) -> int:
        """Number of bytes in the block."""
        return self.runs * self.run_nbytes


@dataclass(frozen=True, slots=True)
class FileSum:
    """One output file."""

    name: str
    """File name within the export directory."""
    nbytes: int
    """Size of the whole file, in bytes."""
    tensors: int
    """Number of tensors in the file; 0 for the index."""
    header_nbytes: int
    """Bytes before the tensor data; 0 for the index."""


@dataclass(frozen=True, slots=True)
class RankSum:
    """What one rank writes in total."""

    rank: int
    """Rank within the process group of the save."""
    host: str
    """Host name of the rank."""
    dcp_nbytes: int
    """Bytes of tensor data in the DCP half, without the archives around the data."""
    dcp_tensors: int
    """Number of tensors, or blocks of tensors, in the DCP half."""
    values: int
    """Number of other values in the DCP half; their size is unknown."""
    hf_nbytes: int
    """Bytes in the export."""
    blocks: int
    """Number of blocks in the export."""
    files: int
    """Number of output files that the blocks lie in."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part of the state dict that only the DCP half holds."""

    fqn: str
    """FQN in the state dict."""
    why: Why
    """Why the export does not hold it. `beside`: in an entry beside the model. `value`: not a
    tensor. `tied`: a tied name. `padding`: padding. `unmapped`: in no piece of its spec. `spec`:
    its spec leaves it out."""
    reason: str
    """The same in words, with names."""
    shape: Shape | None
    """Shape of the whole runtime tensor; `None` for a value that is not a tensor."""
    dtype: str | None
    """Dtype of the tensor, as safetensors names it; torch's name if safetensors has none."""
    elements: int
    """Number of elements that the export does not hold."""
    nbytes: int
    """Bytes of those elements; 0 for a value that is not a tensor."""


def left_out(
    plan: GlobalPlan,
    tensors: Mapping[str, PlannedTensor],
    values: Iterable[str],
    export: HFExport | None,
) -> Iterator[LeftOut]:
    """Yield what the export leaves out, and why; yields nothing if there is no export.

    Args:
        plan: The global plan.
        tensors: Every tensor of the plans, by FQN, in state-dict order.
        values: FQNs of values that are not tensors.
        export: Options of the export; `None` without one.
    """
    layout = plan.layout
    if export is None or layout is None:
        return
    for fqn, tensor in tensors.items():
        shape, dtype = tuple(tensor.data.size), tensor.data.properties.dtype
        parts = layout.targets.get(fqn, ())
        elements = _missing(parts, shape)
        if parts and not elements:
            continue
        name = plan.names.get(fqn)
        why: Why = "beside"
        reason = f"{why_left_out(tensor.path, plan.entry)} is not part of the model"
        if name is not None:
            spec = export.spec_by_fqn.get(name)
            why, reason = _why(name, spec, layout.tied, is_partial=bool(parts))
        known = NAME_BY_TORCH.get(dtype, str(dtype))
        yield LeftOut(fqn, why, reason, shape, known, elements, elements * dtype.itemsize)
    for fqn in values:
        yield LeftOut(fqn, "value", "not a tensor", None, None, 0, 0)


def _missing(parts: Iterable[PartTarget], shape: Shape) -> int:
    """Count the elements of a runtime tensor that no part covers."""
    copies = [copy for part in parts for copy in part.copies]
    if is_whole(copies, shape):
        return 0
    return math.prod(shape) - covered([(c.start, runtime_loops(c)) for c in copies], shape)


def _why(
    name: str, spec: LoadSpec | None, tied: Mapping[str, str], *, is_partial: bool
) -> tuple[Why, str]:
    if name in tied:
        return "tied", f"tied to {tied[name]!r}"
    keys = () if spec is None else spec.hf_keys
    dropped = [key for key in keys if key in tied]
    if dropped:
        return "tied", f"its {dropped[0]!r} is tied to {tied[dropped[0]]!r}"
    if spec is None or not is_partial:
        return "spec", "its spec leaves it out"
    if spec.origin_shape != spec.global_shape:
        return "padding", f"padding beyond {list(spec.origin_shape)}"
    return "unmapped", "in no piece of its spec"
