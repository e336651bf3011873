"""The planned export, carried out in memory and compared with dense tensors."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.core_model_loading import dot_natural_key

from dcp_hf_writer import HFExport, LoadSpec
from dcp_hf_writer.errors import CoverageError, LayoutError, SpecError
from dcp_hf_writer.mapping.load_spec import Piece
from dcp_hf_writer.plan.assign_hf_keys import RuntimeTensor
from dcp_hf_writer.plan.layout import Layout, plan_layout
from dcp_hf_writer.plan.regions import chunk_regions, needs_cast
from dcp_hf_writer.tensors.boxes import Box, whole
from dcp_hf_writer.tensors.dtypes import CASTABLE, TORCH_BY_NAME
from dcp_hf_writer.tensors.strided_copies import runtime_view
from support.compare import file_difference
from support.partitions import partitions_of, shapes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcp_hf_writer.tensors.boxes import Shape

DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn),
]


@dataclass(frozen=True)
class Model:
    """Runtime tensors with their values, and what the export must hold."""

    tensors: list[RuntimeTensor]
    specs: list[LoadSpec]
    values: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]


def random_tensor(shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    if dtype in CASTABLE:
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    count = int(torch.Size(shape).numel()) * dtype.itemsize
    raw = torch.frombuffer(bytearray(os.urandom(count + 1)), dtype=torch.uint8)[:count]
    raw = raw % 2 if dtype is torch.bool else raw
    return raw.view(dtype).reshape(shape)


@st.composite
def specs_of(draw: st.DrawFn, name: str, shape: Shape) -> LoadSpec | None:
    """Draw no spec, a new name, a fusion (of equal or given parts), each with padding or not."""
    kind = draw(st.sampled_from(["none", "rename", "fuse"]))
    if kind == "none":
        return None
    origin = tuple(draw(st.integers(max(n - 2, 0), n)) for n in shape)
    if kind == "rename" or not shape:
        return LoadSpec(name, f"hf.{name}", shape, origin_shape=origin)
    dim = draw(st.integers(0, len(shape) - 1))
    extent = origin[dim]
    if draw(st.booleans()):
        divisors = [n for n in range(1, extent + 1) if extent % n == 0] or [2]
        count = draw(st.sampled_from(divisors))
        keys = [f"hf.{name}.{i}" for i in range(count)]
        return LoadSpec(name, keys, shape, dim, (), origin)
    edges = [0, *sorted(draw(st.lists(st.integers(0, extent), max_size=3))), extent]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    keys = [f"hf.{name}.{i}" for i in range(len(sizes))]
    return LoadSpec(name, keys, shape, dim - len(shape), (), origin, fused_sizes=sizes)


def exported_parts(
    name: str, value: torch.Tensor, spec: LoadSpec | None
) -> dict[str, torch.Tensor]:
    """Cut a tensor as its spec says, by torch alone."""
    if spec is None:
        return {name: value}
    trimmed = value[tuple(slice(n) for n in spec.origin_shape)]
    if len(spec.hf_keys) == 1:
        return {spec.hf_keys[0]: trimmed}
    sizes = spec.fused_sizes or [trimmed.shape[spec.fused_dim] // len(spec.hf_keys)] * len(
        spec.hf_keys
    )
    return dict(zip(spec.hf_keys, trimmed.split(list(sizes), spec.fused_dim), strict=True))


@st.composite
def models(draw: st.DrawFn) -> Model:
    tensors, specs, values, expected = [], [], {}, {}
    for i in range(draw(st.integers(1, 4))):
        name = f"layers.{i}.w"
        shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
        chunks = tuple(draw(partitions_of(whole(shape))))
        tensors.append(RuntimeTensor(f"model.{name}", name, shape, dtype, chunks))
        values[name] = random_tensor(shape, dtype)
        spec = draw(specs_of(name, shape))
        if spec is not None:
            specs.append(spec)
        expected |= exported_parts(name, values[name], spec)
    return Model(tensors, specs, values, expected)


def narrow(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def carry_out(
    layout: Layout, tensors: Sequence[RuntimeTensor], values: Mapping[str, torch.Tensor]
) -> tuple[list[bytes], list[bytes]]:
    """Write each chunk as its rank would; return the files, and how often each byte was written."""
    files = [bytearray(file.nbytes) for file in layout.files]
    counts = [bytearray(file.nbytes) for file in layout.files]
    for i, file in enumerate(layout.files):
        files[i][: len(file.header)] = file.header
        counts[i][: len(file.header)] = b"\x01" * len(file.header)
    for tensor in tensors:
        for chunk in tensor.chunks:
            local = narrow(values[tensor.name], chunk)
            for region in chunk_regions(chunk, layout.targets.get(tensor.fqn, ())):
                target = region.target
                view = runtime_view(local, region.copy)
                data = raw_bytes(view.to(TORCH_BY_NAME[target.dtype]))
                runs = region.hf_runs()
                assert len(data) == runs.count * runs.nbytes
                for number, start in enumerate(runs.starts()):
                    run = data[number * runs.nbytes : (number + 1) * runs.nbytes]
                    files[target.file][start : start + runs.nbytes] = run
                    for position in range(start, start + runs.nbytes):
                        counts[target.file][position] += 1
    return [bytes(file) for file in files], [bytes(count) for count in counts]


@settings(deadline=None, max_examples=150)
@given(
    models(),
    st.sampled_from([None, torch.bfloat16, torch.float32]),
    st.integers(1, 2000),
)
def test_each_byte_is_written_once_and_files_equal_those_of_dense_tensors(
    model: Model, dtype: torch.dtype | None, max_shard_size: int
) -> None:
    export = HFExport(
        specs=model.specs, dtype=dtype, keep_dtype=(r"1\.w",), max_shard_size=max_shard_size
    )
    layout = plan_layout(model.tensors, export, tied=())
    files, counts = carry_out(layout, model.tensors, model.values)
    assert all(set(count) <= {1} for count in counts)
    expected = {
        key: value.to(dtype)
        if dtype is not None and value.dtype in CASTABLE and "1.w" not in key
        else value
        for key, value in model.expected.items()
    }
    assert sorted(expected) == sorted(key for file in layout.files for key in file.keys)
    for file, content in zip(layout.files, files, strict=True):
        tensors = {key: expected[key].contiguous() for key in file.keys}
        dense = safetensors.torch.save(_apart(tensors), metadata={"format": "pt"})
        assert file_difference(content, dense) is None


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # The library refuses tensors that share storage, as the parts of a split do.
    return {key: tensor.clone() for key, tensor in tensors.items()}


def tensors_of(sizes: Mapping[str, int]) -> list[RuntimeTensor]:
    return [
        RuntimeTensor(name, name, (nbytes,), torch.uint8, (whole((nbytes,)),))
        for name, nbytes in sizes.items()
    ]


SIZES = st.dictionaries(
    st.text("abc.0123", min_size=1, max_size=6), st.integers(1, 60), min_size=1, max_size=20
)


@settings(deadline=None, max_examples=300)
@given(SIZES, st.integers(1, 200))
def test_files_are_those_of_huggingface_hub(sizes: dict[str, int], max_shard_size: int) -> None:
    split = split_torch_state_dict_into_shards(
        {name: torch.zeros(nbytes, dtype=torch.uint8) for name, nbytes in sizes.items()},
        max_shard_size=max_shard_size,
    )
    layout = plan_layout(tensors_of(sizes), HFExport(max_shard_size=max_shard_size), tied=())
    found = {key: file.name for file in layout.files for key in file.keys}
    assert found == split.tensor_to_filename
    assert [file.name for file in layout.files] == sorted(split.filename_to_tensors)
    assert (layout.index is None) == (not split.is_sharded)
    if layout.index is not None:
        assert json.loads(layout.index) == {
            "metadata": {**split.metadata, "total_parameters": sum(sizes.values())},
            "weight_map": split.tensor_to_filename,
        }


@given(SIZES, st.integers(1, 200))
def test_layout_is_the_same_for_the_same_input(sizes: dict[str, int], max_shard_size: int) -> None:
    export = HFExport(max_shard_size=max_shard_size)
    plans = [plan_layout(tensors_of(sizes), export, tied=()) for _ in range(2)]
    assert plans[0] == plans[1]


# Order


def one(name: str, shape: Shape = (4,), dtype: torch.dtype = torch.float32) -> RuntimeTensor:
    return RuntimeTensor(f"model.{name}", name, shape, dtype, (whole(shape),))


def order_of(names: Sequence[str], **options: Any) -> list[str]:
    """Return the order in which tensors fill files, one to a file."""
    layout = plan_layout(
        [one(name) for name in names], HFExport(max_shard_size=16, **options), tied=()
    )
    return [file.keys[0] for file in layout.files]


UNSORTED = ["layers.10.w", "norm", "layers.2.w", "layers.2.b10", "layers.2.b9", "embed"]
NATURAL = ["embed", "layers.2.b9", "layers.2.b10", "layers.2.w", "layers.10.w", "norm"]


def test_files_are_filled_in_the_order_of_the_state_dict() -> None:
    assert order_of(UNSORTED) == UNSORTED


def test_files_are_filled_in_natural_order_when_asked() -> None:
    assert order_of(UNSORTED, order="natural") == NATURAL


NAMES = st.lists(st.text("ab.019²٣", min_size=1, max_size=6), min_size=1, max_size=8, unique=True)


@settings(deadline=None)
@given(NAMES)
def test_natural_order_is_that_of_transformers(names: list[str]) -> None:
    try:
        expected = sorted(names, key=dot_natural_key)
    except ValueError:  # it takes a superscript for a number, and then cannot read it
        expected = None
    found = order_of(names, order="natural")
    assert sorted(found) == sorted(names)
    assert expected is None or found == expected


def test_files_are_filled_in_natural_order_of_runtime_names_when_a_spec_renames() -> None:
    spec = LoadSpec("norm", "a.norm", (4,))
    assert order_of(UNSORTED, specs=[spec]) == [*NATURAL[:-1], "a.norm"]


def test_order_of_the_state_dict_is_kept_when_asked_although_a_spec_renames() -> None:
    spec = LoadSpec("norm", "a.norm", (4,))
    found = order_of(UNSORTED, specs=[spec], order="state_dict")
    assert found == [name.replace("norm", "a.norm") for name in UNSORTED]


# Names


def keys_of(layout: Layout) -> list[str]:
    return sorted(key for file in layout.files for key in file.keys)


def test_dropped_name_of_a_tie_is_left_out() -> None:
    layout = plan_layout(
        [one("embed"), one("head")], HFExport(), tied=[("model.embed", "model.head")]
    )
    assert keys_of(layout) == ["embed"]
    assert layout.tied == {"head": "embed"}
    assert "model.head" not in layout.targets


def test_ties_that_are_given_replace_those_that_were_found() -> None:
    tensors, found = [one("embed"), one("head")], [("model.embed", "model.head")]
    given_ = plan_layout(tensors, HFExport(tied={"embed": "head"}), tied=found)
    assert keys_of(given_) == ["head"]
    assert keys_of(plan_layout(tensors, HFExport(tied={}), tied=found)) == ["embed", "head"]


def test_dropped_key_may_be_a_part_of_a_fused_tensor() -> None:
    spec = LoadSpec("qkv", ["q", "k"], (4,))
    layout = plan_layout([one("qkv"), one("w")], HFExport(specs=[spec], tied={"k": "w"}), tied=())
    assert keys_of(layout) == ["q", "w"]


@pytest.mark.parametrize("order", [*itertools.permutations(["embed", "head", "copy"])])
def test_key_that_an_alias_leads_to_is_kept_whichever_tensor_comes_first(
    order: Sequence[str],
) -> None:
    specs = [
        LoadSpec("embed", "hub.embed", (4,)),
        LoadSpec("head", "hub.head", (4,), alias_of="hub.embed"),
    ]
    found = [tuple(f"model.{name}" for name in order)]
    layout = plan_layout([one(name) for name in order], HFExport(specs=specs), tied=found)
    assert keys_of(layout) == ["hub.embed"]
    assert layout.tied == {"hub.head": "hub.embed", "copy": "hub.embed"}


def test_ties_are_said_in_keys_of_the_export() -> None:
    specs = [
        LoadSpec("a", "hub.a", (4,)),
        LoadSpec("b", "hub.b", (4,)),
        LoadSpec("kv", ["k", "v"], (4,)),
        LoadSpec("other", ["k2", "v2"], (4,)),
    ]
    tensors = [one(name) for name in ("a", "b", "kv", "other")]
    found = [("model.a", "model.b"), ("model.kv", "model.other")]
    layout = plan_layout(tensors, HFExport(specs=specs), tied=found)
    assert keys_of(layout) == ["hub.a", "k", "v"]
    assert layout.tied == {"hub.b": "hub.a", "k2": "k", "v2": "v"}


def test_key_that_was_the_name_of_a_dropped_tensor_is_exported() -> None:
    tensors = [one("embed"), one("head"), one("w")]
    export = HFExport(specs=[LoadSpec("w", "head", (4,))])
    layout = plan_layout(tensors, export, tied=[("model.embed", "model.head")])
    assert layout.targets.keys() == {"model.embed", "model.w"}
    assert keys_of(layout) == ["embed", "head"]
    assert layout.tied == {}


@pytest.mark.parametrize("order", [*itertools.permutations(["none", "a", "b"])])
def test_tensor_that_its_spec_leaves_out_takes_no_tied_one_with_it(order: Sequence[str]) -> None:
    spec = LoadSpec("none", global_shape=(4,), pieces=())
    found = [tuple(f"model.{name}" for name in order)]
    layout = plan_layout([one(name) for name in order], HFExport(specs=[spec]), tied=found)
    (key,) = keys_of(layout)
    assert {key, *layout.tied} == {"a", "b"}


def test_parts_of_different_dtypes_are_refused_as_such() -> None:
    specs = [
        LoadSpec(n, global_shape=(4,), pieces=[Piece("k", (8,), ((4, 1, 1),), hf_start=start)])
        for n, start in (("a", 0), ("b", 4))
    ]
    tensors = [one("a"), one("b", dtype=torch.bfloat16)]
    with pytest.raises(LayoutError, match=r"different dtypes.*'k'.*F32.*'model.a'.*BF16.*dtype="):
        plan_layout(tensors, HFExport(specs=specs), tied=())
    layout = plan_layout(tensors, HFExport(specs=specs, dtype=torch.bfloat16), tied=())
    assert keys_of(layout) == ["k"]


def test_alias_of_a_name_that_no_key_has_is_refused() -> None:
    specs = [LoadSpec("a", "hub.a", (4,)), LoadSpec("b", "hub.b", (4,), alias_of="a")]
    with pytest.raises(LayoutError, match=r"not exported.*'a'"):
        plan_layout([one("a"), one("b")], HFExport(specs=specs), tied=())


def test_files_are_those_of_like_when_it_is_given() -> None:
    tensors = [one("a"), one("b"), one("c")]
    layout = plan_layout(
        tensors, HFExport(), tied=(), file_of_key={"a": "y", "b": "x", "c": "y", "d": "z"}
    )
    assert [(file.name, file.keys) for file in layout.files] == [("x", ("b",)), ("y", ("a", "c"))]
    assert json.loads(layout.index or b"")["weight_map"] == {"a": "y", "b": "x", "c": "y"}


def test_index_ends_with_a_line_end_and_is_sorted() -> None:
    layout = plan_layout([one("b"), one("a")], HFExport(max_shard_size=16), tied=())
    assert (layout.index or b"").decode().splitlines(keepends=True) == [
        "{\n",
        '  "metadata": {\n',
        '    "total_parameters": 8,\n',
        '    "total_size": 32\n',
        "  },\n",
        '  "weight_map": {\n',
        '    "a": "model-00002-of-00002.safetensors",\n',
        '    "b": "model-00001-of-00002.safetensors"\n',
        "  }\n",
        "}\n",
    ]


INDEXED = st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6).filter(
        lambda name: name != "__metadata__"
    ),
    st.sampled_from([torch.float64, torch.bfloat16, torch.uint8]),
    min_size=2,
    max_size=6,
)


@settings(deadline=None)
@given(INDEXED, st.none() | st.integers(0, 10**12))
def test_index_is_what_json_makes_of_it(
    dtypes: dict[str, torch.dtype], total_parameters: int | None
) -> None:
    tensors = [one(name, (2, 3), dtype) for name, dtype in dtypes.items()]
    layout = plan_layout(
        tensors, HFExport(max_shard_size=1, total_parameters=total_parameters), tied=()
    )
    metadata = {
        "total_parameters": 6 * len(dtypes) if total_parameters is None else total_parameters,
        "total_size": sum(6 * dtype.itemsize for dtype in dtypes.values()),
    }
    weight_map = {key: file.name for file in layout.files for key in file.keys}
    index = {"metadata": metadata, "weight_map": weight_map}
    assert layout.index == (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


# Dtypes


def dtypes_of(tensors: Sequence[RuntimeTensor], **options: Any) -> dict[str, str]:
    layout = plan_layout(tensors, HFExport(**options), tied=())
    return {target.key: target.dtype for parts in layout.targets.values() for target in parts}


MIXED = [
    one("w"),
    one("norm.w"),
    one("half", dtype=torch.float16),
    one("fp8", dtype=torch.float8_e4m3fn),
    one("ids", dtype=torch.int64),
    one("mask", dtype=torch.bool),
    one("wave", dtype=torch.complex64),
]
KEPT = {"fp8": "F8_E4M3", "ids": "I64", "mask": "BOOL", "wave": "C64"}


def test_only_floating_point_is_cast() -> None:
    found = dtypes_of(MIXED, dtype=torch.bfloat16)
    assert found == {"w": "BF16", "norm.w": "BF16", "half": "BF16", **KEPT}


def test_keys_that_match_keep_dtype_are_not_cast() -> None:
    found = dtypes_of(MIXED, dtype=torch.bfloat16, keep_dtype=["norm", "^ha"])
    assert found == {"w": "BF16", "norm.w": "F32", "half": "F16", **KEPT}


def test_dtype_of_a_spec_overrides_that_of_the_export() -> None:
    specs = [
        LoadSpec("w", "w", (4,), dtype=torch.float16),
        LoadSpec("norm.w", "norm.w", (4,), dtype=torch.float64),
    ]
    found = dtypes_of(MIXED, dtype=torch.bfloat16, keep_dtype=["norm"], specs=specs)
    assert found == {"w": "F16", "norm.w": "F64", "half": "BF16", **KEPT}


def test_cast_is_needed_only_where_dtypes_differ() -> None:
    layout = plan_layout([one("w")], HFExport(dtype=torch.bfloat16), tied=())
    target = layout.targets["model.w"][0]
    assert needs_cast(torch.float32, target)
    assert not needs_cast(torch.bfloat16, target)


# Refusals


@pytest.mark.parametrize(
    ("tensors", "options", "kind", "words"),
    [
        ([one("")], {}, LayoutError, "reserved or empty"),
        ([one("__metadata__")], {}, LayoutError, "__metadata__"),
        ([one("\ud800")], {}, LayoutError, "not valid Unicode"),
        ([], {}, LayoutError, "no tensors"),
        ([one("w", dtype=torch.complex128)], {}, LayoutError, "complex128"),
        (
            [one("a"), one("b")],
            {"specs": [LoadSpec("a", "b", (4,))]},
            LayoutError,
            r"'model\.a' and 'model\.b'",
        ),
        ([one("a")], {"specs": [LoadSpec("b", "b", (4,))]}, SpecError, r"found 'b'"),
        ([one("a")], {"specs": [LoadSpec("a", "a", (5,))]}, SpecError, r"\[4\].*\[5\]"),
        ([one("a"), one("b")], {"tied": {"a": "c"}}, LayoutError, "'a'.*found c"),
        ([one("a"), one("b")], {"tied": {"a": "a"}}, LayoutError, "'a'"),
        ([one("a"), one("b"), one("c")], {"tied": {"a": "b", "b": "c"}}, LayoutError, "'b'"),
        ([one("a")], {"expect_keys": ["a", "b"]}, LayoutError, r"also 'b'"),
        ([one("a"), one("b")], {"expect_keys": ["a"]}, LayoutError, r"unexpected 'b'"),
    ],
)
def test_model_is_refused_when_the_format_or_the_export_cannot_hold_it(
    tensors: list[RuntimeTensor], options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        plan_layout(tensors, HFExport(**options), tied=())
    assert caught.value.phase == "plan"  # type: ignore[attr-defined]


def test_keys_that_like_does_not_have_are_refused_by_name() -> None:
    with pytest.raises(LayoutError, match="'b', 'c'"):
        plan_layout([one("a"), one("b"), one("c")], HFExport(), tied=(), file_of_key={"a": "x"})


@pytest.mark.parametrize(
    "chunks",
    [
        (),
        (Box((0,), (2,)),),
        (Box((0,), (2,)), Box((3,), (1,))),
        (Box((0,), (3,)), Box((2,), (2,))),
        (Box((0,), (4,)), Box((0,), (4,))),
        (Box((2,), (4,)),),
    ],
    ids=["none", "short", "gap", "overlap", "twice", "outside"],
)
def test_shards_are_refused_with_their_fqn_when_they_do_not_tile(chunks: tuple[Box, ...]) -> None:
    tensor = RuntimeTensor("model.w", "w", (4,), torch.float32, chunks)
    with pytest.raises(CoverageError, match=r"'model\.w'"):
        plan_layout([tensor], HFExport(), tied=())


def test_error_lists_no_more_names_than_a_reader_wants() -> None:
    tensors = [one(f"w{i:03}") for i in range(100)]
    with pytest.raises(LayoutError) as caught:
        plan_layout(tensors, HFExport(), tied=(), file_of_key={})
    assert "'w019' and 80 more" in str(caught.value)
