"""State dicts of every shape: what safetensors and stock DCP read is what the ranks held."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport
from support.compare import INDEX_NAME, file_difference, parse, tensor_difference
from support.rank_process import Raised
from support.rank_tensors import WORLD_SIZE
from support.ranks import run_ranks
from support.state_cases import CASES, LIKE_COPIED, LIKE_FILES, base_of_one_file, base_with_index
from support.stock_readers import load_dcp, load_hf

if TYPE_CHECKING:
    from pathlib import Path

# Torch's own save of as many tensors takes a few seconds, most of it planning in Python. Ours
# plans as much again and writes twice the bytes; planning that is quadratic takes minutes.
MANY_TENSORS_RATIO = 2.0
MANY, STOCK = "many_small_tensors", "many_small_tensors by torch"

SavedByRank = list[dict[str, "Saved"]]

# Cases whose export is several files, or differs from `save_file` on purpose.
NOT_ONE_PLAIN_FILE = {
    "larger_than_a_file",
    "like_base_index",
    MANY,
    "with_metadata_and_alignment",
}


@dataclass(frozen=True)
class Saved:
    """What one rank says of one save."""

    raised: Raised | None
    """What the save raised, if anything."""
    seconds: float
    """How long it took, from the call to the committed checkpoint."""


def save_cases(rank: int, world_size: int, root: Path, names: list[str]) -> dict[str, Saved]:
    """Save cases; note what failed, so that one failure hides no other."""
    meshes = {(WORLD_SIZE,): init_device_mesh("cpu", (world_size,))}
    if world_size == WORLD_SIZE:
        meshes[2, 2] = init_device_mesh("cpu", (2, 2))
    saved = {}
    for name in names:
        case = CASES[name](root)
        state = {"model": case.sharded(meshes), "step": 3}
        export = HFExport(**case.export)
        saved[name] = _save(state, HFDualWriter(root / name, export=export))
        if name == MANY:
            saved[STOCK] = _save(state, dcp.FileSystemWriter(root / STOCK))
    return saved


def _save(state: dict[str, Any], writer: dcp.StorageWriter) -> Saved:
    started = time.monotonic()
    raised = None
    try:
        dcp.async_save(state, storage_writer=writer).result()
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        raised = Raised.of(error)
    return Saved(raised, time.monotonic() - started)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SavedByRank]:
    root = tmp_path_factory.mktemp("cases")
    # Made here: ranks that made them at the same time would see each other's half-made ones.
    base_with_index(root)
    base_of_one_file(root)
    others = [name for name in CASES if name != MANY]
    ranks = run_ranks(save_cases, WORLD_SIZE, root, others)
    # Two ranks for what is timed, as many as the smallest machine has cores.
    timed = run_ranks(save_cases, 2, root, [MANY])
    return root, [*ranks, *timed]


def checkpoint(saved: tuple[Path, SavedByRank], name: str) -> Path:
    root, ranks = saved
    for one in ranks:
        if name in one and one[name].raised is not None:
            one[name].raised.reraise()
    return root / name


@pytest.mark.parametrize("name", CASES)
def test_safetensors_reads_what_the_ranks_held(saved: tuple[Path, SavedByRank], name: str) -> None:
    directory = checkpoint(saved, name)
    case = CASES[name](directory.parent)
    assert tensor_difference(load_hf(directory / "hf"), case.expected()) is None


@pytest.mark.parametrize("name", CASES)
def test_stock_dcp_reads_what_the_ranks_held(saved: tuple[Path, SavedByRank], name: str) -> None:
    directory = checkpoint(saved, name)
    case = CASES[name](directory.parent)
    expected = {**case.full(), **case.values}
    loaded = load_dcp(directory, {"model": expected, "step": 0})
    assert loaded["step"] == 3
    tensors = {fqn: loaded["model"].pop(fqn) for fqn in case.held}
    assert tensor_difference(tensors, case.full()) is None
    assert readable(loaded["model"]) == readable(dict(case.values))


def readable(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.getvalue() if isinstance(value, io.BytesIO) else value
        for name, value in values.items()
    }


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_ONE_PLAIN_FILE])
def test_single_file_equals_save_file_to_the_byte(
    saved: tuple[Path, SavedByRank], name: str, tmp_path: Path
) -> None:
    directory = checkpoint(saved, name)
    case = CASES[name](directory.parent)
    produced = sorted((directory / "hf").glob("*.safetensors"))
    assert [path.name for path in produced] == ["model.safetensors"]
    save_file(case.expected(), tmp_path / "reference", metadata={"format": "pt"})
    assert file_difference(produced[0].read_bytes(), (tmp_path / "reference").read_bytes()) is None


def test_dtypes_tried_are_all_that_safetensors_stores(tmp_path: Path) -> None:
    tried = {held.full.dtype for name in CASES for held in CASES[name](tmp_path).held.values()}
    # Packed numbers, which safetensors writes but cannot read, have a file of their own.
    assert tried | {torch.float4_e2m1fn_x2} == set(safetensors.torch._SIZE)


def test_many_small_tensors_take_no_longer_than_twice_what_torch_takes(
    saved: tuple[Path, SavedByRank],
) -> None:
    checkpoint(saved, MANY)
    ours, stock = (
        max(one[name].seconds for one in saved[1] if name in one) for name in (MANY, STOCK)
    )
    assert ours < MANY_TENSORS_RATIO * stock


@pytest.mark.parametrize("name", ["larger_than_a_file", MANY])
def test_files_hold_the_tensors_that_huggingface_hub_would_put_there(
    saved: tuple[Path, SavedByRank], name: str
) -> None:
    directory = checkpoint(saved, name)
    case = CASES[name](directory.parent)
    split = split_torch_state_dict_into_shards(
        case.expected(), max_shard_size=case.export["max_shard_size"]
    )
    index = json.loads((directory / "hf" / INDEX_NAME).read_text())
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"]["total_size"] == split.metadata["total_size"]


def test_files_follow_the_index_of_like(saved: tuple[Path, SavedByRank]) -> None:
    hf = checkpoint(saved, "like_base_index") / "hf"
    assert json.loads((hf / INDEX_NAME).read_text())["weight_map"] == LIKE_FILES
    assert {path.name for path in hf.iterdir()} == {
        *LIKE_COPIED,
        *LIKE_FILES.values(),
        INDEX_NAME,
    }
    assert {name: (hf / name).read_bytes() for name in LIKE_COPIED} == LIKE_COPIED


def test_one_file_is_written_when_like_has_one(saved: tuple[Path, SavedByRank]) -> None:
    hf = checkpoint(saved, "like_base_of_one_file") / "hf"
    assert {path.name for path in hf.iterdir()} == {*LIKE_COPIED, "model.safetensors"}


def test_data_starts_on_a_page_when_header_align_says_so(
    saved: tuple[Path, SavedByRank],
) -> None:
    path = checkpoint(saved, "with_metadata_and_alignment") / "hf" / "model.safetensors"
    parsed = parse(path.read_bytes())
    assert parsed.data_start == 4096
    assert parsed.header[0] == ("__metadata__", {"format": "pt", "run": "one"})
