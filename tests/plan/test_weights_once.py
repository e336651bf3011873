"""Weights stored once: the DCP metadata leads to every byte, and to none twice."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.check.materialize import materialize
from dcp_hf_writer.errors import (
    ConfigError,
    CorruptCheckpointError,
    ReadError,
    TargetExistsError,
)
from dcp_hf_writer.formats.parse_dcp_metadata import parse_metadata
from dcp_hf_writer.formats.weights_once_places import StoredOnce
from dcp_hf_writer.reader import HFDualReader
from dcp_hf_writer.tensors.strided_copies import hf_view, runtime_view
from support import audit, once_forms
from support.compare import tensor_difference
from support.rank_process import Raised
from support.rank_tensors import WORLD_SIZE, Case, plain, rows
from support.ranks import run_ranks
from support.state_cases import CASES, base_of_one_file, base_with_index
from support.stock_readers import load_hf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import Metadata

NAMES = [name for name in CASES if name != "many_small_tensors"]


def save_cases(rank: int, world_size: int, root: Path) -> dict[str, Raised | None]:
    meshes = {(WORLD_SIZE,): init_device_mesh("cpu", (world_size,))}
    meshes[2, 2] = init_device_mesh("cpu", (2, 2))
    raised: dict[str, Raised | None] = {}
    for name in NAMES:
        case = CASES[name](root)
        state = {"model": case.sharded(meshes), "optim": {"m": torch.ones(3)}, "step": 3}
        writer = HFDualWriter(root / name, export=HFExport(**case.export), weights="once")
        raised[name] = None
        try:
            dcp.async_save(state, storage_writer=writer).result()
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            raised[name] = Raised.of(error)
    return raised


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("once")
    base_with_index(root)
    base_of_one_file(root)
    for found in run_ranks(save_cases, WORLD_SIZE, root):
        for raised in found.values():
            if raised is not None:
                raised.reraise()
    return root


def metadata_of(directory: Path) -> Metadata:
    return parse_metadata((directory / ".metadata").read_bytes(), path=".metadata")


def stored(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor whose weights are stored once, put together from the safetensors files."""
    metadata = metadata_of(directory)
    exported = load_hf(directory / "hf")
    for index, where in (metadata.storage_data or {}).items():
        if not isinstance(where, StoredOnce):
            continue
        known = metadata.state_dict_metadata[index.fqn]
        assert isinstance(known, TensorStorageMetadata)
        sizes = known.chunks[0].sizes if index.index is None else known.chunks[index.index].sizes
        chunk = torch.zeros(sizes, dtype=known.properties.dtype)
        count = torch.zeros(sizes, dtype=torch.int32)
        for part in where.parts:
            for copy in part.copies:
                runtime_view(chunk, copy).copy_(hf_view(exported[part.key], copy))
                runtime_view(count, copy).add_(1)
        assert (count == 1).all()
        yield f"{index.fqn} at {tuple(index.offset or ())}", chunk


def once_fqns(directory: Path) -> set[str]:
    storage = metadata_of(directory).storage_data or {}
    return {index.fqn for index, where in storage.items() if isinstance(where, StoredOnce)}


@pytest.mark.parametrize("name", NAMES)
def test_metadata_leads_to_the_bytes_of_every_chunk(root: Path, name: str) -> None:
    case = CASES[name](root)
    assert tensor_difference(load_hf(root / name / "hf"), case.expected()) is None
    for where, chunk in stored(root / name):
        fqn, offset = where.split(" at ")
        full = case.full()[fqn.removeprefix("model.")]
        start = eval(offset) or (0,) * full.ndim  # noqa: S307
        expected = full[tuple(slice(o, o + n) for o, n in zip(start, chunk.shape, strict=True))]
        assert tensor_difference({where: chunk}, {where: expected}) is None


@pytest.mark.parametrize("name", NAMES)
def test_manifest_accounts_for_every_byte(root: Path, name: str) -> None:
    assert audit.faults(root / name) == []
    assert set(audit.read_manifest(root / name)["once"]) == once_fqns(root / name)


def test_what_the_export_does_not_hold_bit_for_bit_stays_in_the_dcp_half(root: Path) -> None:
    # Two are cast, one of them in part; padding is in no export.
    assert once_fqns(root / "fused_and_cast") == {"model.norm"}
    assert once_fqns(root / "padded") == set()
    assert once_fqns(root / "fused_keys") != set()


def test_no_weight_is_in_a_dcp_file(root: Path) -> None:
    directory = root / "uneven_shards"
    held = sum(path.stat().st_size for path in directory.glob("*.distcp"))
    weights = sum(one.nbytes for one in CASES["uneven_shards"](root).full().values())
    assert once_fqns(directory) == {"model.a", "model.b", "model.c", "model.d"}
    exported = sum(path.stat().st_size for path in (directory / "hf").glob("*.safetensors"))
    assert weights <= exported < weights + 1000
    # The optimizer's three numbers and the step, in archives of about a kilobyte each.
    assert held < 4000


def test_tied_tensors_are_both_found_in_the_one_that_is_kept(root: Path) -> None:
    tied = {f"model.{a}{b}" for a in ("embed", "head") for b in ("", "_plain", "_thin")}
    assert once_fqns(root / "tied_found") == {*tied, "model.w"}
    # Equal by word of the user alone: the dropped one is kept where no one can doubt it.
    assert once_fqns(root / "tied_given") == {"model.embed", "model.w"}


@pytest.mark.parametrize("name", NAMES)
def test_our_reader_loads_every_tensor(root: Path, name: str) -> None:
    case = CASES[name](root)
    check_loaded(root / name, case, HFDualReader(root / name))


@pytest.mark.parametrize("name", NAMES)
def test_our_reader_loads_every_tensor_of_a_checkpoint_in_the_old_form(
    root: Path, name: str, tmp_path: Path
) -> None:
    shutil.copytree(root / name, tmp_path / "old")
    before = metadata_of(root / name)
    data = once_forms.dumps(once_forms.in_form("pickled", before))
    assert (b"StoredOnce" in data) == bool(once_fqns(root / name))
    (tmp_path / "old" / ".metadata").write_bytes(data)
    assert metadata_of(tmp_path / "old") == before
    check_loaded(tmp_path / "old", CASES[name](root), HFDualReader(tmp_path / "old"))


@pytest.mark.parametrize("name", NAMES)
def test_materialized_checkpoint_is_one_that_torch_reads(
    root: Path, name: str, tmp_path: Path
) -> None:
    materialize(root / name, tmp_path / "plain")
    assert once_fqns(tmp_path / "plain") == set()
    assert audit.faults(tmp_path / "plain") == []
    check_loaded(tmp_path / "plain", CASES[name](root), dcp.FileSystemReader(tmp_path / "plain"))


def check_loaded(directory: Path, case: Case, reader: dcp.StorageReader) -> None:
    expected = case.full()
    target = {fqn: torch.full_like(one, 1) for fqn, one in expected.items()}
    state: dict[str, Any] = {"model": target, "optim": {"m": torch.zeros(3)}, "step": 0}
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert tensor_difference(state["model"], expected) is None
    assert torch.equal(state["optim"]["m"], torch.ones(3))
    assert state["step"] == 3


def test_materialized_tensor_passes_through_a_small_buffer(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_hf_writer.check.materialize._BUFFER_NBYTES", 16)
    monkeypatch.setattr("dcp_hf_writer.check.plain_dcp_files._FILE_NBYTES", 100)
    for name in ("uneven_shards", "fused_keys", "columns_and_depth"):
        materialize(root / name, tmp_path / name)
        check_loaded(tmp_path / name, CASES[name](root), dcp.FileSystemReader(tmp_path / name))
        assert len(list((tmp_path / name).glob("__once_*"))) > 1


def test_materialize_replaces_nothing_unless_told(root: Path, tmp_path: Path) -> None:
    materialize(root / "uneven_shards", tmp_path / "plain")
    before = (tmp_path / "plain" / ".metadata").stat().st_ino
    with pytest.raises(TargetExistsError):
        materialize(root / "uneven_shards", tmp_path / "plain")
    assert (tmp_path / "plain" / ".metadata").stat().st_ino == before
    materialize(root / "uneven_shards", tmp_path / "plain", overwrite=True)
    assert (tmp_path / "plain" / ".metadata").stat().st_ino != before


def test_nothing_is_left_when_a_weight_file_is_short(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "uneven_shards", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises((ReadError, CorruptCheckpointError)):
        materialize(tmp_path / "damaged", tmp_path / "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_stock_reader_says_what_to_use_instead(root: Path) -> None:
    state = {"model": {"a": torch.zeros(7, 3)}}
    with pytest.raises(CheckpointException, match="HFDualReader") as caught:
        dcp.load(state, checkpoint_id=str(root / "uneven_shards"))
    assert "materialize" in str(caught.value)


def test_stock_reader_loads_what_is_not_stored_once(root: Path) -> None:
    state: dict[str, Any] = {"optim": {"m": torch.zeros(3)}, "step": 0}
    dcp.load(state, checkpoint_id=str(root / "uneven_shards"))
    assert state["step"] == 3
    assert torch.equal(state["optim"]["m"], torch.ones(3))


def test_export_that_is_left_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="stores the weights in the export"):
        HFDualWriter("somewhere", export=None, weights="once")


def test_save_without_process_group_is_read_back(tmp_path: Path) -> None:
    case = Case({"a": rows("a", 7, 3), "b": plain("b", 4)})
    writer = HFDualWriter(tmp_path / "one", weights="once")
    dcp.save({"model": case.full()}, storage_writer=writer, no_dist=True)
    found = {where.split(" at ")[0]: chunk for where, chunk in stored(tmp_path / "one")}
    expected = {f"model.{fqn}": one for fqn, one in case.full().items()}
    assert tensor_difference(found, expected) is None
