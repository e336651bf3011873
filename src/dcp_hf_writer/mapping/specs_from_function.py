"""Derive LoadSpecs from a function that turns runtime tensors into HuggingFace tensors.

Pure. The function runs once, on symbolic tensors. They record where each element goes, and this
record becomes the specs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.mapping.load_spec import LoadSpec, Piece
from dcp_hf_writer.mapping.symbolic_tensors import Run, SymbolicTensor, symbolic_tensors
from dcp_hf_writer.tensors.loop_nests import merged
from dcp_hf_writer.tensors.strided_copies import strides_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from dcp_hf_writer.tensors.boxes import Shape


@dataclass(frozen=True, slots=True)
class HFSide:
    """One HuggingFace tensor that the function returns."""

    shape: Shape
    """Shape of the HuggingFace tensor."""
    dtype: torch.dtype
    """Dtype of the HuggingFace tensor."""
    runs: tuple[Run, ...]
    """The runtime elements that fill it."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """What a function does with the tensors of a model."""

    specs: dict[str, LoadSpec]
    """A spec for each runtime tensor, by FQN. The spec of a left-out tensor has no keys."""
    hf: dict[str, HFSide]
    """The HuggingFace tensors by key, in the order in which the function returns them."""
    groups: tuple[tuple[str, ...], ...]
    """Keys, grouped by the memory that their tensors share; see `HFExport.groups`."""


def specs_from_function(
    function: Callable[[dict[str, Any]], Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> dict[str, LoadSpec]:
    """Derive specs from a function that turns a state dict into HuggingFace tensors.

    The function is called once, with stand-ins that have shapes and dtypes but no data. It may
    rename, index, slice, split, join, transpose, reshape and cast. The specs then describe where
    each element goes.

    Args:
        function: Takes `{FQN: tensor}` and returns `{HuggingFace key: tensor}`.
        tensors: Runtime tensors by FQN, with their global shapes, as DTensors have them. Tensors
            on the meta device will do.

    Returns:
        A spec for each of `tensors`, by FQN. A cast becomes `LoadSpec.dtype`. A tensor that the
        function leaves out gets a spec without keys.

    Raises:
        SpecError: If the function computes new values, or returns a value not made of `tensors`.
    """
    return derive(function, tensors).specs


def derive(
    function: Callable[[dict[str, Any]], Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> Derivation:
    """Derive specs as `specs_from_function` does, and describe the HuggingFace tensors too.

    Raises:
        SpecError: As `specs_from_function`.
    """
    returned = function(dict(symbolic_tensors(tensors)))
    hf: dict[str, HFSide] = {}
    groups: dict[int, list[str]] = {}
    for key, value in returned.items():
        hf[key] = side_of(key, value)
        groups.setdefault(value.memory.number, []).append(key)
    return Derivation(specs_of(hf, tensors), hf, tuple(map(tuple, groups.values())))


def specs_of(hf: Mapping[str, HFSide], tensors: Mapping[str, torch.Tensor]) -> dict[str, LoadSpec]:
    """Invert the mapping: return for each runtime tensor where its elements go.

    Raises:
        SpecError: If one runtime tensor is cast to several dtypes.
    """
    found: dict[str, dict[str, list[Run]]] = {name: {} for name in tensors}
    for key, side in hf.items():
        for run in side.runs:
            found[run.source].setdefault(key, []).append(run)
    return {
        name: _spec(name, tensors[name], {key: (hf[key], runs) for key, runs in by_key.items()})
        for name, by_key in found.items()
    }


def side_of(key: str, value: Any) -> HFSide:
    """Describe a symbolic tensor that a function returned under `key`.

    Raises:
        SpecError: If `value` is not made of the symbolic tensors that the function was given, or
            holds an element twice.
    """
    if not isinstance(value, SymbolicTensor):
        raise SpecError(
            "the function returns a value that is not made of the model's tensors",
            phase="plan",
            key=key,
            expected="a view or a copy of the tensors that the function was given",
            found=type(value).__name__,
        )
    shape = tuple(value.shape)
    runs = value.runs(strides_of(shape))
    sources = value.memory.sources
    if not runs and len(sources) == 1:
        # A tensor without elements has no runs, so name the only source of its memory.
        runs = [Run(next(iter(sources)), 0, 0, ((0, 1, 1),))]
    if not runs:
        raise SpecError(
            "cannot tell which runtime tensor an empty HuggingFace tensor is made of",
            phase="plan",
            key=key,
            found=f"shape {list(shape)}",
        )
    return HFSide(shape, value.dtype, tuple(runs))


def _spec(name: str, tensor: torch.Tensor, by_key: dict[str, tuple[HFSide, list[Run]]]) -> LoadSpec:
    shape = tuple(tensor.shape)
    dtypes = {side.dtype for side, _ in by_key.values()}
    if len(dtypes) > 1:
        raise SpecError(
            "the parts of a tensor are cast to several dtypes",
            phase="plan",
            fqn=name,
            expected="one dtype per runtime tensor",
            found=", ".join(sorted(map(str, dtypes))),
        )
    dtype = next((one for one in dtypes if one != tensor.dtype), None)
    if by_key and (fused := _fused(shape, by_key)) is not None:
        dim, sizes = fused
        equal = sizes is None or len(set(sizes)) == 1
        return LoadSpec(
            name, tuple(by_key), shape, dim, dtype=dtype, fused_sizes=None if equal else sizes
        )
    pieces = [
        Piece(key, side.shape, run.loops, run.at, run.start)
        for key, (side, runs) in by_key.items()
        for run in runs
    ]
    return LoadSpec(name, tuple(by_key), shape, dtype=dtype, pieces=pieces)


def _fused(
    shape: Shape, by_key: Mapping[str, tuple[HFSide, list[Run]]]
) -> tuple[int | None, tuple[int, ...] | None] | None:
    """Return `(dimension, sizes)` if the keys are the parts of a tensor along one dimension.

    `(None, None)` if one key is the whole tensor; `None` if the plain form of a spec does not fit.
    """
    shapes = [side.shape for side, _ in by_key.values()]
    runs = [run for _, many in by_key.values() for run in many]
    if len(runs) != len(shapes) or any(len(one) != len(shape) for one in shapes):
        return None
    if len(shapes) == 1:
        whole = shapes[0] == shape and _is_box(runs[0], shape, shape, 0)
        return (None, None) if whole else None
    differ = {
        d for one in shapes for d, (n, m) in enumerate(zip(one, shape, strict=True)) if n != m
    }
    if len(differ) != 1:
        return None
    dim = differ.pop()
    sizes = tuple(one[dim] for one in shapes)
    offset, stride = 0, strides_of(shape)[dim]
    for one, run in zip(shapes, runs, strict=True):
        if not _is_box(run, one, shape, offset * stride):
            return None
        offset += one[dim]
    return (dim, sizes) if offset == shape[dim] else None


def _is_box(run: Run, hf_shape: Shape, shape: Shape, start: int) -> bool:
    """Whether a run fills a whole HuggingFace tensor from a box of the runtime tensor."""
    if not math.prod(hf_shape):
        return True
    loops: Iterable[tuple[int, int, int]] = zip(
        hf_shape, strides_of(hf_shape), strides_of(shape), strict=True
    )
    return (run.at, run.start) == (0, start) and run.loops == merged(
        loop for loop in loops if loop[0] > 1
    )
