"""The manifest is read without trust: what we write is read, and nothing else."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.plan.encode_manifest import WholeFile
from dcp_hf_writer.plan.manifest import Manifest, ManifestDCPFile, ManifestDigests, StoredBlock
from dcp_hf_writer.plan.parse_manifest import (
    MAX_MANIFEST_NBYTES,
    is_relative_name,
    parse_manifest,
)
from dcp_hf_writer.tensors.boxes import ByteRuns
from support.small_states import MODEL, state_of

if TYPE_CHECKING:
    from collections.abc import Callable

DIGEST = "0123456789abcdef"


def encode(fields: dict[str, Any]) -> bytes:
    """Encode fields as the writer does, with the digest of what they are."""
    fields = {name: value for name, value in fields.items() if name != "digest_above"}
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    above = ("{\n" + ",\n".join(lines) + ",\n").encode()
    return above + f'"digest_above": "{xxhash.xxh3_64_hexdigest(above)}"\n}}\n'.encode()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("manifest") / "step-7"
    export = HFExport(
        specs=[LoadSpec("layers.0.w", ["q", "k"], MODEL["layers.0.w"][0], 0)],
        max_shard_size=100,
        assets={"config.json": b"{}"},
    )
    state = state_of(7)
    state["model"]["tied"] = state["model"]["embed"]
    state["model"]["none"] = torch.zeros(0, 3)
    dcp.save(state, storage_writer=HFDualWriter(directory, export=export), no_dist=True)
    return (directory / "dcp-hf.json").read_bytes()


def parse(data: bytes) -> Manifest:
    return parse_manifest(data, path="run/dcp-hf.json")


def test_what_is_written_is_read(written: bytes) -> None:
    fields = json.loads(written)
    found = parse(written)
    assert (found.step, found.world_size) == (7, 1)
    assert (found.save_id, found.target) == (fields["save_id"], fields["target"])
    assert found.files == {n: WholeFile(n, *entry) for n, entry in fields["files"].items()}
    assert found.dcp == {
        name: ManifestDCPFile(name, e["nbytes"], e["rest"], e["rank"], None)
        for name, e in fields["dcp"].items()
    }
    assert found.digests == tuple(
        ManifestDigests(
            n, e["rank"], e["nbytes"], e["digest"], (0, e["hf_files"][1]), e["hf_nbytes"]
        )
        for n, e in fields["digests"].items()
    )
    assert found.hf is not None
    assert found.hf.tied == {"tied": "embed"}
    assert {
        file.name: [file.nbytes, file.header_nbytes, file.header, file.tensors]
        for file in found.hf.files.values()
    } == {
        name: [e["nbytes"], e["header_nbytes"], e["header"], None]
        for name, e in fields["hf"]["files"].items()
    }
    assert found.seconds == fields["timings"]["coordinator"]
    assert found.export_error is None
    root = Path(found.target)
    assert found.sizes() == {
        str(path.relative_to(root)): path.stat().st_size
        for path in root.rglob("*")
        if path.is_file() and path.name != "dcp-hf.json"
    }


def tensor_with(blocks: list[Any], shape: list[int], dtype: str = "BF16") -> dict[str, Any]:
    """Return the fields of a manifest with one tensor of one file."""
    nbytes = 2 * torch.Size(shape).numel()
    file = {
        "nbytes": 100 + nbytes,
        "header_nbytes": 100,
        "header": DIGEST,
        "tensors": {"w": [100, dtype, shape, blocks]},
    }
    return {
        "format": "dcp-hf",
        "version": 1,
        "save_id": "x",
        "target": "/run/step-1",
        "owner": {},
        "step": 1,
        "world_size": 2,
        "digest": "xxh3_64",
        "nbytes": {},
        "timings": {"coordinator": {"plan": 0.5}, "ranks": [{"rank": 0, "host": "h", "plan": 1}]},
        "files": {".metadata": [10, DIGEST], "hf/config.json": [2, DIGEST]},
        "dcp": {"__0_0.distcp": {"nbytes": 9, "ranges": [[2, 3, DIGEST]], "rest": DIGEST}},
        "once": ["model.w"],
        "hf": {"subdir": "hf", "tied": {"a": "w"}, "files": {"model.safetensors": file}},
        "export_error": None,
    }


BASE = tensor_with([[0, [0, 0], [4, 6], DIGEST]], [4, 6])


@pytest.mark.parametrize(
    ("extent", "runs"),
    [
        ([4, 6], ByteRuns(100, 48, ())),
        ([[4, 0, 1], [6, 1, 1]], ByteRuns(100, 48, ())),
        ([2, 6], ByteRuns(100, 24, ())),
        ([4, 2], ByteRuns(100, 4, ((4, 12),))),
        ([1, 1], ByteRuns(100, 2, ())),
        ([[4, 0, 1], [3, 1, 2]], ByteRuns(100, 2, ((12, 4),))),
        ([[2, 0, 2], [2, 1, 3], [2, 1, 1]], ByteRuns(100, 4, ((2, 24), (2, 6)))),
        ([0, 6], None),
        ([[0, 0, 1]], None),
    ],
)
def test_block_becomes_the_bytes_that_it_is(extent: list[Any], runs: ByteRuns | None) -> None:
    found = parse(encode(tensor_with([[1, [0, 0], extent, DIGEST]], [4, 6])))
    assert found.hf is not None
    frozen = tuple(tuple(e) if isinstance(e, list) else e for e in extent)
    blocks = (found.hf.files["model.safetensors"].tensors or {})["w"].blocks
    assert blocks == (StoredBlock(1, (0, 0), frozen, DIGEST, runs),)


def test_block_starts_at_its_first_element() -> None:
    found = parse(encode(tensor_with([[0, [1, 2], [2, 3], DIGEST]], [4, 6])))
    assert found.hf is not None
    (block,) = (found.hf.files["model.safetensors"].tensors or {})["w"].blocks
    assert block.runs == ByteRuns(100 + 2 * 8, 6, ((2, 12),))


def test_scalar_has_one_element() -> None:
    found = parse(encode(tensor_with([[0, [], [], DIGEST]], [])))
    assert found.hf is not None
    (block,) = (found.hf.files["model.safetensors"].tensors or {})["w"].blocks
    assert block.runs == ByteRuns(100, 2, ())


def changed(*path: Any, to: Any) -> dict[str, Any]:
    fields = json.loads(json.dumps(BASE))
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return fields


def renamed(*path: Any, to: str) -> dict[str, Any]:
    fields = json.loads(json.dumps(BASE))
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[to] = inner.pop(path[-1])
    return fields


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in BASE.items() if key != name}


FILE = ("hf", "files", "model.safetensors")
TENSOR = (*FILE, "tensors", "w")
BLOCK = (*TENSOR, 3, 0)
RANGES = ("dcp", "__0_0.distcp", "ranges")
BASE_2: dict[str, Any] = BASE | {
    "version": 2,
    "dcp": {"__0_0.distcp": {"nbytes": 9, "rest": DIGEST, "rank": 1}},
    "hf": BASE["hf"]
    | {"files": {"model.safetensors": {"nbytes": 148, "header_nbytes": 100, "header": DIGEST}}},
    "digests": {
        "dcp-hf/digests-00001.safetensors": {
            "rank": 1,
            "nbytes": 500,
            "digest": DIGEST,
            "hf_files": [0, 0],
            "hf_nbytes": 48,
        }
    },
}


def changed_2(*path: Any, to: Any) -> dict[str, Any]:
    fields = json.loads(json.dumps(BASE_2))
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return fields


DIGESTS = ("digests", "dcp-hf/digests-00001.safetensors")
ENTRY = BASE_2["digests"][DIGESTS[1]]
HOSTILE_2: dict[str, tuple[dict[str, Any], str]] = {
    "no digests": ({k: v for k, v in BASE_2.items() if k != "digests"}, "fields of the manifest"),
    "ranges in version 2": (changed_2("dcp", "__0_0.distcp", "ranges", to=[]), "the fields of"),
    "tensors in version 2": (changed_2(*FILE, "tensors", to={}), "the fields of"),
    "digests elsewhere": (changed_2("digests", "../x", to=ENTRY), "relative"),
    "rank twice": (changed_2("digests", "x", to=ENTRY), "listed once"),
    "name twice": (changed_2("files", DIGESTS[1], to=[1, DIGEST]), "listed once"),
    "rank too high": (changed_2(*DIGESTS, "rank", to=2), "rank in"),
    "rank without digests": (changed_2("dcp", "__0_0.distcp", "rank", to=0), "with a digests file"),
    "size below zero": (changed_2(*DIGESTS, "nbytes", to=-1), "size of"),
    "no digest": (changed_2(*DIGESTS, "digest", to=1), "16 hexadecimal"),
    "files beyond": (changed_2(*DIGESTS, "hf_files", to=[0, 1]), "below 1"),
    "files reversed": (changed_2(*DIGESTS, "hf_files", to=[1, 0]), "first and a last"),
    "three files": (changed_2(*DIGESTS, "hf_files", to=[0, 0, 0]), "first and a last"),
    "files without an export": (changed_2("hf", to=None) | {"once": []}, "below 0"),
    "bytes as text": (changed_2(*DIGESTS, "hf_nbytes", to="1"), "bytes of"),
    "header beyond": (changed_2(*FILE, "header_nbytes", to=1000), "header of"),
}  # fmt: skip
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "other format": (changed("format", to="zip"), "format"),
    "newer version": (changed("version", to=3), "another version of this package"),
    "version no number": (changed("version", to="1"), "version"),
    "version is a bool": (changed("version", to=[True]), "version"),
    "other digest": (changed("digest", to="md5"), "xxh3_64"),
    "missing field": (without("dcp"), "fields of the manifest"),
    "additional field": ({**BASE, "more": 1}, "fields of the manifest"),
    "no ranks": (changed("world_size", to=-1), "world_size"),
    "step is text": (changed("step", to="7"), "step"),
    "target no text": (changed("target", to=None), "target"),
    "timing below zero": (changed("timings", "coordinator", "plan", to=-1), "seconds"),
    "timing infinite": (changed("timings", "coordinator", "plan", to=1e400), "cannot be read"),
    "timing of rank 2": (changed("timings", "ranks", 0, "rank", to=2), "rank"),
    "absolute file": (renamed("files", ".metadata", to="/etc/passwd"), "relative path"),
    "file above": (renamed("files", ".metadata", to="../x"), "relative path"),
    "file above, inside": (renamed("files", ".metadata", to="hf/../../x"), "relative path"),
    "file with NUL": (renamed("files", ".metadata", to="a\0b"), "relative path"),
    "file with newline": (renamed("files", ".metadata", to="a\nb"), "relative path"),
    "file with backslash": (renamed("files", ".metadata", to="..\\x"), "relative path"),
    "file of a megabyte": (renamed("files", ".metadata", to="x" * 1_000_000), "relative path"),
    "half a character": (renamed("files", ".metadata", to="\ud800"), "relative path"),
    "the manifest itself": (renamed("files", ".metadata", to="dcp-hf.json"), "listed once"),
    "listed twice": (renamed("files", ".metadata", to="__0_0.distcp"), "listed once"),
    "export elsewhere": (changed("hf", "subdir", to=".."), "one plain name"),
    "export deeper": (changed("hf", "subdir", to="a/b"), "one plain name"),
    "weights elsewhere": (renamed(*FILE, to="../x"), "relative path"),
    "DCP file elsewhere": (renamed(*RANGES[:2], to="/x"), "relative path"),
    "size below zero": (changed("files", ".metadata", 0, to=-1), "size of .metadata"),
    "size 2^63": (changed("files", ".metadata", 0, to=1 << 63), "size of .metadata"),
    "size 10^4000": (changed("files", ".metadata", 0, to=10**4000), "size of .metadata"),
    "digest is null": (changed("files", ".metadata", 1, to=None), "16 hexadecimal"),
    "no digest": (changed("files", ".metadata", 1, to=""), "16 hexadecimal"),
    "entry too long": (changed("files", ".metadata", to=[1, DIGEST, 0]), "a list of 2"),
    "range beyond": (changed(*RANGES, 0, 1, to=8), "a length in"),
    "range before": (changed(*RANGES, 0, 0, to=-1), "a start in"),
    "ranges overlap": (changed(*RANGES, to=[[2, 3, DIGEST], [4, 1, DIGEST]]), "ascending"),
    "header beyond": (changed(*FILE, "header_nbytes", to=1000), "header of"),
    "hole": (changed(*TENSOR, 0, to=101), "start of 'w'"),
    "too long": (changed(*TENSOR, 2, to=[4, 7]), "at most 148"),
    "too short": (changed(*FILE, "nbytes", to=149), "end of the tensors"),
    "shape too short": (changed(*TENSOR, 2, to=[4, 5]), "within a shape"),
    "overflow": (changed(*TENSOR, 2, to=[1 << 62, 1 << 62]), "fewer elements"),
    "overflow beside a zero": (changed(*TENSOR, 2, to=[1 << 62, 4, 0]), "fewer elements"),
    "negative dim": (changed(*TENSOR, 2, to=[-4, -6]), "shape of tensor 'w'"),
    "65 dims": (changed(*TENSOR, 2, to=[1] * 63 + [4, 6]), "at most 64 dimensions"),
    "unknown dtype": (changed(*TENSOR, 1, to="BF17"), "dtype"),
    "empty key": (renamed(*TENSOR, to=""), "not empty"),
    "rank too high": (changed(*BLOCK, 0, to=2), "rank in a block"),
    "block outside": (changed(*BLOCK, 1, to=[1, 0]), "within a shape"),
    "block far outside": (changed(*BLOCK, 2, to=[4, 1 << 62]), "within a shape"),
    "block of other dims": (changed(*BLOCK, 2, to=[4]), "of 2 dimensions"),
    "offsets of other dims": (changed(*BLOCK, 1, to=[0]), "of 2 dimensions"),
    "block without digest": (changed(*BLOCK, to=[0, [0, 0], [4, 6]]), "a list of 4"),
    "loops outside": (changed(*BLOCK, 2, to=[[3, 0, 2]]), "within a shape"),
    "loop of other dim": (changed(*BLOCK, 2, to=[[2, 2, 1]]), "dimensions below 2"),
    "loop stands still": (changed(*BLOCK, 2, to=[[2, 0, 0]]), "loops with steps above 0"),
    "loops cross": (changed(*BLOCK, 2, to=[[6, 1, 1], [4, 0, 1]]), "order of its bytes"),
    "loops interleave": (changed(*BLOCK, 2, to=[[2, 1, 2], [2, 1, 1], [2, 1, 1]]), "order of its"),
    "129 loops": (changed(*BLOCK, 2, to=[[1, 0, 1]] * 129), "at most 128 loops"),
    "once without an export": (changed("hf", to=None), "once to be empty"),
    "once is text": (changed("once", to="w"), "a list"),
    "once of numbers": (changed("once", to=[1]), "text"),
    "hf is a list": (changed("hf", to=[]), "an object"),
    "digests in version 1": ({**BASE, "digests": {}}, "fields of the manifest"),
    "tied to a number": (changed("hf", "tied", "a", to=1), "text"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*HOSTILE.values(), *HOSTILE_2.values()])
def test_manifest_that_says_what_cannot_be_is_refused(case: tuple[dict[str, Any], str]) -> None:
    fields, message = case
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        parse(encode(fields))
    assert "run/dcp-hf.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_hostile_manifests_differ_from_one_that_is_read() -> None:
    assert parse(encode(BASE)).hf is not None
    assert parse(encode(BASE_2)).digests


@pytest.mark.parametrize("cut", [0, 1, 36, 37, 500])
def test_cut_manifest_is_refused(written: bytes, cut: int) -> None:
    with pytest.raises(CorruptCheckpointError, match="end of the manifest is missing or damaged"):
        parse(written[:cut])


def test_every_changed_byte_is_seen(written: bytes) -> None:
    assert parse(written)
    for position in range(0, len(written), 7):
        data = bytearray(written)
        data[position] ^= 1
        with pytest.raises(CorruptCheckpointError):
            parse(bytes(data))


def test_size_is_bounded_before_anything_is_read_of_it() -> None:
    data = bytes(MAX_MANIFEST_NBYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError, match="too large"):
            parse(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_name_that_stands_twice_is_refused() -> None:
    above = encode(BASE).rpartition(b'"digest_above"')[0] + b'"step": 2,\n'
    last = f'"digest_above": "{xxhash.xxh3_64_hexdigest(above)}"\n}}\n'.encode()
    with pytest.raises(CorruptCheckpointError, match="'step' twice"):
        parse(above + last)


@pytest.mark.parametrize("name", [".metadata", "a", "hf/x", "..a", "a..", "hf/ä ö", "..."])
def test_names_within_the_directory_are_relative(name: str) -> None:
    assert is_relative_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "/", "/a", "a/", "a//b", ".", "./a", "a/.", "..", "../a", "a/..", "a/../b"),
        *("a\\b", "a\0", "a\tb", "\ud800", "x" * 5000),
    ],
)
def test_other_names_are_not_relative(name: str) -> None:
    assert not is_relative_name(name)


VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 1 << 65), st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container within a value with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = []
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def _replace(container: Any, key: Any, value: Any) -> None:
    container[key] = value


def _remove(container: Any, key: Any, value: Any) -> None:
    del container[key]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_manifest_is_refused_or_read(data: st.DataObject) -> None:
    fields = json.loads(json.dumps(data.draw(st.sampled_from([BASE, BASE_2]))))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(fields)))
        act: Callable[[Any, Any, Any], None] = data.draw(st.sampled_from([_replace, _remove]))
        act(container, key, data.draw(VALUE))
    try:
        found = parse(encode(fields))
    except CorruptCheckpointError:
        return
    assert all(map(is_relative_name, found.sizes()))
