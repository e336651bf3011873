"""LoadSpec: which HuggingFace tensors a runtime tensor holds, and where."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.tensors.boxes import Box, Shape, whole
from dcp_hf_writer.tensors.shards import ShardSpec, shards_of
from dcp_hf_writer.tensors.strided_copies import Copy, copies_of, copy_of_box

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch


__all__ = ["LoadSpec", "Piece", "ShardSpec", "SpecPart"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a runtime tensor, and their places in a HuggingFace tensor.

    `hf[hf_start + sum(i * hf_step)] = runtime[start + sum(i * step)]` for each combination of the
    loop indices `i`. Both tensors are flat here: indices and steps count elements in row-major
    order.
    """

    key: str
    """HuggingFace name."""
    shape: Shape
    """Shape of the whole HuggingFace tensor."""
    loops: tuple[tuple[int, int, int], ...]
    """`(extent, hf_step, step)` of each nested loop, in any order; steps are at least 1."""
    hf_start: int = 0
    """Flat index of the first element in the HuggingFace tensor."""
    start: int = 0
    """Flat index of the first element in the runtime tensor of shape `global_shape`."""


@dataclass(frozen=True, slots=True)
class SpecPart:
    """A HuggingFace tensor, and the elements of one runtime tensor that go into it."""

    key: str
    """HuggingFace name."""
    shape: Shape
    """Shape of the HuggingFace tensor."""
    copies: tuple[Copy, ...]
    """Copies of the elements; empty for a tensor without elements."""


@dataclass(frozen=True, slots=True, init=False)
class LoadSpec:
    """Which HuggingFace tensors one runtime tensor holds, and where.

    Plain form: one key renames the tensor. Several keys mean that the runtime tensor fuses several
    HuggingFace tensors, one after another along `fused_dim`, in the order of the keys. These parts
    have equal sizes, or the sizes in `fused_sizes` (grouped-query attention needs them).

    General form: `pieces` says for each element where it goes. `pieces=()` without keys leaves the
    tensor out of the export.

    A tensor without a spec keeps its name and shape.
    """

    name: str
    """FQN of the runtime tensor within the model's entry of the state dict."""
    hf_keys: tuple[str, ...]
    """HuggingFace names, in the order in which the runtime tensor holds their tensors."""
    global_shape: Shape
    """Shape of the whole runtime tensor, padding included."""
    fused_dim: int
    """Dimension along which the parts follow one another."""
    shards: tuple[ShardSpec, ...]
    """The cuts that made this rank's shard of a tensor, in order; empty for a whole tensor.

    A DTensor of the shape `global_shape` is read by its placements alone, and this field is
    ignored. Any other DTensor is taken as a shard made by these cuts and then placed on its mesh.
    """
    origin_shape: Shape
    """Shape without runtime padding. Padding is not exported, and a load fills it with zeros."""
    fused_sizes: tuple[int, ...] | None
    """Extent of each part along `fused_dim`; `None` means equal parts."""
    dtype: torch.dtype | None
    """Dtype on disk, which overrides `HFExport.dtype`; `None` overrides nothing."""
    pieces: tuple[Piece, ...] | None
    """The general form; `None` for the plain one."""
    alias_of: str | None
    """HuggingFace name of the tensor that this one is tied to. The export stores only that one."""
    parts: tuple[SpecPart, ...] = field(repr=False, compare=False)
    """The compiled form: one part per HuggingFace name, in order."""

    def __init__(  # noqa: PLR0917 - the order is public
        self,
        name: str,
        hf_keys: Sequence[str] | str = (),
        global_shape: Sequence[int] = (),
        fused_dim: int | None = None,
        shards: Iterable[ShardSpec] = (),
        origin_shape: Sequence[int] | None = None,
        *,
        fused_sizes: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        pieces: Iterable[Piece] | None = None,
        alias_of: str | None = None,
    ) -> None:
        """Check, normalise and compile. One key may be a string; `fused_dim` may be negative.

        Raises:
            SpecError: If keys, shapes, sizes and pieces do not fit together.
        """
        shape = tuple(int(n) for n in global_shape)
        dim = 0 if fused_dim is None else fused_dim
        general = None if pieces is None else tuple(pieces)
        keys = (hf_keys,) if isinstance(hf_keys, str) else tuple(hf_keys)
        if general is not None and not keys:
            keys = tuple(dict.fromkeys(piece.key for piece in general))
        values = {
            "name": name,
            "hf_keys": keys,
            "global_shape": shape,
            "fused_dim": dim + len(shape) if dim < 0 else dim,
            "shards": tuple(shards),
            "origin_shape": shape if origin_shape is None else _ints(origin_shape),
            "fused_sizes": None if fused_sizes is None else _ints(fused_sizes),
            "dtype": dtype,
            "pieces": general,
            "alias_of": alias_of,
        }
        for attribute, value in values.items():
            object.__setattr__(self, attribute, value)
        self._check()
        parts = self._plain_parts() if general is None else self._parts_of(general)
        object.__setattr__(self, "parts", parts)

    @classmethod
    def from_tensor(
        cls,
        *,
        name: str,
        hf_keys: Sequence[str] | str,
        tensor: torch.Tensor,
        fused_dim: int | None = None,
        origin_shape: Sequence[int] | None = None,
    ) -> LoadSpec:
        """Make the spec of a runtime tensor. A DTensor gives its global shape and its shards.

        The shards are those that this rank holds now. A later save or load of a DTensor reads the
        placements of that DTensor instead.

        Raises:
            SpecError: As the constructor.
            PlanningError: If a DTensor has a placement that cannot be saved, such as `Partial`.
        """
        return cls(name, hf_keys, tuple(tensor.shape), fused_dim, _shards_of(tensor), origin_shape)

    def _plain_parts(self) -> tuple[SpecPart, ...]:
        origin = self.origin_shape
        if len(self.hf_keys) == 1:
            return (whole_part(self.hf_keys[0], origin),)
        dim, parts, start = self.fused_dim, [], 0
        for key, size in zip(self.hf_keys, self._part_sizes(), strict=True):
            offsets = tuple(start if d == dim else 0 for d in range(len(origin)))
            sizes = tuple(size if d == dim else n for d, n in enumerate(origin))
            parts.append(_part(key, Box(offsets, sizes)))
            start += size
        return tuple(parts)

    def _parts_of(self, pieces: Iterable[Piece]) -> tuple[SpecPart, ...]:
        shapes: dict[str, Shape] = {}
        found: dict[str, list[tuple[Copy, ...]]] = {key: [] for key in self.hf_keys}
        for piece in pieces:
            shape = shapes.setdefault(piece.key, piece.shape)
            if shape != piece.shape or piece.key not in found:
                self._refuse(
                    f"a piece of {piece.key!r} disagrees with hf_keys or with an earlier piece",
                    expected=f"a key of {list(found)}, and shape {list(shape)} for this key",
                    found=f"key {piece.key!r}, shape {list(piece.shape)}",
                )
            try:
                copies = copies_of(
                    piece.loops,
                    hf_start=piece.hf_start,
                    start=piece.start,
                    hf_shape=piece.shape,
                    shape=self.global_shape,
                )
            except ValueError as error:
                self._refuse(
                    f"a piece of {piece.key!r} cannot be copied",
                    expected="steps of at least 1, and loops that stay within both tensors",
                    found=str(error),
                )
            found[piece.key].append(copies)
        if len(shapes) != len(found):
            self._refuse(
                "a key of hf_keys has no piece", found=sorted(found.keys() - shapes.keys())
            )
        return tuple(SpecPart(key, shapes[key], _joined(copies)) for key, copies in found.items())

    def _part_sizes(self) -> tuple[int, ...]:
        if self.fused_sizes is not None:
            return self.fused_sizes
        return (self.origin_shape[self.fused_dim] // len(self.hf_keys),) * len(self.hf_keys)

    def _check(self) -> None:
        is_left_out = self.pieces == () and not self.hf_keys
        if len(set(self.hf_keys)) != len(self.hf_keys) or not (self.hf_keys or is_left_out):
            self._refuse("hf_keys must be one or more distinct names", found=self.hf_keys)
        origin, shape = self.origin_shape, self.global_shape
        if len(origin) != len(shape) or any(
            not 0 <= o <= n for o, n in zip(origin, shape, strict=True)
        ):
            self._refuse(
                "origin_shape must fit in global_shape", expected=f"within {shape}", found=origin
            )
        if not all(isinstance(s, ShardSpec) and s.dim < len(shape) for s in self.shards):
            self._refuse(
                "shards must cut dimensions of the tensor",
                expected=f"ShardSpec objects with dim < {len(shape)}",
                found=self.shards,
            )
        if self.alias_of is not None and len(self.hf_keys) != 1:
            self._refuse("a spec with alias_of must have exactly one key", found=self.hf_keys)
        if self.pieces is None:
            self._check_parts()
        elif self.fused_sizes is not None or origin != shape:
            self._refuse("a spec with pieces must not have fused_sizes or origin_shape as well")

    def _check_parts(self) -> None:
        if len(self.hf_keys) == 1 and self.fused_sizes is None:
            return
        shape = self.global_shape
        if not 0 <= self.fused_dim < len(shape):
            self._refuse(
                "fused_dim must be a dimension of the tensor",
                expected=f"0 <= fused_dim < {len(shape)}",
                found=self.fused_dim,
            )
        extent, sizes = self.origin_shape[self.fused_dim], self._part_sizes()
        if len(sizes) != len(self.hf_keys) or sum(sizes) != extent or min(sizes) < 0:
            self._refuse(
                "the fused parts do not add up to the tensor",
                expected=f"{len(self.hf_keys)} parts that sum to {extent} in dim {self.fused_dim}",
                found=f"{len(sizes)} parts that sum to {sum(sizes)}",
            )

    def _refuse(self, problem: str, *, expected: object = None, found: object = None) -> None:
        raise SpecError(problem, phase="plan", fqn=self.name, expected=expected, found=found)


def _shards_of(tensor: torch.Tensor) -> tuple[ShardSpec, ...]:
    # Read the attributes of a DTensor without importing its class, which needs torch.distributed.
    mesh = getattr(tensor, "device_mesh", None)
    coordinate = None if mesh is None else mesh.get_coordinate()
    if mesh is None or coordinate is None:
        return ()
    return shards_of(getattr(tensor, "placements", ()), mesh.shape, coordinate)


def _ints(values: Iterable[int]) -> Shape:
    return tuple(int(n) for n in values)


def _joined(copies: Sequence[tuple[Copy, ...]]) -> tuple[Copy, ...]:
    # Return the tuple itself, not a copy: specs of equal layers share it, and `plan` checks each
    # shared tuple once.
    return copies[0] if len(copies) == 1 else tuple(itertools.chain.from_iterable(copies))


def whole_part(key: str, shape: Shape) -> SpecPart:
    """Return the part of a tensor that is exported whole, from its first index on.

    Args:
        key: HuggingFace name.
        shape: Shape of the HuggingFace tensor.
    """
    return _part(key, whole(shape))


def _part(key: str, box: Box) -> SpecPart:
    return SpecPart(key, box.sizes, _copies_of_box(box))


@functools.lru_cache(maxsize=1024)
def _copies_of_box(box: Box) -> tuple[Copy, ...]:
    return (copy_of_box(box),) if math.prod(box.sizes) else ()
