"""Plan the export: runtime tensors -> HuggingFace tensors -> output files -> byte offsets.

Pure: values in, values out; no storage, no process group. The result gives the place of each byte
of the export. Every rank gets the same result from the same input.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.formats.encode_safetensors_header import encode_header, in_file_order
from dcp_hf_writer.mapping.tied_names import checked_ties, tied_keys, tied_names
from dcp_hf_writer.plan.assign_hf_keys import assign_keys, check_keys, natural_order
from dcp_hf_writer.plan.output_files import encode_index, fill_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.assign_hf_keys import AssignedTensor, RuntimeTensor
    from dcp_hf_writer.tensors.boxes import Shape
    from dcp_hf_writer.tensors.strided_copies import Copy


@dataclass(frozen=True, slots=True)
class PartTarget:
    """A HuggingFace tensor, its place on disk, and the elements that a runtime tensor supplies."""

    key: str
    """HuggingFace name."""
    file: int
    """Index of the output file in the layout."""
    start: int
    """Offset of the HuggingFace tensor's first byte in that file."""
    dtype: str
    """safetensors dtype on disk."""
    shape: Shape
    """Shape on disk."""
    copies: tuple[Copy, ...]
    """The elements that it takes from the runtime tensor: their source and destination."""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One safetensors file of the export."""

    name: str
    """File name within the export directory."""
    header: bytes
    """Its first bytes: length, JSON, padding."""
    nbytes: int
    """Its whole size in bytes, header included."""
    keys: tuple[str, ...]
    """Its tensors, in file order."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole export, as planned."""

    files: tuple[PlannedFile, ...]
    """Output files, in the order of their names."""
    targets: Mapping[str, tuple[PartTarget, ...]]
    """The targets of each runtime tensor, by FQN in the state dict."""
    index: bytes | None
    """`model.safetensors.index.json`; `None` if one file holds everything."""
    tied: Mapping[str, str]
    """Keys that the export leaves out, each with the key that holds its bytes.

    If the keys of two tied tensors do not match one to one, their names within the model instead.
    """


def plan_layout(
    tensors: Sequence[RuntimeTensor],
    export: HFExport,
    *,
    tied: Iterable[Sequence[str]],
    file_of_key: Mapping[str, str] | None = None,
    sort: bool = False,
) -> Layout:
    """Plan the export of a model.

    Args:
        tensors: Tensors of the model's entry, in state-dict order.
        export: Options of the export.
        tied: Groups of FQNs that share their memory on some rank; used if `export.tied` is `None`.
        file_of_key: File of each key, from the index of `export.like`.
        sort: Whether `order="auto"` means natural order, because `save_pretrained` sorts the names
            of this architecture.

    Raises:
        LayoutError: If the format cannot hold a name, dtype or size, if two tensors have the same
            key, or if the keys are not the ones that `export` expects.
        SpecError: If a spec names a tensor that does not exist, or does not fit its tensor.
        CoverageError: If the ranks' parts of a tensor leave a gap or overlap.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    names = {tensor.fqn: tensor.name for tensor in tensors}
    dropped = checked_ties(shapes, tied_names(tied, names, export), export)
    is_sorted = export.is_in_natural_order or (sort and export.order == "auto")
    ordered = sorted(tensors, key=natural_order) if is_sorted else list(tensors)
    assigned = assign_keys(ordered, export, dropped)
    keys = {one.key for one in assigned}
    check_keys(keys, export)
    files = fill_files(assigned, export, file_of_key)
    return _place(files, export, tied_keys(dropped, keys, export))


def _place(
    groups: Mapping[str, Sequence[AssignedTensor]], export: HFExport, tied: Mapping[str, str]
) -> Layout:
    files: list[PlannedFile] = []
    targets: defaultdict[str, list[PartTarget]] = defaultdict(list)
    for number, (name, group) in enumerate(groups.items()):
        ordered = in_file_order(group)
        header, starts = encode_header(
            ordered, metadata=export.metadata or {}, align=export.header_align
        )
        nbytes = len(header) + sum(tensor.nbytes for tensor in ordered)
        files.append(PlannedFile(name, header, nbytes, tuple(t.key for t in ordered)))
        for one in group:
            place = one.key, number, starts[one.key], one.dtype, one.shape
            targets[one.fqn].append(PartTarget(*place, one.copies))
            for fqn, copies in one.others or ():
                targets[fqn].append(PartTarget(*place, copies))
    return Layout(
        files=tuple(files),
        targets={fqn: tuple(parts) for fqn, parts in targets.items()},
        index=encode_index(groups, export.total_parameters, single_file=export.single_file),
        tied=dict(tied),
    )
