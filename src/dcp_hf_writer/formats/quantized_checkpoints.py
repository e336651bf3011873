"""Quantised checkpoints of the hub, seen as the tensors that they stand for.

Pure: no I/O. Two forms are known, by the names and dtypes of the stored tensors:

- fp8: `X.weight` of a one-byte float, `X.weight_scale_inv` with one scale a block;
- mxfp4: `P_blocks` and `P_scales`, which stand for `P`, transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CorruptCheckpointError, PlanningError
from dcp_hf_writer.formats.dequantize import MX_GROUP, MX_GROUP_NBYTES
from dcp_hf_writer.formats.quantized_tensors import BlockScaled, PackedFp4, Stored
from dcp_hf_writer.tensors.boxes import Shape, whole
from dcp_hf_writer.tensors.dtypes import CASTABLE, NAME_BY_TORCH

if TYPE_CHECKING:
    from collections.abc import Collection

Headers = Mapping[str, tuple[str, Shape]]
"""Name of each stored tensor -> its safetensors dtype and its shape."""

DEFAULT_BLOCK = (128, 128)
"""What deepseek_v3 uses, and transformers assumes where the config says nothing."""

_METHODS = ("fp8", "mxfp8", "mxfp4")
_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_PACKED = frozenset({"I8", "U8", "F4"})
_SCALES = frozenset({"F32", "F16", "BF16", "F8_E8M0", "U8"})
# As a config names them; what is stored so needs nothing undone.
_PLAIN = {str(dtype).removeprefix("torch."): NAME_BY_TORCH[dtype] for dtype in CASTABLE}
# Experts, rows, groups, bytes of a group.
_MX_NDIM = 4


def logical_tensors(
    headers: Headers,
    config: Mapping[str, Any] | None,
    *,
    wanted: Collection[str] | None = None,
) -> dict[str, Stored]:
    """Return what the tensors of a directory stand for.

    Args:
        headers: What is stored.
        config: The model's `config.json`, if there is one.
        wanted: Names that the load asks for. A quantised tensor whose scales are among them is
            left as it is stored, for a model that computes with it. `None`: none is.

    Returns:
        By name: quantised tensors under the name that they have in the unquantised model, without
        their scales; all others as they are stored.

    Raises:
        PlanningError: If the checkpoint is quantised in a way that is not known here.
        CorruptCheckpointError: If scales are missing or do not fit, or the config is no config.
    """
    asked = frozenset(wanted or ())
    quantization = _quantization(config)
    method = quantization.get("quant_method") if quantization is not None else None
    groups: dict[str, Stored] = {}
    hidden: set[str] = set()
    if quantization is not None and method not in _METHODS:
        _refuse_method(headers, method, wanted=wanted)
    else:
        rules = _Rules(headers, asked, method, _block(quantization or {}), _compute_dtype(config))
        for key in headers:
            found = rules.group(key)
            if found is not None:
                groups[found.name] = found.tensor
                hidden.update(found.hidden)
    plain = {
        key: Stored(shape, dtype, (key,))
        for key, (dtype, shape) in headers.items()
        if key not in hidden
    }
    return plain | groups


@dataclass(frozen=True, slots=True)
class _Group:
    """A quantised tensor, found by one of its stored tensors."""

    name: str
    tensor: Stored
    hidden: tuple[str, ...]
    """Stored tensors that are no tensors of the unquantised model."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """What decides which stored tensors belong together."""

    headers: Headers
    asked: frozenset[str]
    method: str | None
    block: tuple[int, int] | None
    dtype: str

    def group(self, key: str) -> _Group | None:
        """Return the quantised tensor whose codes are under `key`, if they are codes."""
        dtype, _ = self.headers[key]
        if dtype == "U8" and key.endswith("_blocks"):
            return self._packed(key.removesuffix("_blocks"))
        if dtype in _FP8:
            return self._scaled(key)
        if dtype in _PACKED and self.method in {"fp8", "mxfp8"}:
            self._refuse_packed(key)
        return None

    def _scaled(self, key: str) -> _Group | None:
        scale_key = self._scale_key(key)
        if scale_key is None:
            self._refuse_unscaled(key)
            return None
        if scale_key in self.asked:
            return None
        shape, (dtype, scale_shape) = self.headers[key][1], self.headers[scale_key]
        if dtype not in _SCALES or len(shape) < len(DEFAULT_BLOCK):
            raise PlanningError(
                "fp8 weight in a form that is not known",
                phase="plan",
                key=key,
                expected=f"two dimensions or more, scales of dtype {', '.join(sorted(_SCALES))}",
                found=f"shape {list(shape)}, scales of dtype {dtype}",
            )
        block = _block_of(key, shape, scale_shape, self.block)
        tensor = BlockScaled(shape, self.dtype, (key, scale_key), scale_shape, block)
        return _Group(key, tensor, (key, scale_key, *self._activation_scales(key)))

    def _packed(self, name: str) -> _Group | None:
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        if scales not in self.headers and self.method != "mxfp4":
            return None
        if not self.asked.isdisjoint((blocks, scales)):
            return None
        shape, (dtype, scale_shape) = self.headers[blocks][1], self.headers.get(scales, ("", ()))
        whole_groups = len(shape) == _MX_NDIM and shape == (*scale_shape, MX_GROUP_NBYTES)
        if dtype != "U8" or not whole_groups:
            raise CorruptCheckpointError(
                "mxfp4 scales are missing or do not fit their blocks",
                phase="plan",
                key=scales,
                expected=f"U8 of shape {list(shape[:3])} for blocks (experts, rows, groups, 16)",
                found=f"{dtype} of shape {list(scale_shape)}" if dtype else "nothing",
            )
        if name in self.headers:
            raise CorruptCheckpointError(
                "tensor is stored both quantised and as it is",
                phase="plan",
                key=name,
                found=f"{name}, {blocks}, {scales}",
            )
        experts, rows, groups = scale_shape
        tensor = PackedFp4((experts, groups * MX_GROUP, rows), self.dtype, (blocks, scales))
        return _Group(name, tensor, (blocks, scales))

    def _scale_key(self, key: str) -> str | None:
        module, _, last = key.rpartition(".")
        names = (f"{key}_scale_inv", *([f"{module}.scale"] if last == "weight" else []))
        return next((name for name in names if name in self.headers), None)

    def _activation_scales(self, key: str) -> tuple[str, ...]:
        stem = key.removesuffix("weight") if key.endswith(".weight") else f"{key}_"
        name = f"{stem}activation_scale"
        return (name,) if name in self.headers and name not in self.asked else ()

    def _refuse_unscaled(self, key: str) -> None:
        others = [name for name in (f"{key}_scale", f"{key}_scales") if name in self.headers]
        if not others and self.method is None:
            return
        if others and self.asked.issuperset(others):
            return
        kind = PlanningError if others else CorruptCheckpointError
        raise kind(
            "fp8 weight without scales of a known form",
            phase="plan",
            key=key,
            expected=f"{key}_scale_inv",
            found=", ".join(others) or "nothing",
            hint="without its scale the values of this weight are unknown",
        )

    def _refuse_packed(self, key: str) -> None:
        scale_key = self._scale_key(key)
        if scale_key is None or scale_key in self.asked:
            return
        raise PlanningError(
            "weight with scales is not stored as fp8",
            phase="plan",
            key=key,
            expected=f"one of {', '.join(sorted(_FP8))}",
            found=self.headers[key][0],
            hint="packed fp4 is known as mxfp4 with _blocks and _scales only",
        )


def _block_of(
    key: str, shape: Shape, scale_shape: Shape, block: tuple[int, int] | None
) -> tuple[int, int]:
    """Return rows and columns of a block.

    The config's, if the scales are as many as that makes; else, as transformers does, what the
    scales divide the weight into, if they do so evenly: a checkpoint may mix block sizes.
    """
    rows, columns = shape[-2:]
    if whole(scale_shape).numel == 1:
        return max(rows, 1), max(columns, 1)
    fits = len(scale_shape) == len(shape) and scale_shape[:-2] == shape[:-2]
    if fits and block and scale_shape[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    if fits and all(
        count and size and size % count == 0
        for size, count in zip(shape[-2:], scale_shape[-2:], strict=True)
    ):
        return rows // scale_shape[-2], columns // scale_shape[-1]
    raise CorruptCheckpointError(
        "scales of an fp8 weight do not fit it",
        phase="plan",
        key=key,
        expected=f"one per block of {list(block or shape[-2:])} in {list(shape)}",
        found=f"shape {list(scale_shape)}",
    )


def _places(config: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the config and that of its text model, where multimodal models say it."""
    return [one for one in (config, (config or {}).get("text_config")) if isinstance(one, Mapping)]


def _quantization(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the quantisation that a config declares, for the whole or for its text model."""
    for place in _places(config):
        found = place.get("quantization_config")
        if isinstance(found, Mapping):
            return found
        if found is not None:
            raise CorruptCheckpointError(
                "quantization_config of the config is no mapping", found=repr(found)[:200]
            )
    return None


def _block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the declared block; `None` if it is declared that there is none."""
    value = quantization.get("weight_block_size", DEFAULT_BLOCK)
    if value is None:
        return None
    if (
        isinstance(value, (list, tuple))
        and len(value) == len(DEFAULT_BLOCK)
        and all(type(size) is int and size > 0 for size in value)
    ):
        return value[0], value[1]
    raise CorruptCheckpointError(
        "weight_block_size of the config is no pair of sizes",
        expected="two positive integers",
        found=repr(value)[:200],
    )


def _compute_dtype(config: Mapping[str, Any] | None) -> str:
    """Return the dtype that the config gives for the unquantised model; bf16 if none."""
    for place in _places(config):
        for name in ("dtype", "torch_dtype"):
            value = place.get(name)
            if isinstance(value, str) and value in _PLAIN:
                return _PLAIN[value]
    return _PLAIN["bfloat16"]


def _refuse_method(headers: Headers, method: object, *, wanted: Collection[str] | None) -> None:
    """Let a method that is not known pass where nothing needs to be undone."""
    asked = frozenset(wanted or ())
    plain = {key for key, (dtype, _) in headers.items() if dtype in _PLAIN.values()}
    if wanted is not None and (asked >= headers.keys() or asked <= plain):
        return
    raise PlanningError(
        "checkpoint is quantised by a method that cannot be undone on load",
        phase="plan",
        expected=f"quant_method {', '.join(_METHODS)}",
        found=repr(method)[:200],
        hint="dequantise it with the library that made it, or load all its tensors as stored",
    )
