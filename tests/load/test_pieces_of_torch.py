"""Directories of torch's `HuggingFaceStorageWriter(save_distributed=True)`, not consolidated."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dcp_hf_writer import HFDualReader, LoadSpec, Piece, load_hf, verify
from dcp_hf_writer.errors import CorruptCheckpointError, ModelKeyError
from support.compare import tensor_difference
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

WORLD_SIZE = 4


def model() -> dict[str, torch.Tensor]:
    return {
        "rows": torch.arange(35.0).reshape(7, 5),
        "columns": torch.arange(24.0).reshape(4, 6) + 100,
        "grid": torch.arange(40.0).reshape(5, 8).to(torch.bfloat16),
        "few": torch.arange(3.0),
        "whole": torch.arange(4.0) + 50,
        "scalar": torch.tensor(2.0),
    }


PLACEMENTS: dict[str, Any] = {
    "rows": (Shard(0), Replicate()),
    "columns": (Replicate(), Shard(1)),
    "grid": (Shard(0), Shard(1)),
    "few": (Shard(0), Shard(0)),
}


def placed(tensors: dict[str, torch.Tensor], placements: dict[str, Any]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2))
    return {
        name: distribute_tensor(value, mesh, placements[name]) if name in placements else value
        for name, value in tensors.items()
    }


def save(_: int, __: int, root: Path) -> None:
    for name, mapping in (
        ("one", None),
        ("two", {name: 1 + i % 2 for i, name in enumerate(model())}),
    ):
        writer = dcp.HuggingFaceStorageWriter(
            str(root / name), fqn_to_index_mapping=mapping, save_distributed=True
        )
        dcp.save(placed(model(), PLACEMENTS), storage_writer=writer)


def load_otherwise(_: int, __: int, path: Path) -> list[str | None]:
    """Load with other placements than the tensors were saved with."""
    said = []
    other = {"rows": (Shard(1), Shard(0)), "grid": (Replicate(), Shard(0))}
    for loads in ("dcp.load", "load_hf"):
        target = placed({name: torch.zeros_like(v) for name, v in model().items()}, other)
        if loads == "load_hf":
            load_hf(target, path)
        else:
            dcp.load({"model": target}, storage_reader=HFDualReader(path))
        whole = {k: v.full_tensor() if k in other else v for k, v in target.items()}
        said.append(tensor_difference(whole, model()))
    return said


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("pieces")
    run_ranks(save, WORLD_SIZE, found)
    return found


@pytest.fixture
def path(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "one", tmp_path / "x")


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.full_like(value, -1) for name, value in model().items()}


@pytest.mark.parametrize("name", ["one", "two"])
def test_parts_are_joined(root: Path, name: str) -> None:
    wanted, found = blank(), blank()
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(root / name)), no_dist=True)
    assert tensor_difference(wanted, model()) is None
    dcp.load(found, storage_reader=HFDualReader(root / name), no_dist=True)
    assert tensor_difference(found, model()) is None


def test_parts_are_loaded_with_other_placements(root: Path) -> None:
    assert run_ranks(load_otherwise, WORLD_SIZE, root / "one") == [[None, None]] * WORLD_SIZE


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning")
def test_parts_are_loaded_by_key(root: Path) -> None:
    found = _load_state_dict_from_keys({"rows"}, storage_reader=HFDualReader(root / "one"))
    assert tensor_difference(found, {"rows": model()["rows"]}) is None


def test_specs_join_and_split_tensors_in_parts(root: Path) -> None:
    rows, columns = model()["rows"], model()["columns"]
    specs = [LoadSpec("joined", ["columns", "few"], (27,), pieces=pieces())]
    found = {"joined": torch.zeros(27), "rows": torch.zeros(7, 5)}
    load_hf(found, root / "one", specs=specs, strict=False)
    assert torch.equal(found["rows"], rows)
    wanted = torch.cat([columns.t().flatten(), model()["few"]])
    assert torch.equal(found["joined"], wanted)


def pieces() -> list[Piece]:
    # The columns one after another: transposed and flat.
    return [
        Piece("columns", (4, 6), ((6, 1, 4), (4, 6, 1))),
        Piece("few", (3,), ((3, 1, 1),), 0, 24),
    ]


def test_directory_in_parts_is_checked(root: Path) -> None:
    for name in ("one", "two"):
        report = verify(root / name)
        assert report.ok, str(report)
        assert report.checked == "structure"


def refusal(path: Path) -> CorruptCheckpointError:
    with pytest.raises(CheckpointException) as caught:
        dcp.load(blank(), storage_reader=HFDualReader(path), no_dist=True)
    error = caught.value.failures[0][0]
    assert isinstance(error, CorruptCheckpointError)
    report = verify(path)
    assert not report.ok
    return error


def files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def test_missing_part_within_a_tensor_is_found(path: Path) -> None:
    files(path)[0].unlink()
    assert "tile" in str(refusal(path))


def changed(file: Path, info: dict[str, Any], **tensors: torch.Tensor) -> None:
    with safe_open(file, "pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    old = json.loads(metadata["DCP_SHARDING_INFO"])
    metadata["DCP_SHARDING_INFO"] = json.dumps({**old, **info})
    save_file(found | tensors, file, metadata)


@pytest.mark.parametrize(
    "offsets", [[0, 0, 0], [-1, 0], ["0", 0], [1 << 70, 0], 3, [0, 0], [4, 1]], ids=str
)
def test_wrong_place_of_a_part_is_found(path: Path, offsets: Any) -> None:
    # The part of the last rank that holds one; it begins at [4, 0].
    file = next(
        one for one in reversed(files(path)) if "rows" in one.read_bytes().decode("latin-1")
    )
    changed(file, {"rows": {"saved_offsets": offsets}})
    assert refusal(path).key == "rows"


def test_part_without_a_place_is_found(path: Path) -> None:
    changed(files(path)[0], {}, other=torch.ones(2))
    assert refusal(path).key == "other"


def test_parts_of_other_dtypes_are_found(path: Path) -> None:
    changed(files(path)[0], {}, rows=torch.zeros(4, 5, dtype=torch.int32))
    assert "differ in kind" in str(refusal(path))


def test_file_of_another_writer_among_parts_is_found(path: Path) -> None:
    save_file({"rows": torch.ones(2)}, path / files(path)[0].name)
    assert "lacks the places" in str(refusal(path))


@pytest.mark.parametrize("many", [False, True])
def test_directory_that_torch_wrote_whole_is_loaded(tmp_path: Path, many: bool) -> None:  # noqa: FBT001
    mapping = {name: 1 + i % 2 for i, name in enumerate(model())} if many else None
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "x"), fqn_to_index_mapping=mapping)
    dcp.save(model(), storage_writer=writer, no_dist=True)
    found = blank()
    dcp.load(found, storage_reader=HFDualReader(tmp_path / "x"), no_dist=True)
    assert tensor_difference(found, model()) is None
    assert verify(tmp_path / "x").ok


@pytest.mark.parametrize("is_distributed", [False, True])
@pytest.mark.parametrize("entries", [("model",), ("model", "optim"), ("encoder", "decoder")])
def test_entries_that_torch_wrote_are_loaded_by_their_fqns(
    tmp_path: Path, entries: tuple[str, ...], *, is_distributed: bool
) -> None:
    saved = {
        one: {name: value + i for name, value in model().items()} for i, one in enumerate(entries)
    }
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "x"), save_distributed=is_distributed)
    dcp.save(saved, storage_writer=writer, no_dist=True)
    found = {one: blank() for one in entries}
    dcp.load(found, storage_reader=HFDualReader(tmp_path / "x"), no_dist=True)
    for one in entries:
        assert tensor_difference(found[one], saved[one]) is None


def test_unclear_entries_are_refused_if_a_tensor_is_not_stored(tmp_path: Path) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "x"))
    dcp.save({"encoder": model()}, storage_writer=writer, no_dist=True)
    found = {"encoder": blank(), "decoder": blank()}
    with pytest.raises(CheckpointException) as caught:
        dcp.load(found, storage_reader=HFDualReader(tmp_path / "x"), no_dist=True)
    assert isinstance(caught.value.failures[0][0], ModelKeyError)
