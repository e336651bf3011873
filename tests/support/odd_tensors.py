"""Tensors that are not plain: the kinds of subclasses that trainers keep in their state dicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

aten = torch.ops.aten


class Named(torch.Tensor):
    """A subclass that adds nothing to what a tensor holds."""


class _Wrapper(torch.Tensor):
    """What the wrapper subclasses have in common: plain tensors by name, and options."""

    names: tuple[str, ...]

    @classmethod
    def _make(cls, shape: torch.Size, dtype: torch.dtype, inner: Mapping[str, torch.Tensor]) -> Any:
        device = next(iter(inner.values())).device
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        for name, value in inner.items():
            setattr(made, name, value)
        return made

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        inner = {name: change(getattr(self, name)) for name in self.names}
        return self._make(self.shape, self.dtype, inner)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Return the names of the tensors inside, and the dtype."""
        return list(self.names), self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, dtype: Any, size: Any, stride: Any) -> Any:
        """Build the wrapper again."""
        return cls._make(size, dtype, inner)


class Coded(_Wrapper):
    """Optimizer state in 8 bits: codes, and a scale for each row. Few operators know it."""

    names = ("codes", "scale")

    @classmethod
    def of(cls, value: torch.Tensor) -> Coded:
        """Encode a matrix."""
        scale = value.abs().amax(1).clamp_min(1e-12) / 127
        codes = (value / scale[:, None]).round().to(torch.int8)
        made: Coded = cls._make(value.shape, value.dtype, {"codes": codes, "scale": scale})
        return made

    def decoded(self) -> torch.Tensor:
        """Return the values."""
        return (self.codes * self.scale[:, None]).to(self.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the few operators that a load and a save need."""
        kwargs = kwargs or {}
        if func is aten.detach.default or (
            func is aten.view.default and tuple(args[1]) == tuple(args[0].shape)
        ):
            return args[0]._map(lambda one: one.detach())
        if func is aten._to_copy.default:
            device = kwargs.get("device")
            return args[0]._map(lambda one: one.to(device=device))
        if func is aten.is_pinned.default:
            return False
        if func is aten.copy_.default:
            target, source = args
            other = source if isinstance(source, Coded) else Coded.of(source)
            for name in cls.names:
                getattr(target, name).copy_(getattr(other, name))
            return target
        msg = f"Coded does not implement {func}"
        raise NotImplementedError(msg)


class Gathered(_Wrapper):
    """A weight that FSDP2 gathers in another dtype. Operators see the weight inside."""

    names = ("weight",)
    _kept = frozenset(
        {
            *(aten.detach.default, aten.clone.default, aten.view.default, aten.slice.Tensor),
            *(aten.as_strided.default, aten._to_copy.default, aten.empty_like.default),
            *(aten.split.Tensor, aten.new_zeros.default, aten.copy_.default),
        }
    )

    @classmethod
    def of(cls, value: torch.Tensor) -> Gathered:
        """Wrap a weight."""
        made: Gathered = cls._make(value.shape, value.dtype, {"weight": value})
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on the weight inside; wrap the result if it is a weight again."""

        def unwrap(value: Any) -> Any:
            return value.weight if isinstance(value, Gathered) else value

        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        if func is aten.copy_.default:
            return args[0]
        if func not in cls._kept:
            return result
        return tree_map(lambda one: cls.of(one) if isinstance(one, torch.Tensor) else one, result)

    def fsdp_pre_all_gather(self, _mesh: Any) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Send the weight in half the bytes."""
        return (self.weight.to(torch.bfloat16),), None  # type: ignore[attr-defined]

    def fsdp_post_all_gather(
        self, outputs: Any, _metadata: Any, dtype: torch.dtype, *, out: Any = None
    ) -> Any:
        """Take the gathered weight as it is."""
        if out is not None:
            return None
        return outputs[0].to(dtype), outputs


def quantized(*, per_channel: bool) -> torch.Tensor:
    """Return a quantised matrix."""
    value = torch.arange(9.0).view(3, 3) / 10
    if per_channel:
        scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
        return torch.quantize_per_channel(value, scales, zeros, 0, torch.qint8)
    return torch.quantize_per_tensor(value, 0.1, 3, torch.quint8)
