"""Quantised tensors, against transformers' own dequantisation and at every border of a shard."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dcp_hf_writer.errors import CorruptCheckpointError, PlanningError
from dcp_hf_writer.formats import dequantize
from dcp_hf_writer.formats.quantized_checkpoints import logical_tensors
from dcp_hf_writer.tensors.boxes import Box, whole
from dcp_hf_writer.tensors.dtypes import NAME_BY_TORCH

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dcp_hf_writer.formats.quantized_tensors import Stored

FP8 = torch.float8_e4m3fn
BF16, F32 = torch.bfloat16, torch.float32
TARGETS = (BF16, F32, torch.float16)
# 255, the reserved one, is NaN to the standard; what torch.ldexp makes of it changed with torch.
SCALE_BYTES = 255


@pytest.fixture(scope="module")
def fp8_op() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    return Fp8Dequantize(None)


def headers_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key: (NAME_BY_TORCH[t.dtype], tuple(t.shape)) for key, t in tensors.items()}


def config_of(method: str = "fp8", **rest: object) -> dict[str, object]:
    return {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": method, **rest}}


def read(
    stored: Stored, tensors: Mapping[str, torch.Tensor], box: Box, out: torch.Tensor
) -> torch.Tensor:
    """Load a box as a reader would: nothing but the boxes that are asked for."""
    raw = {
        key: tensors[key][tuple(map(slice, part.offsets, stops_of(part)))].clone()
        for key, part in stored.raw_boxes(box).items()
    }
    stored.dequantize(box, raw, out)
    return out


def stops_of(box: Box) -> list[int]:
    return [offset + size for offset, size in zip(box.offsets, box.sizes, strict=True)]


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(map(slice, box.offsets, stops_of(box)))]


def read_whole(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype = F32,
) -> torch.Tensor:
    stored = logical_tensors(headers_of(tensors), config)[name]
    return read(stored, tensors, whole(stored.shape), torch.empty(stored.shape, dtype=dtype))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, but for the sign and payload of a NaN, which the processor chooses."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if not found.numel():
        return
    isnan = expected.isnan()
    assert torch.equal(found.isnan(), isnan)
    differs = (bytes_of(found) != bytes_of(expected)).any(-1)
    assert not (differs & ~isnan.flatten()).any()


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(torch.uint8).view(-1, tensor.element_size())


def random_codes(shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def random_scales(shape: tuple[int, ...], *, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3 + 1e-6


def naive_fp8(
    codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    rows, columns = codes.shape[-2:]
    wide = scales.to(F32).repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return (codes.to(F32) * wide[..., :rows, :columns]).to(dtype)


def naive_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    table = torch.cat((values, -values))
    pairs = torch.stack((table[(blocks & 15).int()], table[(blocks >> 4).int()]), -1)
    flat = pairs.flatten(-2) * 2.0 ** (scales.double() - 127)[..., None]
    return flat.flatten(-2).to(F32).to(dtype).transpose(-1, -2)


def fp8_tensors(
    shape: tuple[int, ...], block: tuple[int, int] = (128, 128)
) -> dict[str, torch.Tensor]:
    grid = (*shape[:-2], *(-(-s // b) for s, b in zip(shape[-2:], block, strict=True)))
    return {"a.weight": random_codes(shape).view(FP8), "a.weight_scale_inv": random_scales(grid)}


def mxfp4_tensors(experts: int, rows: int, groups: int) -> dict[str, torch.Tensor]:
    return {
        "e.gate_up_proj_blocks": random_codes((experts, rows, groups, 16)),
        "e.gate_up_proj_scales": random_codes((experts, rows, groups), seed=1) % SCALE_BYTES,
    }


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    starts = [draw(st.integers(0, size)) for size in shape]
    sizes = [draw(st.integers(0, size - start)) for size, start in zip(shape, starts, strict=True)]
    return Box(tuple(starts), tuple(sizes))


@st.composite
def targets(draw: st.DrawFn, sizes: tuple[int, ...]) -> torch.Tensor:
    """Memory for a box, contiguous or not, that shows what is written beside it."""
    dtype = draw(st.sampled_from(TARGETS))
    if not draw(st.booleans()):
        return torch.full(sizes, 7, dtype=dtype)
    padded = torch.full([2 * size + 1 for size in reversed(sizes)], 7, dtype=dtype)
    return padded[tuple(slice(1, None, 2) for _ in sizes)].permute(*reversed(range(len(sizes))))


# ---------------------------------------------------------------------------------------- fp8


def by_transformers(
    fp8_op: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Dequantise as transformers does for a parameter of a dtype."""
    model = torch.nn.Linear(1, 1, dtype=dtype)
    lists = {key: [tensor] for key, tensor in tensors.items()}
    found: torch.Tensor
    (found,) = fp8_op.convert(lists, full_layer_name="weight", model=model)["a.weight"]
    return found


@pytest.mark.parametrize("dtype", TARGETS, ids=str)
@pytest.mark.parametrize("scale_dtype", [F32, BF16, torch.float8_e8m0fnu, torch.uint8], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((384, 256), (128, 128)), ((64, 96), (1, 32)), ((3, 128, 64), (32, 64))],
    ids=str,
)
def test_fp8_equals_transformers(
    fp8_op: Any,
    shape: tuple[int, ...],
    block: tuple[int, int],
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    tensors = fp8_tensors(shape, block)
    scales = tensors["a.weight_scale_inv"]
    # Of every exponent, for bytes.
    random = random_codes(tuple(scales.shape), seed=3) % SCALE_BYTES
    as_bytes = scale_dtype.itemsize == 1
    tensors["a.weight_scale_inv"] = random.view(scale_dtype) if as_bytes else scales.to(scale_dtype)
    expected = by_transformers(fp8_op, tensors, dtype)
    found = read_whole("a.weight", tensors, config_of(weight_block_size=list(block)), dtype)
    assert_same(found, expected)


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)], ids=str)
def test_fp8_of_one_scale_equals_transformers(fp8_op: Any, scale_shape: tuple[int, ...]) -> None:
    tensors = {
        "a.weight": random_codes((33, 65)).view(FP8),
        "a.weight_scale_inv": torch.full(scale_shape, 0.37),
    }
    expected = by_transformers(fp8_op, tensors, BF16)
    found = read_whole("a.weight", tensors, config_of(weight_block_size=None), BF16)
    assert_same(found, expected)


@pytest.mark.parametrize("code_dtype", [FP8, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str)
def test_every_code_is_decoded_as_torch_does(code_dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(3)[None].view(code_dtype)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.ones(1, 6)}
    assert_same(read_whole("a.weight", tensors, config_of()), codes.to(F32))


def test_borders_of_a_padded_grid_follow_the_block_of_the_config() -> None:
    # transformers would divide 192 rows by 2 scales, into blocks of 96.
    tensors = fp8_tensors((192, 576))
    expected = naive_fp8(tensors["a.weight"], tensors["a.weight_scale_inv"], (128, 128), BF16)
    assert_same(read_whole("a.weight", tensors, config_of(), BF16), expected)


def test_blocks_that_the_config_does_not_name_follow_from_the_scales() -> None:
    tensors = fp8_tensors((64, 96), (1, 32))
    expected = naive_fp8(tensors["a.weight"], tensors["a.weight_scale_inv"], (1, 32), F32)
    assert_same(read_whole("a.weight", tensors, config_of()), expected)


@given(st.data())
def test_any_box_of_fp8_equals_that_of_the_whole(data: st.DataObject) -> None:
    block = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    lead = data.draw(st.lists(st.integers(1, 3), max_size=1))
    shape = (*lead, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    tensors = fp8_tensors(shape, block)
    stored = logical_tensors(headers_of(tensors), config_of(weight_block_size=block))["a.weight"]
    assert (stored.shape, stored.dtype) == (shape, "BF16")
    box = data.draw(boxes(shape))
    out = data.draw(targets(box.sizes))
    expected = naive_fp8(*tensors.values(), block, out.dtype)
    with tiles_of(data.draw(st.sampled_from([1, 7, 64, 1 << 17]))):
        read(stored, tensors, box, out)
    assert_same(out, part_of(expected, box))


@given(st.data())
def test_boxes_of_fp8_are_no_larger_than_needed(data: st.DataObject) -> None:
    block = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    shape = (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    tensors = fp8_tensors(shape, block)
    stored = logical_tensors(headers_of(tensors), config_of(weight_block_size=block))["a.weight"]
    box = data.draw(boxes(shape))
    marks = torch.zeros(shape, dtype=torch.bool)
    part_of(marks, box).fill_(value=True)
    needed = {(row // block[0], column // block[1]) for row, column in marks.nonzero().tolist()}
    raw = stored.raw_boxes(box)
    if not box.numel:
        assert raw == {}
        return
    assert raw["a.weight"] == box
    if math.prod(stored.shape) and tensors["a.weight_scale_inv"].numel() > 1:
        grid = raw["a.weight_scale_inv"]
        cells = {(r, c) for r in span(grid, 0) for c in span(grid, 1)}
        assert cells == needed


def span(box: Box, dim: int) -> range:
    return range(box.offsets[dim], box.offsets[dim] + box.sizes[dim])


# -------------------------------------------------------------------------------------- mxfp4


@pytest.mark.parametrize("dtype", TARGETS, ids=str)
def test_mxfp4_equals_transformers_for_every_byte_and_scale(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    count = SCALE_BYTES * 16
    tensors = {
        "e.gate_up_proj_blocks": torch.arange(256, dtype=torch.uint8)
        .repeat(SCALE_BYTES)
        .view(1, SCALE_BYTES, 16, 16),
        "e.gate_up_proj_scales": torch.arange(count).div(16).to(torch.uint8).view(1, -1, 16),
    }
    # transformers calls `torch.ldexp`, which rounds the power of two to float16 in torch 2.10.
    half, sixteen = torch.tensor([0.5], dtype=torch.float16), torch.tensor([16])
    is_exact = bool(torch.ldexp(half, sixteen).isfinite())
    computed = dtype if is_exact else torch.float32
    expected = convert_moe_packed_tensors(*tensors.values(), dtype=computed).to(dtype)
    found = read_whole("e.gate_up_proj", tensors, config_of("mxfp4"), dtype)
    assert_same(found, expected)


def test_mxfp4_of_many_experts_equals_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = mxfp4_tensors(3, 22, 5)
    expected = convert_moe_packed_tensors(*tensors.values())
    assert expected.shape == (3, 160, 22)
    assert_same(read_whole("e.gate_up_proj", tensors, config_of("mxfp4"), BF16), expected)


@given(st.data())
def test_any_box_of_mxfp4_equals_that_of_the_whole(data: st.DataObject) -> None:
    experts, rows, groups = (data.draw(st.integers(1, top)) for top in (3, 20, 4))
    tensors = mxfp4_tensors(experts, rows, groups)
    stored = logical_tensors(headers_of(tensors), config_of("mxfp4"))["e.gate_up_proj"]
    assert (stored.shape, stored.dtype) == ((experts, groups * 32, rows), "BF16")
    box = data.draw(boxes(stored.shape))
    out = data.draw(targets(box.sizes))
    expected = naive_mxfp4(*tensors.values(), out.dtype)
    with tiles_of(data.draw(st.sampled_from([32, 64, 200, 1 << 17]))):
        read(stored, tensors, box, out)
    assert_same(out, part_of(expected, box))


def test_boxes_of_mxfp4_are_whole_groups() -> None:
    stored = logical_tensors(headers_of(mxfp4_tensors(4, 20, 5)), None)["e.gate_up_proj"]
    assert stored.raw_boxes(Box((1, 33, 2), (2, 63, 7))) == {
        "e.gate_up_proj_blocks": Box((1, 2, 1, 0), (2, 7, 2, 16)),
        "e.gate_up_proj_scales": Box((1, 2, 1), (2, 7, 2)),
    }


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("a.weight", fp8_tensors((4, 384, 640))), ("e.gate_up_proj", mxfp4_tensors(4, 6, 8))],
    ids=["fp8", "mxfp4"],
)
def test_half_of_the_first_dimensions_of_the_file_is_one_run(
    name: str, tensors: dict[str, torch.Tensor]
) -> None:
    stored = logical_tensors(headers_of(tensors), None)[name]
    sizes = list(stored.shape)
    for number, dim in enumerate(stored.dims_in_file[:2]):
        sizes[dim] = 1 if number == 0 else sizes[dim] // 2
    codes = stored.keys[0]
    part = stored.raw_boxes(Box((0, 0, 0), tuple(sizes)))[codes]
    assert part_of(tensors[codes], part).is_contiguous()


# --------------------------------------------------------------------------- tiles and memory


@contextlib.contextmanager
def tiles_of(numel: int) -> Iterator[None]:
    """Let tiles have so many elements; a fixture would outlive the example."""
    before = dequantize._TILE_NUMEL
    dequantize._TILE_NUMEL = numel
    try:
        yield
    finally:
        dequantize._TILE_NUMEL = before


class LargestNew(TorchDispatchMode):
    """Notes the size of the largest memory that torch allocates."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tensors_in(args)}
        for tensor in tensors_in([result]):
            if tensor.untyped_storage().data_ptr() not in known:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    return (value for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("name", "tensors", "config"),
    [
        ("a.weight", fp8_tensors((1300, 1111)), config_of()),
        ("a.weight", fp8_tensors((5, 300_000)), config_of()),
        ("a.weight", fp8_tensors((5, 300_000), (1, 32)), config_of(weight_block_size=[1, 32])),
        ("e.gate_up_proj", mxfp4_tensors(2, 600, 40), config_of("mxfp4")),
        ("e.gate_up_proj", mxfp4_tensors(1, 3, 10_000), config_of("mxfp4")),
    ],
    ids=["fp8", "fp8-wide", "mxfp8-wide", "mxfp4", "mxfp4-wide"],
)
def test_temporary_memory_is_that_of_a_tile(
    name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    stored = logical_tensors(headers_of(tensors), config)[name]
    out = torch.empty(stored.shape, dtype=BF16)
    assert out.numel() > 4 * dequantize._TILE_NUMEL
    with LargestNew() as seen:
        stored.dequantize(whole(stored.shape), tensors, out)
    # Indices of a tile's columns are eight bytes each; all else is four bytes an element.
    assert 0 < seen.nbytes <= 8 * dequantize._TILE_NUMEL
    block = config["quantization_config"].get("weight_block_size", [128, 128])
    expected = (
        naive_fp8(*tensors.values(), tuple(block), BF16)
        if name == "a.weight"
        else naive_mxfp4(*tensors.values(), BF16)
    )
    assert_same(out, expected)


def test_nothing_depends_on_the_default_device_or_dtype() -> None:
    tensors = {**fp8_tensors((130, 140)), **mxfp4_tensors(1, 5, 2)}
    logical = logical_tensors(headers_of(tensors), None)
    for stored in logical.values():
        expected = read(stored, tensors, whole(stored.shape), torch.empty(stored.shape))
        out = torch.empty(stored.shape)
        before = torch.get_default_dtype()
        torch.set_default_dtype(BF16)
        try:
            with torch.device("meta"):
                stored.dequantize(whole(stored.shape), tensors, out)
        finally:
            torch.set_default_dtype(before)
        assert_same(out, expected)


# ------------------------------------------------------------------------ what belongs together


def test_other_tensors_are_as_they_are_stored() -> None:
    tensors = {
        "norm.weight": torch.randn(7),
        "head.weight": torch.randn(4, 7, dtype=BF16),
        "ids": torch.arange(3),
        "a_blocks": torch.zeros(2, dtype=torch.uint8),
        "fp8_without_scales": random_codes((4, 4)).view(FP8),
    }
    logical = logical_tensors(headers_of(tensors), {"model_type": "llama"})
    assert {key: (s.dtype, s.shape) for key, s in logical.items()} == headers_of(tensors)
    assert all(s.is_plain for s in logical.values())
    box = Box((1, 2), (3, 4))
    assert logical["head.weight"].raw_boxes(box) == {"head.weight": box}
    found = read(logical["head.weight"], tensors, box, torch.empty(3, 4))
    assert torch.equal(found, tensors["head.weight"][1:4, 2:6].float())


def test_scales_are_no_tensors_of_the_unquantised_model() -> None:
    tensors = {
        **fp8_tensors((4, 4)),
        "a.activation_scale": torch.ones(()),
        **mxfp4_tensors(1, 2, 1),
        "e.gate_up_proj_bias": torch.zeros(1, 2),
        "experts.w": random_codes((2, 4, 4)).view(FP8),
        "experts.w_scale_inv": torch.ones(2, 1, 1),
        "b.weight": random_codes((4, 4)).view(FP8),
        "b.scale": torch.ones(1, 1),
    }
    logical = logical_tensors(headers_of(tensors), config_of())
    plain = {key: s.is_plain for key, s in logical.items()}
    assert plain == {
        "e.gate_up_proj_bias": True,
        "a.weight": False,
        "e.gate_up_proj": False,
        "experts.w": False,
        "b.weight": False,
    }
    assert logical["experts.w"].keys == ("experts.w", "experts.w_scale_inv")
    assert logical["b.weight"].keys == ("b.weight", "b.scale")


def test_quantised_tensors_stay_as_stored_when_their_scales_are_asked_for() -> None:
    tensors = {**fp8_tensors((4, 4)), **mxfp4_tensors(1, 2, 1)}
    logical = logical_tensors(headers_of(tensors), config_of(), wanted=list(tensors))
    assert {key: (s.dtype, s.shape) for key, s in logical.items()} == headers_of(tensors)
    some = logical_tensors(headers_of(tensors), config_of(), wanted=["a.weight", "e.gate_up_proj"])
    assert sorted(some) == ["a.weight", "e.gate_up_proj"]


def test_scales_of_another_name_are_left_to_a_model_that_asks_for_them() -> None:
    tensors = {
        "a.weight": random_codes((4, 4)).view(FP8),
        "a.weight_scale": torch.ones(4, 1),
        **{f"b.{key[2:]}": tensor for key, tensor in fp8_tensors((4, 4)).items()},
        "b.activation_scale": torch.ones(()),
    }
    asked = ["a.weight", "a.weight_scale", "b.weight", "b.activation_scale"]
    logical = logical_tensors(headers_of(tensors), None, wanted=asked)
    assert {key: s.is_plain for key, s in logical.items()} == {
        "a.weight": True,
        "a.weight_scale": True,
        "b.activation_scale": True,
        "b.weight": False,
    }


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (None, "BF16"),
        ({"dtype": "float32"}, "F32"),
        ({"torch_dtype": "float16"}, "F16"),
        ({"torch_dtype": "auto"}, "BF16"),
        ({"text_config": {"dtype": "float32"}}, "F32"),
    ],
)
def test_logical_dtype_is_that_of_the_config(config: dict[str, Any] | None, dtype: str) -> None:
    tensors = fp8_tensors((4, 4))
    assert logical_tensors(headers_of(tensors), config)["a.weight"].dtype == dtype


def test_block_size_of_a_text_model_counts() -> None:
    tensors = fp8_tensors((7, 9), (4, 4))
    config = {"text_config": config_of(weight_block_size=[4, 4])}
    expected = naive_fp8(*tensors.values(), (4, 4), F32)
    assert_same(read_whole("a.weight", tensors, config), expected)


F8, U8 = "F8_E4M3", "U8"
REFUSED = {
    "another-method": (PlanningError, {"a.weight": ("BF16", (4, 4))}, config_of("awq")),
    "no-method": (
        PlanningError,
        {"a.weight": (U8, (4, 4))},
        {"quantization_config": {"load_in_8bit": True}},
    ),
    "scales-of-another-name": (
        PlanningError,
        {"a.weight": (F8, (4, 4)), "a.weight_scale": ("F32", (4, 1))},
        None,
    ),
    "no-scales": (CorruptCheckpointError, {"a.weight": (F8, (4, 4))}, config_of()),
    "packed-fp4": (
        PlanningError,
        {"a.weight": ("I8", (4, 4)), "a.scale": ("F8_E8M0", (4, 1))},
        config_of(),
    ),
    "one-dimension": (
        PlanningError,
        {"a.weight": (F8, (4,)), "a.weight_scale_inv": ("F32", (1,))},
        config_of(),
    ),
    "dtype-of-scales": (
        PlanningError,
        {"a.weight": (F8, (4, 4)), "a.weight_scale_inv": ("I64", (1, 1))},
        config_of(),
    ),
    "number-of-scales": (
        CorruptCheckpointError,
        {"a.weight": (F8, (256, 256)), "a.weight_scale_inv": ("F32", (3, 2))},
        config_of(),
    ),
    "scales-of-fewer-dimensions": (
        CorruptCheckpointError,
        {"a.weight": (F8, (256, 256)), "a.weight_scale_inv": ("F32", (256,))},
        config_of(),
    ),
    "scales-of-no-element": (
        CorruptCheckpointError,
        {"a.weight": (F8, (256, 256)), "a.weight_scale_inv": ("F32", (0, 2))},
        config_of(),
    ),
    "blocks-without-scales": (
        CorruptCheckpointError,
        {"p_blocks": (U8, (1, 2, 3, 16))},
        config_of("mxfp4"),
    ),
    "blocks-of-another-size": (
        CorruptCheckpointError,
        {"p_blocks": (U8, (1, 2, 3, 8)), "p_scales": (U8, (1, 2, 3))},
        config_of("mxfp4"),
    ),
    "fewer-mxfp4-scales": (
        CorruptCheckpointError,
        {"p_blocks": (U8, (1, 2, 3, 16)), "p_scales": (U8, (1, 2, 2))},
        config_of("mxfp4"),
    ),
    "stored-twice": (
        CorruptCheckpointError,
        {
            "p": ("BF16", (1, 96, 2)),
            "p_blocks": (U8, (1, 2, 3, 16)),
            "p_scales": (U8, (1, 2, 3)),
        },
        config_of("mxfp4"),
    ),
    "config-is-no-mapping": (CorruptCheckpointError, {}, {"quantization_config": [1]}),
    "block-of-no-size": (CorruptCheckpointError, {}, config_of(weight_block_size=[0, 128])),
    "block-of-three": (CorruptCheckpointError, {}, config_of(weight_block_size=[1, 2, 3])),
    "block-of-text": (CorruptCheckpointError, {}, config_of(weight_block_size="128")),
    "block-of-floats": (CorruptCheckpointError, {}, config_of(weight_block_size=[128.0, 128.0])),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(case: str) -> None:
    kind, headers, config = REFUSED[case]
    with pytest.raises(kind) as caught:
        logical_tensors(headers, config)
    assert caught.value.found is not None


def test_refusal_names_the_tensor_and_what_was_expected() -> None:
    _, headers, config = REFUSED["number-of-scales"]
    with pytest.raises(CorruptCheckpointError) as caught:
        logical_tensors(headers, config)
    assert str(caught.value) == (
        "plan: the scales of an fp8 weight do not fit the weight (key 'a.weight')"
        "; expected one scale per block of [128, 128] in [256, 256]; found scales of shape [3, 2]"
    )


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        (["a.weight"], True),
        (["a.weight", "q.qweight"], True),
        (["q.qweight"], False),
        (["a.weight", "q.weight"], False),
    ],
)
def test_another_method_passes_where_nothing_is_to_be_undone(
    wanted: list[str], *, passes: bool
) -> None:
    headers = {"a.weight": ("BF16", (4, 4)), "q.qweight": ("I32", (4, 4))}
    if passes:
        assert sorted(logical_tensors(headers, config_of("awq"), wanted=wanted)) == sorted(headers)
        return
    with pytest.raises(PlanningError, match="found 'awq'"):
        logical_tensors(headers, config_of("awq"), wanted=wanted)
