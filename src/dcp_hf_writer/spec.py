"""LoadSpec: how one runtime tensor stands for HuggingFace tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer._boxes import Box, Shape, whole
from dcp_hf_writer.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True, slots=True)
class SpecPart:
    """A HuggingFace tensor and the box of the runtime tensor that it is."""

    key: str
    """HuggingFace name."""
    box: Box
    """Where it lies in the runtime tensor; its sizes are the HuggingFace shape."""


@dataclass(frozen=True, slots=True, init=False)
class LoadSpec:
    """How one runtime tensor stands for HuggingFace tensors.

    One key renames the tensor. Several keys are the parts that the runtime tensor fuses along
    `fused_dim`, in order: equal parts, or of the extents in `fused_sizes` (as grouped-query
    attention has them).
    A tensor without a spec keeps its name.
    """

    name: str
    """FQN of the runtime tensor within the model's entry of the state dict."""
    hf_keys: tuple[str, ...]
    """HuggingFace names, in the order in which the runtime tensor holds them."""
    global_shape: Shape
    """Shape of the whole runtime tensor, padding included."""
    fused_dim: int
    """Dimension along which the parts follow one another."""
    fused_sizes: tuple[int, ...] | None
    """Extent of each part along `fused_dim`; `None` means equal parts."""
    origin_shape: Shape
    """Shape without runtime padding; what lies beyond it is not exported."""
    dtype: torch.dtype | None
    """Dtype on disk; overrides the export's."""

    def __init__(
        self,
        name: str,
        hf_keys: Sequence[str] | str,
        global_shape: Sequence[int],
        fused_dim: int | None = None,
        origin_shape: Sequence[int] | None = None,
        *,
        fused_sizes: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check and normalise; a single key may be given as a string, `fused_dim` may be negative.

        Raises:
            SpecError: If keys, shapes and sizes do not fit together.
        """
        shape = tuple(int(n) for n in global_shape)
        origin = shape if origin_shape is None else tuple(int(n) for n in origin_shape)
        keys = (hf_keys,) if isinstance(hf_keys, str) else tuple(hf_keys)
        dim = 0 if fused_dim is None else fused_dim
        sizes = None if fused_sizes is None else tuple(int(n) for n in fused_sizes)
        for field, value in (
            ("name", name),
            ("hf_keys", keys),
            ("global_shape", shape),
            ("fused_dim", dim + len(shape) if dim < 0 else dim),
            ("fused_sizes", sizes),
            ("origin_shape", origin),
            ("dtype", dtype),
        ):
            object.__setattr__(self, field, value)
        self._check()

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
        """Make the spec of a runtime tensor; a DTensor gives its global shape.

        Raises:
            SpecError: As the constructor.
        """
        return cls(name, hf_keys, tuple(tensor.shape), fused_dim, origin_shape)

    def parts(self) -> tuple[SpecPart, ...]:
        """Return the HuggingFace tensors with their boxes of the runtime tensor."""
        origin = self.origin_shape
        if len(self.hf_keys) == 1:
            return (SpecPart(self.hf_keys[0], whole(origin)),)
        dim, parts, start = self.fused_dim, [], 0
        for key, size in zip(self.hf_keys, self._part_sizes(), strict=True):
            offsets = tuple(start if d == dim else 0 for d in range(len(origin)))
            sizes = tuple(size if d == dim else n for d, n in enumerate(origin))
            parts.append(SpecPart(key, Box(offsets, sizes)))
            start += size
        return tuple(parts)

    def _part_sizes(self) -> tuple[int, ...]:
        if self.fused_sizes is not None:
            return self.fused_sizes
        return (self.origin_shape[self.fused_dim] // len(self.hf_keys),) * len(self.hf_keys)

    def _check(self) -> None:
        if not self.hf_keys or len(set(self.hf_keys)) != len(self.hf_keys):
            self._refuse("hf_keys must be one or more distinct names", found=self.hf_keys)
        origin, shape = self.origin_shape, self.global_shape
        if len(origin) != len(shape) or any(
            not 0 <= o <= n for o, n in zip(origin, shape, strict=True)
        ):
            self._refuse(
                "origin_shape must fit in global_shape", expected=f"within {shape}", found=origin
            )
        if len(self.hf_keys) == 1 and self.fused_sizes is None:
            return
        if not 0 <= self.fused_dim < len(shape):
            self._refuse(
                "fused_dim must be a dimension of the tensor",
                expected=f"0 <= fused_dim < {len(shape)}",
                found=self.fused_dim,
            )
        extent, sizes = origin[self.fused_dim], self._part_sizes()
        if len(sizes) != len(self.hf_keys) or sum(sizes) != extent or min(sizes) < 0:
            self._refuse(
                "the fused parts do not add up to the tensor",
                expected=f"{len(self.hf_keys)} parts that sum to {extent} in dim {self.fused_dim}",
                found=f"{len(sizes)} parts that sum to {sum(sizes)}",
            )

    def _refuse(self, problem: str, *, expected: object = None, found: object = None) -> None:
        raise SpecError(problem, phase="plan", fqn=self.name, expected=expected, found=found)
