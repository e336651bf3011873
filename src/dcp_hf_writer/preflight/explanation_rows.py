"""What a dry run finds: blocks, files, ranks, and what is left out.

Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.mapping.spec_match import model_names
from dcp_hf_writer.plan.weights_once import is_whole
from dcp_hf_writer.tensors.dtypes import NAME_BY_TORCH
from dcp_hf_writer.tensors.strided_copies import covered, runtime_loops

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Literal

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.mapping.load_spec import LoadSpec
    from dcp_hf_writer.plan.global_plan import PlannedTensor
    from dcp_hf_writer.plan.layout import Layout, PartTarget
    from dcp_hf_writer.tensors.boxes import Shape

    Way = Literal["direct", "cast", "strided"]
    Why = Literal["beside", "value", "tied", "padding", "unmapped", "spec"]


@dataclass(frozen=True, slots=True)
class Row:
    """One block that one rank writes into one output file."""

    fqn: str
    """Runtime tensor that it comes from, by FQN in the state dict."""
    shape: Shape
    """Shape of the whole runtime tensor."""
    dtype: str
    """Its dtype, as safetensors names it."""
    rank: int
    """Rank that writes the block, within the process group of the save."""
    chunk_offsets: Shape
    """Where the part of the runtime tensor lies that this rank holds, in elements."""
    chunk_sizes: Shape
    """Extents of that part."""
    key: str
    """HuggingFace name."""
    hf_shape: Shape
    """Shape of the whole HuggingFace tensor."""
    hf_dtype: str
    """Its dtype on disk."""
    hf_offsets: Shape
    """Index of the block's first element in the HuggingFace tensor."""
    hf_sizes: Shape | None
    """Extents of the block there; `None` for one with gaps."""
    file: str
    """Output file."""
    start: int
    """First byte in that file."""
    stop: int
    """One past the last byte; other blocks may lie between the runs."""
    runs: int
    """Number of runs of consecutive bytes."""
    run_nbytes: int
    """Length of each run."""
    way: Way
    """`direct`: from the staged copy as it lies there; `cast`: through the bounce buffer, which
    changes the dtype; `strided`: through the bounce buffer, which brings elements into the order of
    the file, as a transpose needs."""

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return self.runs * self.run_nbytes


@dataclass(frozen=True, slots=True)
class FileSum:
    """One output file."""

    name: str
    """File name within the export directory."""
    nbytes: int
    """Its whole size."""
    tensors: int
    """Number of its tensors."""
    header_nbytes: int
    """Bytes before its data."""


@dataclass(frozen=True, slots=True)
class RankSum:
    """What one rank writes in all."""

    rank: int
    """Rank within the process group of the save."""
    host: str
    """Name of its host."""
    dcp_nbytes: int
    """Bytes of tensors for the DCP half, archives around them not counted."""
    dcp_tensors: int
    """Tensors, or blocks of tensors, for the DCP half."""
    values: int
    """Other values for the DCP half, of unknown size."""
    hf_nbytes: int
    """Bytes for the export."""
    blocks: int
    """Blocks for the export."""
    files: int
    """Output files that they lie in."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What of the state dict is in the DCP half alone."""

    fqn: str
    """FQN in the state dict."""
    why: Why
    """`beside` the model's entry; a `value` that is no tensor; a `tied` name; `padding`; in no
    piece of its spec, `unmapped`; left out by its `spec`."""
    reason: str
    """The same in words, with names."""
    shape: Shape | None
    """Shape of the whole runtime tensor; `None` for a value that is no tensor."""
    dtype: str | None
    """Its dtype, as safetensors or else torch names it."""
    elements: int
    """Number of its elements that are not exported."""
    nbytes: int
    """Their bytes; 0 for a value that is no tensor."""


def left_out(
    tensors: Mapping[str, PlannedTensor],
    values: Iterable[str],
    layout: Layout | None,
    export: HFExport | None,
) -> Iterator[LeftOut]:
    """Yield what is not exported, and why; nothing without an export, which has nothing else.

    Args:
        tensors: Every tensor of the plans, by FQN.
        values: FQNs of values that are no tensors.
        layout: The export.
        export: Its options.
    """
    if export is None or layout is None:
        return
    names = model_names({fqn: tensor.path for fqn, tensor in tensors.items()}, key=export.key)
    for fqn, tensor in tensors.items():
        shape, dtype = tuple(tensor.data.size), tensor.data.properties.dtype
        parts = layout.targets.get(fqn, ())
        elements = _missing(parts, shape)
        if parts and not elements:
            continue
        name = names.get(fqn)
        why: Why = "beside"
        reason = f"entry {tensor.path[0]!r} is beside the model"
        if name is not None:
            spec = export.spec_by_fqn.get(name)
            why, reason = _why(name, spec, layout.tied, is_partial=bool(parts))
        known = NAME_BY_TORCH.get(dtype, str(dtype))
        yield LeftOut(fqn, why, reason, shape, known, elements, elements * dtype.itemsize)
    for fqn in values:
        yield LeftOut(fqn, "value", "not a tensor", None, None, 0, 0)


def _missing(parts: Iterable[PartTarget], shape: Shape) -> int:
    """Count the elements of a runtime tensor that no part holds."""
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
