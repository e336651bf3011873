"""What specs say, carried out on whole tensors, element by element."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from support.compare import bits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    from dcp_hf_writer import LoadSpec

Positions = tuple["npt.NDArray[np.int64]", "npt.NDArray[np.int64]"]


def assemble(
    specs: Iterable[LoadSpec], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the HuggingFace tensors that specs make of whole runtime tensors.

    Works from what the specs declare, not from what they compile to, and sees that each element is
    given once.
    """
    found: dict[str, torch.Tensor] = {}
    times: dict[str, npt.NDArray[np.int64]] = {}
    for spec in specs:
        tensor = tensors[spec.name].detach()
        assert tuple(tensor.shape) == spec.global_shape, spec.name
        flat = tensor.to(spec.dtype or tensor.dtype).contiguous().reshape(-1)
        for key, shape, hf, runtime in _positions(spec):
            if key not in found:
                found[key] = torch.zeros(shape, dtype=flat.dtype)
                times[key] = np.zeros(math.prod(shape), np.int64)
            assert tuple(found[key].shape) == shape, key
            found[key].view(-1)[torch.from_numpy(hf)] = flat[torch.from_numpy(runtime)]
            np.add.at(times[key], hf, 1)
    wrong = [key for key, count in times.items() if (count != 1).any()]
    assert not wrong, f"elements of {wrong} are given {[set(times[key]) for key in wrong]} times"
    return found


def compiled(
    specs: Iterable[LoadSpec], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Do as `assemble`, with what the specs compile to."""
    from dcp_hf_writer.tensors.strided_copies import hf_view, runtime_view

    found: dict[str, torch.Tensor] = {}
    for spec in specs:
        tensor = tensors[spec.name].detach().contiguous()
        tensor = tensor.to(spec.dtype or tensor.dtype)
        for part in spec.parts if spec.alias_of is None else ():
            made = found.setdefault(part.key, torch.zeros(part.shape, dtype=tensor.dtype))
            for copy in part.copies:
                hf_view(made, copy).copy_(runtime_view(tensor, copy))
    return found


def differences(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> list[str]:
    """Name every way in which two sets of tensors differ."""
    said = [f"missing {sorted(expected.keys() - found.keys())}"] * (expected.keys() > found.keys())
    said += [f"unexpected {key}" for key in found if key not in expected]
    for key, want in expected.items():
        have = found.get(key)
        if have is None:
            said.append(f"missing {key}")
        elif (have.dtype, have.shape) != (want.dtype, want.shape):
            said.append(f"{key}: {have.dtype} {list(have.shape)}, not {want.dtype} {want.shape}")
        elif not torch.equal(bits(have), bits(want)):
            said.append(f"{key}: other elements")
    return said


def _positions(
    spec: LoadSpec,
) -> Iterable[tuple[str, tuple[int, ...], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    if spec.alias_of is not None:
        return
    if spec.pieces is not None:
        for piece in spec.pieces:
            hf = np.array([piece.hf_start], np.int64)
            runtime = np.array([piece.start], np.int64)
            for extent, hf_step, step in piece.loops:
                i = np.arange(extent, dtype=np.int64)
                hf = (hf[:, None] + i * hf_step).reshape(-1)
                runtime = (runtime[:, None] + i * step).reshape(-1)
            yield piece.key, piece.shape, hf, runtime
        return
    numbers = np.arange(math.prod(spec.global_shape)).reshape(spec.global_shape)
    numbers = numbers[tuple(slice(n) for n in spec.origin_shape)]
    parts = [numbers]
    if len(spec.hf_keys) > 1:
        sizes = spec.fused_sizes or [numbers.shape[spec.fused_dim] // len(spec.hf_keys)] * (
            len(spec.hf_keys) - 1
        )
        parts = np.split(numbers, np.cumsum(sizes)[: len(spec.hf_keys) - 1], axis=spec.fused_dim)
    for key, part in zip(spec.hf_keys, parts, strict=True):
        yield key, part.shape, np.arange(part.size), part.reshape(-1)
