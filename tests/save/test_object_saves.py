"""Saves to object stores: both halves equal those of a save to a local path, byte for byte."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, materialize, verify
from support import shared_store
from support.compare import tensor_difference
from support.rank_tensors import tensor
from support.ranks import run_ranks
from support.sharded_models import build_model
from support.stock_fsspec import FsspecReader
from support.store_saves import MODEL, Store, save_kinds

if TYPE_CHECKING:
    from pathlib import Path

    from support.s3_servers import S3Server

KINDS = ("plain", "cast", "split", "plain-once")


def local_files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def check_equal(store: Store, root: Path, kind: str) -> None:
    """Compare all but the save's own facts: its path, id and times."""
    local, found = local_files(root / kind), store.files(kind)
    assert sorted(found) == sorted(local)
    for name in local.keys() - {".metadata", "dcp-hf.json"}:
        assert found[name] == local[name], name
    ours, theirs = (json.loads(files["dcp-hf.json"]) for files in (found, local))
    for part in ("dcp", "hf", "once", "world_size", "export_error"):
        assert ours[part] == theirs[part], part


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_store_holds_the_files_of_a_local_save_when_any_fsspec_store_is_the_target(
    tmp_path: Path, world_size: int
) -> None:
    store = Store.shared(tmp_path / "store")
    assert run_ranks(save_kinds, world_size, store, tmp_path, KINDS) == [[]] * world_size
    for kind in KINDS:
        check_equal(store, tmp_path, kind)
        report = verify(store.at(kind))
        assert report.ok, str(report)


@pytest.mark.parametrize("world_size", [1, 4])
def test_store_holds_the_files_of_a_local_save_when_s3_is_the_target(
    tmp_path: Path, s3_server: S3Server, world_size: int
) -> None:
    bucket = s3_server.new_bucket()
    store = Store.of_bucket(bucket)
    kinds = ("plain", "cast-once")
    assert run_ranks(save_kinds, world_size, store, tmp_path, kinds) == [[]] * world_size
    for kind in kinds:
        check_equal(store, tmp_path, kind)
    assert bucket.open_uploads() == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("store")
    store = Store.shared(root / "store")
    assert run_ranks(save_kinds, 2, store, root, ("plain", "plain-once")) == [[]] * 2
    return store


def empty() -> dict[str, Any]:
    return {"model": {name: torch.zeros(shape) for name, (shape, _) in MODEL.items()}, "step": 0}


def check_loaded(state: dict[str, Any]) -> None:
    assert state["step"] == 1
    for name, (shape, _) in MODEL.items():
        assert torch.equal(state["model"][name], tensor(f"{name}@1", *shape)), name


@pytest.mark.parametrize("source", ["auto", "hf"])
def test_our_reader_loads_either_half_from_a_store(saved: Store, source: Any) -> None:
    state = empty()
    if source == "hf":
        state = {"model": state["model"]}
    dcp.load(state, storage_reader=HFDualReader(saved.at("plain"), source=source, verify=True))
    check_loaded(state | {"step": 1})


def test_stock_fsspec_reader_loads_the_dcp_half_from_a_store(saved: Store) -> None:
    state = empty()
    dcp.load(state, storage_reader=FsspecReader(saved.at("plain")))
    check_loaded(state)


def test_materialize_makes_a_plain_checkpoint_of_one_stored_once(
    saved: Store, tmp_path: Path
) -> None:
    materialize(saved.at("plain-once"), tmp_path / "plain")
    state = empty()
    dcp.load(state, checkpoint_id=str(tmp_path / "plain"))
    check_loaded(state)


def test_from_pretrained_reads_the_downloaded_export(tmp_path: Path) -> None:
    model = build_model("llama_bf16")
    url = f"memory://run{tmp_path}/step-1"
    state = {"model": model.state_dict()}
    writer = HFDualWriter(url, export=HFExport(assets=(model.config,)))
    dcp.save(state, storage_writer=writer, no_dist=True)
    fsspec.filesystem("memory").get(f"{url}/hf", str(tmp_path / "hf"), recursive=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert tensor_difference(loaded.state_dict(), model.state_dict()) is None


def test_metadata_names_the_url_without_credentials(saved: Store) -> None:
    shared_store.register()
    metadata = FsspecReader(saved.at("plain")).read_metadata()
    assert metadata.storage_meta is not None
    assert metadata.storage_meta.checkpoint_id == saved.at("plain")
