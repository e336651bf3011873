"""Present the quantised checkpoints of the hub as the unquantised tensors that they encode.

Pure: no I/O. This module recognises two forms by the names and dtypes of the stored tensors:

- fp8: `X.weight` holds one-byte floats, and `X.weight_scale_inv` or `X.scale` one scale per block;
- mxfp4: `P_blocks` and `P_scales` together encode `P`, with its last two dimensions swapped.
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
"""Safetensors dtype and shape of each stored tensor, by name."""

DEFAULT_BLOCK = (128, 128)
"""Block size of deepseek_v3, and the default of transformers if the config gives none."""

_METHODS = ("fp8", "mxfp8", "mxfp4")
_FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_PACKED = frozenset({"I8", "U8", "F4"})
_SCALES = frozenset({"F32", "F16", "BF16", "F8_E8M0", "U8"})
# Dtypes by their name in a config. Tensors stored in one of them are not quantised.
_PLAIN = {str(dtype).removeprefix("torch."): NAME_BY_TORCH[dtype] for dtype in CASTABLE}
# Experts, rows, groups, bytes of a group.
_MX_NDIM = 4


def logical_tensors(
    headers: Headers,
    config: Mapping[str, Any] | None,
    *,
    wanted: Collection[str] | None = None,
) -> dict[str, Stored]:
    """Return the logical tensors of a directory.

    Args:
        headers: The stored tensors.
        config: The model's `config.json`, or `None` if there is none.
        wanted: Names to load. If they include the scales of a quantised tensor, that tensor stays
            as stored, because the model computes with its codes. `None` keeps no tensor as stored.

    Returns:
        Logical tensors by name. A quantised tensor has its name in the unquantised model, and its
        scales are left out. All other tensors are as stored.

    Raises:
        PlanningError: If the checkpoint is quantised in a form that this module does not support.
        CorruptCheckpointError: If scales are missing or do not fit, or the config is invalid.
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
    """A quantised tensor, and the stored tensors that encode it."""

    name: str
    tensor: Stored
    hidden: tuple[str, ...]
    """Stored tensors that the logical tensor replaces."""


@dataclass(frozen=True, slots=True)
class _Rules:
    """Rules that decide which stored tensors belong together."""

    headers: Headers
    asked: frozenset[str]
    method: str | None
    block: tuple[int, int] | None
    dtype: str

    def group(self, key: str) -> _Group | None:
        """Return the quantised tensor with its codes at `key`; `None` to keep `key` as stored."""
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
                "an fp8 weight has an unsupported form",
                phase="plan",
                key=key,
                expected=f"two or more dimensions, scales of dtype {', '.join(sorted(_SCALES))}",
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
                expected=f"U8 of shape {list(shape[:3])}, for blocks (experts, rows, groups, 16)",
                found=f"{dtype} of shape {list(scale_shape)}" if dtype else "nothing",
            )
        if name in self.headers:
            raise CorruptCheckpointError(
                "a tensor is stored twice, quantised and unquantised",
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
            "an fp8 weight has no scales in a supported form",
            phase="plan",
            key=key,
            expected=f"{key}_scale_inv",
            found=", ".join(others) or "nothing",
            hint="restore or convert the scales; without them its values are unknown",
        )

    def _refuse_packed(self, key: str) -> None:
        scale_key = self._scale_key(key)
        if scale_key is None or scale_key in self.asked:
            return
        raise PlanningError(
            "a weight with fp8 scales is not stored as fp8",
            phase="plan",
            key=key,
            expected=f"one of {', '.join(sorted(_FP8))}",
            found=self.headers[key][0],
            hint="packed fp4 is supported only as mxfp4, stored as _blocks and _scales",
        )


def _block_of(
    key: str, shape: Shape, scale_shape: Shape, block: tuple[int, int] | None
) -> tuple[int, int]:
    """Return the rows and columns of a block.

    If the scales fit the block size of the config, use that size. Otherwise derive the size from
    the scales, if they divide the weight evenly. A checkpoint may mix block sizes, and transformers
    does the same.
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
        "the scales of an fp8 weight do not fit the weight",
        phase="plan",
        key=key,
        expected=f"one scale per block of {list(block or shape[-2:])} in {list(shape)}",
        found=f"scales of shape {list(scale_shape)}",
    )


def _places(config: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the config, and the `text_config` in which multimodal models nest some settings."""
    return [one for one in (config, (config or {}).get("text_config")) if isinstance(one, Mapping)]


def _quantization(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the first `quantization_config`, of the whole model or of its text model."""
    for place in _places(config):
        found = place.get("quantization_config")
        if isinstance(found, Mapping):
            return found
        if found is not None:
            raise CorruptCheckpointError(
                "quantization_config of the config is not a mapping", found=repr(found)[:200]
            )
    return None


def _block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the declared block size, or the default; `None` if it is declared as null."""
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
        "weight_block_size of the config is not a pair of sizes",
        expected="two positive integers",
        found=repr(value)[:200],
    )


def _compute_dtype(config: Mapping[str, Any] | None) -> str:
    """Return the dtype of the unquantised model as the config gives it; BF16 if it does not."""
    for place in _places(config):
        for name in ("dtype", "torch_dtype"):
            value = place.get(name)
            if isinstance(value, str) and value in _PLAIN:
                return _PLAIN[value]
    return _PLAIN["bfloat16"]


def _refuse_method(headers: Headers, method: object, *, wanted: Collection[str] | None) -> None:
    """Refuse an unsupported method, unless the load needs nothing dequantised."""
    asked = frozenset(wanted or ())
    plain = {key for key, (dtype, _) in headers.items() if dtype in _PLAIN.values()}
    if wanted is not None and (asked >= headers.keys() or asked <= plain):
        return
    raise PlanningError(
        "the checkpoint is quantised by an unsupported method",
        phase="plan",
        expected=f"quant_method {', '.join(_METHODS)}",
        found=repr(method)[:200],
        hint="dequantise it with the library that made it, or load all its tensors as stored",
    )
