"""Symbolic tensors: they record how a function rearranges tensors, without any data.

A `SymbolicTensor` has the shape, dtype and strides that a real tensor would have after the same
operations. It also records which runtime tensor each element comes from. torch itself computes the
views, on the meta device; this module records what fills each piece of memory. It refuses an
operation that does more than view, copy or cast elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.tensors.dtypes import CASTABLE
from dcp_hf_writer.tensors.loop_nests import Loop, meetings, merged, span, visits_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Run:
    """Elements of one runtime tensor, and their positions in a `Memory` or another tensor."""

    source: str
    """FQN of the runtime tensor."""
    at: int
    """First position in that memory or tensor."""
    start: int
    """First element in the runtime tensor."""
    loops: tuple[Loop, ...]
    """`(extent, step in position, step in the runtime tensor)`, merged."""


class Memory:
    """One piece of memory, and the runs that fill it, each position once."""

    def __init__(self, meta: torch.Tensor, runs: Iterable[Run]) -> None:
        """Keep `meta`, which allocated the memory: while it lives, the number stays unique."""
        self.meta = meta
        self.number = _number(meta)
        self.runs = tuple((run, run.at + span(run.loops)) for run in runs)

    @property
    def sources(self) -> set[str]:
        """FQNs of the runtime tensors whose elements fill this memory."""
        return {run.source for run, _ in self.runs}


class SymbolicTensor(torch.Tensor):
    """A tensor without data that records where each of its elements comes from."""

    meta: torch.Tensor
    """A tensor on the meta device with the same shape, strides and dtype."""
    memory: Memory
    """The memory that this tensor is a view of."""
    dtype_of: Mapping[str, torch.dtype]
    """Dtype of each runtime tensor, by FQN."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch calls it with the operation first
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation of torch.

        Raises:
            SpecError: If the operation neither views nor copies elements.
        """
        copy = _COPIES.get(func)
        if copy is not None:
            return copy(*args, **(kwargs or {}))
        if not _may_view(func) or not args or not isinstance(args[0], cls):
            _refuse(func, _sources((args, kwargs)))
        return _view(func, args[0], args[1:], kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Show shape, dtype and sources; there are no elements to show."""
        return f"SymbolicTensor({list(self.shape)}, {self.dtype}, of {sorted(self.memory.sources)})"

    def __deepcopy__(self, _: Any) -> Any:
        """Copy as `clone` does."""
        return self.clone()

    def _no_data(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("access to the data of a tensor", self.memory.sources)

    def data_ptr(self) -> int:
        """Return a made-up address: aligned, and equal for equal views of one memory."""
        return (self.memory.number << 64) + int(self.storage_offset()) * self.itemsize

    # torch answers these without running an operation, and without data its answer would be wrong.
    numpy = tolist = storage = untyped_storage = _no_data
    __array__ = __dlpack__ = _no_data

    def runs(self, steps: tuple[int, ...]) -> list[Run]:
        """Return the runs of runtime tensors that the elements come from.

        Args:
            steps: For each dimension, how many positions of the returned runs one index moves.

        Raises:
            SpecError: If the tensor holds an element twice.
        """
        strides = zip(self.meta.shape, self.meta.stride(), steps, strict=True)
        # A dimension of extent 1 has no second index, so its stride means nothing.
        view = [(extent, step, to) for extent, step, to in strides if extent != 1]
        if not visits_once(view):
            _refuse("expand, or another view that repeats elements", self.memory.sources)
        if any(extent == 0 for extent, _, _ in view):
            return []
        first, loops = int(self.meta.storage_offset()), merged(view)
        stop = first + span(loops)
        found = []
        for run, run_stop in self.memory.runs:
            if run.at <= first and stop <= run_stop and len(run.loops) == 1 == run.loops[0][1]:
                # The view lies within one contiguous run, as views of a runtime tensor do.
                step = run.loops[0][2]
                start = run.start + (first - run.at) * step
                within = [(extent, to, over * step) for extent, over, to in loops]
                return [Run(run.source, 0, start, merged(within))]
            if run.at < stop and first < run_stop:
                for at, start, common in meetings(loops, run.loops, run.at - first):
                    found.append(Run(run.source, at, run.start + start, merged(common)))
        return found


def _symbolic(
    meta: torch.Tensor, memory: Memory, dtype_of: Mapping[str, torch.dtype]
) -> SymbolicTensor:
    """Make a symbolic tensor of a view of `memory`."""
    made: SymbolicTensor = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
        SymbolicTensor,
        meta.shape,
        strides=meta.stride(),
        storage_offset=meta.storage_offset(),
        dtype=meta.dtype,
        # Not the meta device: functions test for it to find tensors without data.
        device=torch.device("cpu"),
    )
    made.meta, made.memory, made.dtype_of = meta, memory, dtype_of
    return made


def symbolic_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, SymbolicTensor]:
    """Return a stand-in for each runtime tensor, by FQN.

    Args:
        tensors: Runtime tensors; only their shapes and dtypes matter.
    """
    dtype_of = {name: tensor.dtype for name, tensor in tensors.items()}
    found = {}
    for name, tensor in tensors.items():
        meta = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
        loops: tuple[Loop, ...] = merged([(meta.numel(), 1, 1)])
        memory = Memory(meta, [Run(name, 0, 0, loops)])
        found[name] = _symbolic(meta, memory, dtype_of)
    return found


def _number(meta: torch.Tensor) -> int:
    """Return a number that identifies the memory as long as one of its tensors lives."""
    return int(meta.untyped_storage()._cdata)  # noqa: SLF001


def _may_view(func: Any) -> bool:
    """Whether an operation returns only views of its arguments, and writes to none of them."""
    known = _is_view.get(func)
    if known is None:
        schema = func._schema  # noqa: SLF001
        known = not schema.is_mutable and all(one.alias_info is not None for one in schema.returns)
        _is_view[func] = known
    return known


# The schema of `_unsafe_view` declares no view. It reshapes a new copy that nothing else uses.
_is_view: dict[Any, bool] = {_aten._unsafe_view.default: True}  # noqa: SLF001


def _view(func: Any, source: SymbolicTensor, args: Any, kwargs: Any) -> Any:
    viewed = func(source.meta, *args, **kwargs)
    if isinstance(viewed, torch.Tensor):
        return _wrapped(func, viewed, source)
    return type(viewed)(_wrapped(func, one, source) for one in viewed)


def _wrapped(func: Any, viewed: torch.Tensor, source: SymbolicTensor) -> SymbolicTensor:
    # Check what the schema promises: a view of another dtype, or a conjugated or negated view, has
    # other elements.
    if (
        _number(viewed) != source.memory.number
        or viewed.dtype != source.dtype
        or viewed.is_conj()
        or viewed.is_neg()
    ):
        _refuse(func, source.memory.sources)
    return _symbolic(viewed, source.memory, source.dtype_of)


def _filled(
    func: Any, made: torch.Tensor, parts: Iterable[tuple[torch.Tensor, SymbolicTensor]]
) -> SymbolicTensor:
    """Return a new tensor with its own memory.

    Args:
        func: The operation, to name it in an error.
        made: The new tensor, on the meta device.
        parts: Views that together cover `made`, each with the tensor that fills it.
    """
    runs: list[Run] = []
    dtype_of: Mapping[str, torch.dtype] = {}
    for place, tensor in parts:
        dtype_of = tensor.dtype_of
        for run in tensor.runs(place.stride()):
            if made.dtype != tensor.dtype:
                _check_cast(func, run.source, (dtype_of[run.source], tensor.dtype, made.dtype))
            at = int(place.storage_offset()) + run.at
            runs.append(Run(run.source, at, run.start, run.loops))
    return _symbolic(made, Memory(made, runs), dtype_of)


def _check_cast(func: Any, source: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a second cast, which would round twice, and dtypes that an export never casts."""
    runtime, old, new = dtypes
    if runtime != old or old not in CASTABLE or new not in CASTABLE:
        _refuse(f"{func}, a cast from {old} to {new} of a tensor of {runtime}", {source})


def _copy_one(func: Any) -> Callable[..., SymbolicTensor]:
    def copy(source: SymbolicTensor, **options: Any) -> SymbolicTensor:
        # Device, layout and pinning of a copy do not change where elements go.
        for name in ("device", "layout", "pin_memory", "non_blocking"):
            options.pop(name, None)
        made = func(source.meta, **options)
        return _filled(func, made, [(made, source)])

    return copy


def _join(func: Any, part_of: Callable[..., torch.Tensor]) -> Callable[..., SymbolicTensor]:
    def join(tensors: list[Any], dim: int = 0) -> SymbolicTensor:
        if not all(isinstance(one, SymbolicTensor) for one in tensors):
            _refuse(f"{func} with tensors that are not the model's", _sources(tensors))
        made = func([one.meta for one in tensors], dim)
        parts, position = [], 0
        for one in tensors:
            # torch.cat skips tensors of shape (0,), whatever shape the others have.
            if one.numel():
                place = part_of(made, dim, position, one)
                parts.append((place, one))
                position += 1 if place.ndim < made.ndim else place.shape[dim]
        return _filled(func, made, parts)

    return join


def _narrow(made: torch.Tensor, dim: int, position: int, one: torch.Tensor) -> torch.Tensor:
    return made.narrow(dim, position, one.shape[dim])


def _select(made: torch.Tensor, dim: int, position: int, _: torch.Tensor) -> torch.Tensor:
    return made.select(dim, position)


_COPIES: dict[Any, Callable[..., SymbolicTensor]] = {
    _aten.clone.default: _copy_one(_aten.clone.default),
    _aten._to_copy.default: _copy_one(_aten._to_copy.default),  # noqa: SLF001
    _aten.cat.default: _join(_aten.cat.default, _narrow),
    _aten.stack.default: _join(_aten.stack.default, _select),
}


def _sources(values: Any) -> set[str]:
    found: set[str] = set()
    for leaf in torch.utils._pytree.tree_leaves(values):  # noqa: SLF001
        if isinstance(leaf, SymbolicTensor):
            found |= leaf.memory.sources
    return found


def _refuse(operation: object, sources: set[str]) -> NoReturn:
    names = sorted(sources)
    raise SpecError(
        "an operation on a tensor does more than copy elements",
        phase="plan",
        fqn=names[0] if len(names) == 1 else str(names),
        expected="views, and copies such as contiguous, clone, reshape, cat, stack and to(dtype)",
        found=str(operation),
        hint="write its LoadSpec by hand, or leave the computation out of the function",
    )
