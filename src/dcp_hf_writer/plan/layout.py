"""Plan the export: runtime tensors -> HuggingFace tensors -> output files -> byte offsets.

Pure: values in, values out; no storage, no process group. The result says where each byte of the
export lies, and is the same on every rank for the same input.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CoverageError, LayoutError, SpecError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.formats.encode_safetensors_header import HFTensor, encode_header, in_file_order
from dcp_hf_writer.formats.names_on_disk import SINGLE_NAME
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.mapping.tied_names import checked_ties, tied_keys, tied_names
from dcp_hf_writer.tensors.boxes import Box, BoxTable, Shape, tiling_fault
from dcp_hf_writer.tensors.dtypes import CASTABLE, safetensors_name
from dcp_hf_writer.tensors.strided_copies import Copy, coverage_fault, hf_box, hf_loops

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from dcp_hf_writer.mapping.hf_export import HFExport


# A key that safetensors itself reserves: the library writes such a tensor and cannot read it back.
_RESERVED = "__metadata__"

_MANY = 20
"""How many names an error lists."""


@dataclass(frozen=True, slots=True)
class RuntimeTensor:
    """One tensor of the model's entry, as all ranks together hold it."""

    fqn: str
    """Its FQN in the state dict."""
    name: str
    """Its FQN within the model's entry."""
    shape: Shape
    """Its global shape."""
    dtype: torch.dtype
    """Its runtime dtype."""
    chunks: tuple[Box, ...] | BoxTable
    """The parts that the ranks write, each element once."""


@dataclass(frozen=True, slots=True)
class PartTarget:
    """Where the elements go that a runtime tensor gives to one HuggingFace tensor."""

    key: str
    """HuggingFace name."""
    file: int
    """Index of the output file in the layout."""
    start: int
    """Offset of the tensor's first byte in that file."""
    dtype: str
    """safetensors dtype on disk."""
    shape: Shape
    """Shape on disk."""
    copies: tuple[Copy, ...]
    """Its elements that come from the runtime tensor, and where they stand."""


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the export."""

    name: str
    """File name within the export directory."""
    header: bytes
    """Its first bytes: length, JSON, padding."""
    nbytes: int
    """Its whole size, header included."""
    keys: tuple[str, ...]
    """Its tensors, in file order."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The whole export, as planned."""

    files: tuple[OutputFile, ...]
    """Output files, in the order of their names."""
    targets: Mapping[str, tuple[PartTarget, ...]]
    """Where the parts of each runtime tensor go, by FQN in the state dict."""
    index: bytes | None
    """`model.safetensors.index.json`; `None` where one file holds everything."""
    tied: Mapping[str, str]
    """Keys that were left out, and the key that holds their bytes; of tensors that do not have keys
    in pairs, their names within the model."""


@dataclass(frozen=True, slots=True)
class _Assigned:
    tensor: HFTensor
    parts: list[tuple[str, tuple[Copy, ...]]]
    """FQN of each runtime tensor that gives elements to it, and which."""


def plan_layout(
    tensors: Sequence[RuntimeTensor],
    export: HFExport,
    *,
    tied: Iterable[Sequence[str]],
    file_of_key: Mapping[str, str] | None = None,
) -> Layout:
    """Plan the export of a model.

    Args:
        tensors: Tensors of the model's entry, in state-dict order.
        export: Options of the export.
        tied: Groups of FQNs that share their memory on some rank; used where `export.tied` is
            `None`.
        file_of_key: File of each key, from the index of `export.like`.

    Raises:
        LayoutError: If names, dtypes or sizes cannot be held by the format, or keys are not those
            that the export expects.
        SpecError: If a spec names no tensor, or does not fit the one it names.
        CoverageError: If the ranks' parts of a tensor leave a gap or overlap.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    names = {tensor.fqn: tensor.name for tensor in tensors}
    dropped = checked_ties(shapes, tied_names(tied, names, export), export)
    ordered = sorted(tensors, key=_natural) if export.is_in_natural_order else list(tensors)
    assigned = _assign_keys(ordered, export, dropped)
    _check_keys(assigned, export)
    files = (
        _greedy_files(_units(assigned, export), export.max_shard_nbytes)
        if file_of_key is None
        else _files_like(assigned, file_of_key)
    )
    return _place(files, export, tied_keys(dropped, {one.tensor.key for one in assigned}, export))


def _natural(tensor: RuntimeTensor) -> list[tuple[Any, ...]]:
    """Order names as people count: split at dots, digits as numbers."""
    key: list[tuple[Any, ...]] = []
    for part in tensor.name.split("."):
        if part.isdecimal():
            key.append((0, int(part)))
            continue
        text = part.rstrip("0123456789")
        digits = part[len(text) :]
        key.append((1, text, int(digits)) if digits else (1, text))
    return key


def _assign_keys(
    tensors: Sequence[RuntimeTensor], export: HFExport, dropped: Mapping[str, str]
) -> list[_Assigned]:
    unused = export.spec_by_fqn.keys() - {tensor.name for tensor in tensors}
    if unused:
        msg = "specs name tensors that the model does not have"
        raise SpecError(msg, phase="plan", expected="FQNs within the model", found=_some(unused))
    keep = [re.compile(pattern) for pattern in export.keep_dtype]
    # A key may be the name of another tensor, which is not the one that is meant.
    dropped_keys = dropped.keys() - {tensor.name for tensor in tensors}
    assigned: dict[str, _Assigned] = {}
    for tensor in tensors:
        if tensor.name in dropped:
            continue
        spec = export.spec_by_fqn.get(tensor.name)
        if spec is None:
            spec = LoadSpec(tensor.name, (tensor.name,), tensor.shape)
        _check_tensor(tensor, spec)
        for part in spec.parts:
            if part.key in dropped_keys:
                continue
            dtype = safetensors_name(_on_disk(tensor, spec, part.key, export, keep), fqn=tensor.fqn)
            wanted = HFTensor(part.key, dtype, part.shape)
            known = assigned.setdefault(part.key, _Assigned(wanted, []))
            if known.tensor != wanted:
                _refuse_other(known, wanted, tensor.fqn, part.copies)
            known.parts.append((tensor.fqn, part.copies))
    _check_all_whole(assigned.values())
    return list(assigned.values())


def _check_all_whole(assigned: Iterable[_Assigned]) -> None:
    # The layers of a model share their copies, which need to be looked at only once.
    checked: set[tuple[int, Shape]] = set()
    for one in assigned:
        what = id(one.parts[0][1]), one.tensor.shape
        if len(one.parts) > 1 or what not in checked:
            _check_whole(one)
        if len(one.parts) == 1:
            checked.add(what)


def _check_whole(one: _Assigned) -> None:
    """Refuse a HuggingFace tensor of which an element comes from nowhere, or from two places."""
    shape = one.tensor.shape
    copies = [copy for _, copies in one.parts for copy in copies]
    if len(one.parts) > 1 and math.prod(shape) in {
        sum(copy.numel for copy in copies) for _, copies in one.parts
    }:
        _refuse_two(one, one.parts[1][0])
    boxes = [hf_box(copy) for copy in copies]
    if len(boxes) == 1 and boxes[0] is not None and boxes[0].sizes == shape:
        return
    solid = [box for box in boxes if box is not None]
    fault = (
        tiling_fault(solid, shape)
        if len(solid) == len(boxes)
        else coverage_fault([(copy.hf_start, hf_loops(copy)) for copy in copies], shape)
    )
    if fault is not None:
        fqns = [fqn for fqn, _ in one.parts]
        msg = "the specs do not give each element of a HuggingFace tensor once"
        raise SpecError(
            msg,
            phase="plan",
            fqn=fqns[0] if len(fqns) == 1 else some_of(sorted(fqns), most=_MANY),
            key=one.tensor.key,
            expected=f"pieces that tile {list(shape)}",
            found=fault,
        )


def _refuse_other(known: _Assigned, wanted: HFTensor, fqn: str, copies: Sequence[Copy]) -> None:
    """Refuse a tensor that cannot be a part of the one that has its key."""
    is_part = sum(copy.numel for copy in copies) < math.prod(wanted.shape)
    if not is_part or known.tensor.shape != wanted.shape:
        _refuse_two(known, fqn)
    msg = "runtime tensors of different dtypes make up one HuggingFace tensor"
    raise LayoutError(
        msg,
        phase="plan",
        fqn=fqn,
        key=wanted.key,
        expected=f"{known.tensor.dtype}, as {known.parts[0][0]!r}",
        found=wanted.dtype,
        hint="HFExport(dtype=...), or the dtype of their LoadSpecs, gives them one",
    )


def _refuse_two(known: _Assigned, fqn: str) -> None:
    _refuse_key(
        known.tensor.key,
        "two runtime tensors have one HuggingFace key",
        f"{known.parts[0][0]!r} and {fqn!r}",
    )


def _on_disk(
    tensor: RuntimeTensor,
    spec: LoadSpec,
    key: str,
    export: HFExport,
    keep: Iterable[re.Pattern[str]],
) -> torch.dtype:
    wanted = spec.dtype or export.dtype
    if wanted is None or tensor.dtype not in CASTABLE or isinstance(wanted, str):
        return tensor.dtype
    if spec.dtype is None and any(pattern.search(key) for pattern in keep):
        return tensor.dtype
    return wanted


def _check_tensor(tensor: RuntimeTensor, spec: LoadSpec) -> None:
    if spec.global_shape != tensor.shape:
        msg = "a spec has another shape than its tensor"
        raise SpecError(
            msg,
            phase="plan",
            fqn=tensor.fqn,
            expected=f"shape {list(tensor.shape)}",
            found=f"global_shape {list(spec.global_shape)}",
        )
    fault = tiling_fault(tensor.chunks, tensor.shape)
    if fault is not None:
        msg = "the ranks' parts do not cover a tensor exactly once"
        raise CoverageError(
            msg,
            phase="plan",
            fqn=tensor.fqn,
            expected=f"parts that tile {list(tensor.shape)}",
            found=fault,
            hint="every rank of the mesh must take part in the save; tensors sharded by hand need "
            "a planner that knows their shards",
        )


def _check_keys(assigned: Sequence[_Assigned], export: HFExport) -> None:
    keys = {one.tensor.key for one in assigned}
    for key in keys:
        if not key or key == _RESERVED:
            _refuse_key(key, "a HuggingFace key is reserved or empty", repr(key))
        try:
            key.encode()
        except UnicodeEncodeError:
            _refuse_key(key, "a HuggingFace key is not valid Unicode", repr(key))
    if not keys:
        msg = "the model's entry holds no tensors to export"
        raise LayoutError(
            msg, phase="plan", hint="pass HFExport(key=...), or export=None for DCP only"
        )
    if export.expect_keys is not None and keys != export.expect_keys:
        expected = frozenset(export.expect_keys)
        msg = "the export would not have the expected keys"
        raise LayoutError(
            msg,
            phase="plan",
            expected=f"also {_some(expected - keys)}" if expected - keys else None,
            found=f"unexpected {_some(keys - expected)}" if keys - expected else None,
        )


def _units(assigned: Sequence[_Assigned], export: HFExport) -> list[list[_Assigned]]:
    """Return the tensors in the order in which they fill files; a unit is not spread."""
    if export.groups is None:
        return [[one] for one in assigned]
    by_key = {one.tensor.key: one for one in assigned}
    units = [[by_key.pop(key) for key in group if key in by_key] for group in export.groups]
    return [unit for unit in units if unit] + [[one] for one in by_key.values()]


def _greedy_files(
    units: Sequence[Sequence[_Assigned]], max_nbytes: int
) -> dict[str, list[_Assigned]]:
    """Fill files in order, as `save_pretrained` does.

    Source:
        huggingface_hub, "Save a state dict": greedy in order of the keys; tensors of one storage
        stay together; a unit above the limit gets a file of its own and does not close the one
        being filled.
    """
    files: list[list[_Assigned]] = []
    current: list[_Assigned] = []
    filled = 0
    for unit in units:
        nbytes = sum(one.tensor.nbytes for one in unit)
        if nbytes > max_nbytes:
            files.append(list(unit))
            continue
        if filled + nbytes > max_nbytes:
            files.append(current)
            current, filled = [], 0
        current += unit
        filled += nbytes
    if current:
        files.append(current)
    return dict(zip(_file_names(len(files)), files, strict=True))


def _files_like(
    assigned: Sequence[_Assigned], file_of_key: Mapping[str, str]
) -> dict[str, list[_Assigned]]:
    missing = [one.tensor.key for one in assigned if one.tensor.key not in file_of_key]
    if missing:
        msg = "keys of the export are not in the index of `like`"
        raise LayoutError(
            msg,
            phase="plan",
            found=_some(missing),
            hint="give the specs that lead to the base model's names, or do not pass like=",
        )
    files: dict[str, list[_Assigned]] = {}
    for one in assigned:
        files.setdefault(file_of_key[one.tensor.key], []).append(one)
    return dict(sorted(files.items()))


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _place(
    groups: Mapping[str, Sequence[_Assigned]], export: HFExport, tied: Mapping[str, str]
) -> Layout:
    files: list[OutputFile] = []
    targets: dict[str, list[PartTarget]] = {}
    for number, (name, group) in enumerate(groups.items()):
        ordered = in_file_order([one.tensor for one in group])
        header, starts = encode_header(
            ordered, metadata=export.metadata or {}, align=export.header_align
        )
        nbytes = len(header) + sum(tensor.nbytes for tensor in ordered)
        files.append(OutputFile(name, header, nbytes, tuple(t.key for t in ordered)))
        for one in group:
            tensor = one.tensor
            for fqn, copies in one.parts:
                targets.setdefault(fqn, []).append(
                    PartTarget(
                        tensor.key, number, starts[tensor.key], tensor.dtype, tensor.shape, copies
                    )
                )
    return Layout(
        files=tuple(files),
        targets={fqn: tuple(parts) for fqn, parts in targets.items()},
        index=_encode_index(groups, export.total_parameters),
        tied=dict(tied),
    )


def _encode_index(
    groups: Mapping[str, Sequence[_Assigned]], total_parameters: int | None
) -> bytes | None:
    if list(groups) == [SINGLE_NAME]:
        return None
    tensors = [one.tensor for group in groups.values() for one in group]
    if total_parameters is None:
        total_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    index = {
        "metadata": {
            "total_parameters": total_parameters,
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {one.tensor.key: name for name, group in groups.items() for one in group},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _some(names: Iterable[str]) -> str:
    return some_of(map(repr, sorted(names)), most=_MANY)


def _refuse_key(key: str, problem: str, found: str) -> None:
    raise LayoutError(
        problem,
        phase="plan",
        key=key,
        expected="distinct, non-empty names other than '__metadata__'",
        found=found,
        hint="rename a tensor with HFExport(specs=...)",
    )
