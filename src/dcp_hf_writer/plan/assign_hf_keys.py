"""Find the HuggingFace tensors of an export, and the runtime tensors that supply their elements.

Pure: values in, values out.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dcp_hf_writer.errors import CoverageError, LayoutError, SpecError
from dcp_hf_writer.excerpts import MOST_NAMES, some_of
from dcp_hf_writer.formats.encode_safetensors_header import nbytes_of
from dcp_hf_writer.mapping.load_spec import whole_part
from dcp_hf_writer.tensors.boxes import Box, BoxTable, Shape, tiling_fault
from dcp_hf_writer.tensors.dtypes import CASTABLE, safetensors_name
from dcp_hf_writer.tensors.strided_copies import Copy, coverage_fault, hf_box, hf_loops

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    import torch

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.mapping.load_spec import LoadSpec, SpecPart

Source = tuple[str, tuple[Copy, ...]]
"""FQN of a runtime tensor, and the copies that take over elements of it."""

# safetensors reserves this key: its library writes a tensor of this name but cannot read it back.
_RESERVED = "__metadata__"


@dataclass(frozen=True, slots=True)
class RuntimeTensor:
    """One whole tensor of the model's entry in the state dict: the parts of all ranks together."""

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


class AssignedTensor(NamedTuple):
    """A HuggingFace tensor of the export, and where its elements come from.

    An export has tens of thousands of these, hence few objects for each: a large number of new ones
    makes Python's collector go through all objects of the process.
    """

    key: str
    """HuggingFace name."""
    dtype: str
    """safetensors dtype on disk."""
    shape: Shape
    """Shape on disk."""
    nbytes: int
    """Size of its data in bytes."""
    fqn: str
    """FQN of the first runtime tensor that supplies elements."""
    copies: tuple[Copy, ...]
    """The copies that take over its elements."""
    others: list[Source] | None = None
    """The other runtime tensors that supply elements; `None` if there are none."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """All runtime tensors that supply elements: FQN and copies of each."""
        return (self.fqn, self.copies), *(self.others or ())


def natural_order(tensor: RuntimeTensor) -> list[tuple[Any, ...]]:
    """Return a sort key that orders names as people count: `layers.2` before `layers.10`.

    It splits the name at dots, and compares the digits at the end of a part as a number.
    """
    key: list[tuple[Any, ...]] = []
    for part in tensor.name.split("."):
        if part.isdecimal():
            key.append((0, int(part)))
            continue
        text = part.rstrip("0123456789")
        digits = part[len(text) :]
        key.append((1, text, int(digits)) if digits else (1, text))
    return key


def assign_keys(
    tensors: Sequence[RuntimeTensor], export: HFExport, dropped: Mapping[str, str]
) -> list[AssignedTensor]:
    """Find the HuggingFace tensors of an export.

    Args:
        tensors: Runtime tensors, in the order in which their HuggingFace tensors fill files.
        export: Options of the export.
        dropped: Names and keys that the export leaves out because they are tied to others.

    Returns:
        The HuggingFace tensors; each gets every element from exactly one runtime tensor.

    Raises:
        SpecError: If a spec names a tensor that does not exist, if its shape is not that of its
            tensor, or if the specs do not supply each element of a HuggingFace tensor once.
        LayoutError: If two runtime tensors have the same key, if the parts of one HuggingFace
            tensor differ in dtype, or if safetensors does not have a dtype.
        CoverageError: If the ranks' parts of a runtime tensor leave a gap or overlap.
    """
    unused = export.spec_by_fqn.keys() - {tensor.name for tensor in tensors}
    if unused:
        msg = "specs name tensors that the model does not have"
        raise SpecError(msg, phase="plan", expected="FQNs within the model", found=_some(unused))
    keep = [re.compile(pattern) for pattern in export.keep_dtype]
    # `dropped` holds names and keys. An entry that is the name of a tensor means that tensor, and
    # not a key of another tensor that happens to be equal.
    dropped_keys = dropped.keys() - {tensor.name for tensor in tensors}
    assigned: dict[str, AssignedTensor] = {}
    # The parts of a stack of experts have one form. Its size is computed once.
    size_of: dict[tuple[str, Shape], int] = {}
    for tensor in tensors:
        if tensor.name in dropped:
            continue
        spec = export.spec_by_fqn.get(tensor.name)
        _check_tensor(tensor, spec)
        parts = (whole_part(tensor.name, tensor.shape),) if spec is None else spec.parts
        if dropped_keys:
            parts = tuple(part for part in parts if part.key not in dropped_keys)
        dtypes = _dtypes_on_disk(tensor, spec, parts, export, keep)
        for part, dtype in zip(parts, dtypes, strict=True):
            key, shape = part.key, part.shape
            nbytes = size_of.get((dtype, shape))
            if nbytes is None:
                nbytes = size_of[dtype, shape] = nbytes_of(dtype, shape)
            known = assigned.get(key)
            if known is None:
                assigned[key] = AssignedTensor(key, dtype, shape, nbytes, tensor.fqn, part.copies)
                continue
            if known.dtype != dtype or known.shape != shape:
                _refuse_other(known, part, dtype, tensor.fqn)
            source = tensor.fqn, part.copies
            if known.others is None:
                assigned[key] = known._replace(others=[source])
            else:
                known.others.append(source)
    _check_all_whole(assigned.values())
    return list(assigned.values())


def _check_all_whole(assigned: Iterable[AssignedTensor]) -> None:
    # The layers of a model share their `copies` objects. Checking each object once is enough.
    checked: dict[int, Shape] = {}
    for one in assigned:
        if not one.others:
            copies = id(one.copies)
            if checked.get(copies) == one.shape:
                continue
            checked[copies] = one.shape
        _check_whole(one)


def _check_whole(one: AssignedTensor) -> None:
    """Refuse a HuggingFace tensor if one of its elements has no source, or more than one."""
    shape = one.shape
    copies = [copy for _, copies in one.sources for copy in copies]
    if one.others and math.prod(shape) in {
        sum(copy.numel for copy in copies) for _, copies in one.sources
    }:
        _refuse_two(one, one.others[0][0])
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
        fqns = [fqn for fqn, _ in one.sources]
        msg = "the specs do not supply each element of a HuggingFace tensor exactly once"
        raise SpecError(
            msg,
            phase="plan",
            fqn=fqns[0] if len(fqns) == 1 else some_of(sorted(fqns), most=MOST_NAMES),
            key=one.key,
            expected=f"pieces that tile {list(shape)}",
            found=fault,
        )


def _refuse_other(known: AssignedTensor, part: SpecPart, dtype: str, fqn: str) -> None:
    """Refuse a runtime tensor whose part does not fit the HuggingFace tensor of the same key."""
    is_part = sum(copy.numel for copy in part.copies) < math.prod(part.shape)
    if not is_part or known.shape != part.shape:
        _refuse_two(known, fqn)
    msg = "runtime tensors of different dtypes make up one HuggingFace tensor"
    raise LayoutError(
        msg,
        phase="plan",
        fqn=fqn,
        key=part.key,
        expected=f"{known.dtype}, the dtype of {known.fqn!r}",
        found=dtype,
        hint="give them one dtype with HFExport(dtype=...) or with the dtype of their LoadSpecs",
    )


def _refuse_two(known: AssignedTensor, fqn: str) -> None:
    _refuse_key(
        known.key,
        "two runtime tensors have the same HuggingFace key",
        f"{known.fqn!r} and {fqn!r}",
    )


def _dtypes_on_disk(
    tensor: RuntimeTensor,
    spec: LoadSpec | None,
    parts: Sequence[SpecPart],
    export: HFExport,
    keep: Sequence[re.Pattern[str]],
) -> Iterable[str]:
    """Return the safetensors dtype of each part of a tensor."""
    if not parts:
        return ()
    wanted = (spec and spec.dtype) or export.dtype
    if wanted is None or tensor.dtype not in CASTABLE or isinstance(wanted, str):
        return itertools.repeat(safetensors_name(tensor.dtype, fqn=tensor.fqn), len(parts))
    cast = safetensors_name(wanted, fqn=tensor.fqn)
    if not keep or (spec and spec.dtype):
        return itertools.repeat(cast, len(parts))
    own = safetensors_name(tensor.dtype, fqn=tensor.fqn)
    return [own if any(pattern.search(part.key) for pattern in keep) else cast for part in parts]


def _check_tensor(tensor: RuntimeTensor, spec: LoadSpec | None) -> None:
    if spec is not None and spec.global_shape != tensor.shape:
        msg = "the shape in a spec is not the shape of its tensor"
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
            "a planner that describes their shards",
        )


def check_keys(keys: AbstractSet[str], export: HFExport) -> None:
    """Refuse keys that safetensors cannot hold, and keys other than the expected ones.

    Args:
        keys: All keys of the export.
        export: Options of the export.

    Raises:
        LayoutError: If a key is empty, reserved or not valid Unicode, if there are no keys, or if
            they are not the keys in `export.expect_keys`.
    """
    for key in sorted(keys & {"", _RESERVED}):
        _refuse_key(key, "a HuggingFace key is reserved or empty", repr(key))
    if not _is_unicode("".join(keys)):
        key = min(key for key in keys if not _is_unicode(key))
        _refuse_key(key, "a HuggingFace key is not valid Unicode", repr(key))
    if not keys:
        msg = "the model's entry holds no tensors to export"
        raise LayoutError(
            msg,
            phase="plan",
            hint="name the model's entry with HFExport(key=...), or pass export=None for DCP only",
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


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _some(names: Iterable[str]) -> str:
    return some_of(map(repr, sorted(names)), most=MOST_NAMES)


def _refuse_key(key: str, problem: str, found: str) -> None:
    raise LayoutError(
        problem,
        phase="plan",
        key=key,
        expected="distinct, non-empty names other than '__metadata__'",
        found=found,
        hint="rename a tensor with HFExport(specs=...)",
    )
