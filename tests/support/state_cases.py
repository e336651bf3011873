"""State dicts that are hard to save, each with what its export must hold."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import Replicate, Shard

from dcp_hf_writer import LoadSpec
from support.compare import INDEX_NAME
from support.rank_tensors import Case, Held, columns, plain, rows, tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

# Every dtype that safetensors 0.8 stores and torch has, but one with a case of its own and one with
# a test file of its own; a test compares with the library.
DTYPES = (
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
    torch.complex64,
)


def uneven_shards(root: Path) -> Case:
    shapes = {"a": (7, 3), "b": (97, 5), "c": (13,), "d": (5, 2, 3)}
    return Case({name: rows(name, *shape) for name, shape in shapes.items()})


def empty_shards(root: Path) -> Case:
    shapes = {"gate": (1, 4), "three": (3, 2), "five": (5, 8), "one": (1,)}
    held = {name: rows(name, *shape) for name, shape in shapes.items()}
    return Case(held | {"columns": columns("columns", 4, 2)})


def scalars_and_zero_sizes(root: Path) -> Case:
    return Case(
        {
            "scale": plain("scale"),
            "count": plain("count", dtype=torch.int64),
            "flag": plain("flag", dtype=torch.bool),
            "replicated": Held(tensor("replicated"), (Replicate(),)),
            "none": plain("none", 0),
            "no_rows": plain("no_rows", 0, 5),
            "no_columns": plain("no_columns", 3, 0, 2),
            "sharded_no_rows": rows("sharded_no_rows", 0, 5),
            "sharded_no_columns": rows("sharded_no_columns", 8, 0),
            "weight": rows("weight", 4, 2),
        }
    )


def only_zero_sizes(root: Path) -> Case:
    return Case({"none": plain("none", 0), "no_rows": rows("no_rows", 0, 5)})


def every_dtype(root: Path) -> Case:
    held: dict[str, Held] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        held[f"{name}.plain"] = plain(f"{name}.plain", 5, 3, dtype=dtype)
        held[f"{name}.rows"] = rows(f"{name}.rows", 5, 3, dtype=dtype)
        held[f"{name}.columns"] = columns(f"{name}.columns", 3, 5, dtype=dtype)
    return Case(held)


def microscaling(root: Path) -> Case:
    """The scales of MX formats: powers of two in a byte, the fifth fp8."""
    dtype = torch.float8_e8m0fnu
    return Case(
        {"plain": plain("plain", 3, 4, dtype=dtype), "rows": rows("rows", 5, 4, dtype=dtype)}
    )


def hsdp_replicas(root: Path) -> Case:
    mesh = (2, 2)
    return Case(
        {
            "sharded": Held(tensor("sharded", 6, 3), (Replicate(), Shard(0)), mesh),
            "uneven": Held(tensor("uneven", 5, 3), (Replicate(), Shard(0)), mesh),
            "columns": Held(tensor("columns", 3, 5), (Replicate(), Shard(1)), mesh),
            "outer": Held(tensor("outer", 7, 2), (Shard(0), Replicate()), mesh),
            "everywhere": Held(tensor("everywhere", 4), (Replicate(), Replicate()), mesh),
        }
    )


def mixed_kinds(root: Path) -> Case:
    return Case(
        {
            "norm.weight": plain("norm.weight", 6),
            "linear.weight": rows("linear.weight", 6, 3),
            "linear.bias": Held(tensor("linear.bias", 6), (Replicate(),)),
            "out.weight": columns("out.weight", 3, 6),
            "grid.weight": Held(tensor("grid.weight", 6, 5), (Shard(0), Shard(1)), (2, 2)),
            "buffer": plain("buffer", dtype=torch.int64),
        }
    )


def columns_and_depth(root: Path) -> Case:
    grid = (2, 2)
    return Case(
        {
            "columns": columns("columns", 6, 8),
            "uneven_columns": columns("uneven_columns", 3, 7),
            "middle": columns("middle", 3, 6, 5),
            "depth": Held(tensor("depth", 3, 4, 9), (Shard(2),)),
            "rows_columns": Held(tensor("rows_columns", 5, 7), (Shard(0), Shard(1)), grid),
            "columns_rows": Held(tensor("columns_rows", 5, 7), (Shard(1), Shard(0)), grid),
            "rows_depth": Held(tensor("rows_depth", 3, 2, 5), (Shard(0), Shard(2)), grid),
            "rows_rows": Held(tensor("rows_rows", 9, 2), (Shard(0), Shard(0)), grid),
        }
    )


def strided_views(root: Path) -> Case:
    square, wide, line = tensor("square", 4, 4), tensor("wide", 4, 10), tensor("line", 12)
    return Case(
        {
            "transposed": Held(tensor("transposed", 3, 5).t()),
            "stepped": Held(wide[:, ::2]),
            "expanded": Held(tensor("expanded", 1, 3).expand(4, 3)),
            "square": Held(square),
            # All of one storage, and still another tensor: nobody could load it from the first.
            "square_transposed": Held(square.t()),
            "permuted": Held(tensor("permuted", 2, 3, 4).permute(2, 0, 1)),
            "first": Held(line[:5]),
            "second": Held(line[5:]),
            "overlapping": Held(line[3:8]),
            "row": Held(wide[2]),
            "local": Held(tensor("local", 7, 3), (Shard(0),), is_local_strided=True),
            "local_columns": Held(
                tensor("local_columns", 3, 7), (Shard(1),), is_local_strided=True
            ),
            "scalar_view": Held(line[7]),
        }
    )


def lazily_conjugated(root: Path) -> Case:
    """Views that torch conjugates or negates only when they are read."""
    signal = tensor("signal", 3, 5, dtype=torch.complex64).nan_to_num()
    return Case({"conjugate": Held(signal.conj()), "negative": Held(signal.conj().imag)})


def values_beside_tensors(root: Path) -> Case:
    held = {"weight": rows("weight", 6, 2), "layer.weight": plain("layer.weight", 3)}
    values = {
        "version": 3,
        "names": ["a", "b"],
        "ratio": 0.5,
        "nothing": None,
        "layer._extra_state": {"amax": 1.5, "history": [1, 2]},
        "text": "text",
    }
    return Case(held, values)


def byte_buffer_beside_tensors(root: Path) -> Case:
    return Case({"weight": rows("weight", 6, 2)}, {"layer._extra_state": io.BytesIO(b"state")})


def many_small_tensors(root: Path) -> Case:
    held: dict[str, Held] = {}
    for number in range(2500):
        held[f"layers.{number}.weight"] = rows(f"{number}", 4, 3)
        held[f"layers.{number}.norm"] = plain(f"norm {number}", 3)
    return Case(held, export={"max_shard_size": "50KB"})


def larger_than_a_file(root: Path) -> Case:
    held = {
        "a": rows("a", 20, 5),
        "b": rows("b", 21, 5),
        "large": rows("large", 100, 10),
        "c": rows("c", 19, 5),
        "large_too": columns("large_too", 10, 103),
        "d": plain("d", 100),
        "e": plain("e", 1),
    }
    return Case(held, export={"max_shard_size": 1000})


def unicode_keys(root: Path) -> Case:
    names = (
        "модель.вес",
        "重み.0",
        "emoji.\N{SLIGHTLY SMILING FACE}",
        "combining.e\u0301",
        'quoted "name"',
        "back\\slash",
        "slash/name",
        "space and\ttab\nline",
        "control.\x01\x1f\x7f",
        "\u2028separator",
    )
    return Case({name: rows(name, 5, 2) for name in names})


def cast_to_bfloat16(root: Path) -> Case:
    held = {
        "rows": rows("rows", 7, 3),
        "columns": columns("columns", 3, 7),
        "double": rows("double", 6, dtype=torch.float64),
        "half": rows("half", 6, dtype=torch.float16),
        "strided": Held(tensor("strided", 7, 3), (Shard(0),), is_local_strided=True),
        "scalar": plain("scalar"),
        "norm.weight": rows("norm.weight", 6),
        "gate.bias": plain("gate.bias", 5),
        "already": rows("already", 6, dtype=torch.bfloat16),
        "int": rows("int", 6, dtype=torch.int32),
        "bool": rows("bool", 6, dtype=torch.bool),
        "fp8": rows("fp8", 6, 4, dtype=torch.float8_e4m3fn),
        "complex": rows("complex", 6, dtype=torch.complex64),
        "empty": plain("empty", 0),
    }
    kept = {"norm.weight", "gate.bias", "int", "bool", "fp8", "complex"}
    exported = {
        fqn: one.full if fqn in kept else one.full.to(torch.bfloat16) for fqn, one in held.items()
    }
    return Case(
        held,
        export={"dtype": torch.bfloat16, "keep_dtype": (r"norm\.weight$", "^gate")},
        exported=exported,
    )


def cast_to_float32(root: Path) -> Case:
    held = {
        "rows": rows("rows", 7, 3, dtype=torch.bfloat16),
        "columns": columns("columns", 3, 7, dtype=torch.bfloat16),
        "half": plain("half", 5, dtype=torch.float16),
        "byte": plain("byte", 5, dtype=torch.uint8),
    }
    exported = {
        fqn: one.full if fqn == "byte" else one.full.to(torch.float32) for fqn, one in held.items()
    }
    return Case(held, export={"dtype": "float32"}, exported=exported)


def cast_larger_than_a_buffer(root: Path) -> Case:
    """Casts of some 10 MB a rank and tensor, which go through a buffer in pieces."""
    numbers = torch.arange(2300 * 4300, dtype=torch.int64)
    held = {
        "columns": Held((numbers % 251).to(torch.bfloat16).reshape(2300, 4300), (Shard(1),)),
        "rows": Held((numbers % 241).to(torch.bfloat16).reshape(4, -1), (Shard(0),)),
    }
    exported = {fqn: one.full.to(torch.float32) for fqn, one in held.items()}
    return Case(held, export={"dtype": torch.float32}, exported=exported)


def renamed(root: Path) -> Case:
    held = {"w": rows("w", 7, 3), "v": columns("v", 3, 5), "plain": plain("plain", 4)}
    specs = [
        LoadSpec(name="w", hf_keys=["model.w.weight"], global_shape=(7, 3)),
        LoadSpec.from_tensor(name="v", hf_keys=["model.v.weight"], tensor=held["v"].full),
    ]
    exported = {
        "model.w.weight": held["w"].full,
        "model.v.weight": held["v"].full,
        "plain": held["plain"].full,
    }
    return Case(held, export={"specs": {spec.name: spec for spec in specs}}, exported=exported)


def fused_keys(root: Path) -> Case:
    held = {
        "q": rows("q", 8, 4),
        # Ranks hold 2, 2, 2 and 0 rows of two parts of 3 rows: a border falls inside each part.
        "inside": rows("inside", 6, 4),
        # Ranks hold 3 rows each of three parts of 4 rows.
        "three": rows("three", 12, 3),
        "wide": columns("wide", 3, 6),
        "across": rows("across", 7, 6),
        "last_dim": Held(tensor("last_dim", 2, 3, 10), (Shard(2),)),
        "experts": Held(tensor("experts", 4, 6, 5), (Shard(0), Shard(1)), (2, 2)),
        "plain": plain("plain", 6),
    }
    dims = {"wide": 1, "across": 1, "last_dim": -1, "experts": 1}
    counts = {"three": 3}
    specs: dict[str, LoadSpec] = {}
    exported: dict[str, torch.Tensor] = {}
    for fqn, one in held.items():
        dim, count = dims.get(fqn, 0), counts.get(fqn, 2)
        keys = [f"{fqn}.{part}" for part in "abc"[:count]]
        specs[fqn] = LoadSpec(
            name=fqn, hf_keys=keys, global_shape=tuple(one.full.shape), fused_dim=dim
        )
        exported |= zip(keys, one.full.chunk(count, dim), strict=True)
    return Case(held, export={"specs": specs}, exported=exported)


def padded(root: Path) -> Case:
    held = {"embed": rows("embed", 12, 3), "head": columns("head", 3, 12), "w": rows("w", 12, 2)}
    specs = {
        "embed": LoadSpec(
            name="embed", hf_keys=["embed"], global_shape=(12, 3), origin_shape=(7, 3)
        ),
        "head": LoadSpec(
            name="head", hf_keys=["head.weight"], global_shape=(3, 12), origin_shape=(2, 7)
        ),
        "w": LoadSpec(name="w", hf_keys=["w.a", "w.b"], global_shape=(12, 2), origin_shape=(10, 2)),
    }
    exported = {
        "embed": held["embed"].full[:7],
        "head.weight": held["head"].full[:2, :7],
        "w.a": held["w"].full[:5],
        "w.b": held["w"].full[5:10],
    }
    return Case(held, export={"specs": specs}, exported=exported)


def fused_and_cast(root: Path) -> Case:
    held = {"qkv": rows("qkv", 9, 4), "wide": columns("wide", 3, 10), "norm": plain("norm", 3)}
    specs = [
        LoadSpec(name="qkv", hf_keys=["q", "k", "v"], global_shape=(9, 4), fused_dim=0),
        LoadSpec(name="wide", hf_keys=["wide.a", "wide.b"], global_shape=(3, 10), fused_dim=1),
    ]
    parts = dict(zip("qkv", held["qkv"].full.chunk(3), strict=True))
    parts |= zip(["wide.a", "wide.b"], held["wide"].full.chunk(2, 1), strict=True)
    exported = {key: part.to(torch.bfloat16) for key, part in parts.items()}
    exported |= {"k": parts["k"], "norm": held["norm"].full}
    export = {"specs": specs, "dtype": torch.bfloat16, "keep_dtype": ("^k$", "norm")}
    return Case(held, export=export, exported=exported)


def tied_given(root: Path) -> Case:
    held = {"head": rows("same", 7, 3), "embed": rows("same", 7, 3), "w": rows("w", 4, 2)}
    exported = {fqn: one.full for fqn, one in held.items() if fqn != "head"}
    return Case(held, export={"tied": {"head": "embed"}}, exported=exported)


def tied_found(root: Path) -> Case:
    sharded, replicated, thin = rows("sharded", 7, 3), plain("replicated", 5, 2), rows("thin", 1, 3)
    held = {
        "embed": sharded,
        "embed_plain": replicated,
        # Ranks other than the first hold nothing of it, so their storage tells nothing.
        "embed_thin": thin,
        "w": rows("w", 4, 2),
        "head": sharded,
        "head_plain": replicated,
        "head_thin": thin,
    }
    exported = {fqn: one.full for fqn, one in held.items() if not fqn.startswith("head")}
    return Case(held, exported=exported)


def equal_but_not_tied(root: Path) -> Case:
    """Equal bytes in storages of their own, and empty tensors, which all have no storage."""
    held = {
        "a": rows("same", 7, 3),
        "b": rows("same", 7, 3),
        "c": plain("same", 7, 3),
        "none": plain("none", 0),
        "none_too": plain("none", 0),
    }
    return Case(held)


def expected_keys(root: Path) -> Case:
    case = fused_keys(root)
    return Case(
        case.held,
        export={**case.export, "expect_keys": list(case.expected())},
        exported=case.exported,
    )


def like_base_index(root: Path) -> Case:
    held = {
        "first": rows("first", 7, 3),
        "second": columns("second", 3, 5),
        "third": plain("third", 4),
    }
    return Case(held, export={"like": base_with_index(root)})


def like_base_of_one_file(root: Path) -> Case:
    return Case({"weight": rows("weight", 7, 3)}, export={"like": base_of_one_file(root)})


def with_metadata_and_alignment(root: Path) -> Case:
    held = {"a": rows("a", 7, 3), "b": plain("b", 3, dtype=torch.uint8)}
    return Case(held, export={"header_align": 4096, "metadata": {"run": "one"}})


LIKE_FILES = {
    "first": "model-00002-of-00002.safetensors",
    "second": "model-00001-of-00002.safetensors",
    "third": "model-00002-of-00002.safetensors",
}
LIKE_COPIED = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
}


def base_with_index(root: Path) -> Path:
    """Directory of a base model in two files, whose order is not that of the state dict."""
    base = root / "base-of-two"
    if not base.exists():
        base.mkdir()
        _write_copied(base)
        index = {"metadata": {"total_size": 1}, "weight_map": LIKE_FILES}
        (base / INDEX_NAME).write_text(json.dumps(index))
        for name in set(LIKE_FILES.values()):
            (base / name).write_bytes(b"weights of the base model")
    return base


def base_of_one_file(root: Path) -> Path:
    """Directory of a base model in one file, without an index."""
    base = root / "base-of-one"
    if not base.exists():
        base.mkdir()
        _write_copied(base)
        save_file({"weight": torch.zeros(2)}, base / "model.safetensors")
    return base


def base_that_is_damaged(root: Path) -> Path:
    """Directory of a base model whose one file is no safetensors file."""
    base = root / "base-damaged"
    if not base.exists():
        base.mkdir()
        _write_copied(base)
        (base / "model.safetensors").write_bytes(b"weights of the base model")
    return base


def _write_copied(base: Path) -> None:
    for name, content in LIKE_COPIED.items():
        (base / name).write_bytes(content)


CASES: Mapping[str, Callable[[Path], Case]] = {
    build.__name__: build
    for build in (
        uneven_shards,
        empty_shards,
        scalars_and_zero_sizes,
        only_zero_sizes,
        every_dtype,
        microscaling,
        hsdp_replicas,
        mixed_kinds,
        columns_and_depth,
        strided_views,
        lazily_conjugated,
        values_beside_tensors,
        byte_buffer_beside_tensors,
        many_small_tensors,
        larger_than_a_file,
        unicode_keys,
        cast_to_bfloat16,
        cast_to_float32,
        cast_larger_than_a_buffer,
        renamed,
        fused_keys,
        padded,
        fused_and_cast,
        tied_given,
        tied_found,
        equal_but_not_tied,
        expected_keys,
        like_base_index,
        like_base_of_one_file,
        with_metadata_and_alignment,
    )
}
