"""Which files of a HuggingFace directory are its weights, and what is refused about them."""

from __future__ import annotations

import json
import os
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dcp_hf_writer import load_hf
from dcp_hf_writer.errors import CheckpointError, CorruptCheckpointError, ReadError
from dcp_hf_writer.load.hf_directory import open_hf_directory
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.open_inputs import OpenInputs
from support.compare import tensor_difference

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b.weight": torch.arange(6, dtype=torch.bfloat16),
    "c": torch.tensor(3),
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def write_single(directory: Path, name: str = "model.safetensors") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(WEIGHTS, directory / name, metadata={"format": "pt"})


def write_sharded(directory: Path, names: tuple[str, str] = SHARDS, index: str = INDEX) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": WEIGHTS["a.weight"]}, directory / names[0])
    save_file({k: WEIGHTS[k] for k in ("b.weight", "c")}, directory / names[1])
    weight_map = {"a.weight": names[0], "b.weight": names[1], "c": names[1]}
    write_index(directory, weight_map, index)


def write_index(directory: Path, weight_map: Any, index: str = INDEX) -> None:
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def loaded(path: Path) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(value) for name, value in WEIGHTS.items()}
    load_hf(found, path)
    return found


def assert_loads(path: Path) -> None:
    assert tensor_difference(loaded(path), WEIGHTS) is None


def refusal(path: Path) -> CheckpointError:
    with pytest.raises((CorruptCheckpointError, ReadError)) as caught:
        loaded(path)
    return caught.value


def test_one_file_is_loaded_whatever_it_is_called(tmp_path: Path) -> None:
    write_single(tmp_path / "usual")
    write_single(tmp_path / "other", "diffusion_pytorch_model.safetensors")
    for name in ("usual", "other"):
        assert_loads(tmp_path / name)


def test_files_of_an_index_are_loaded_and_others_left_alone(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"a.weight": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "README.md").write_text("hello")
    assert_loads(tmp_path)


def test_index_of_another_name_is_found(tmp_path: Path) -> None:
    write_sharded(tmp_path, index="diffusion_pytorch_model.safetensors.index.json")
    assert_loads(tmp_path)


def test_complete_set_of_shards_needs_no_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    assert_loads(tmp_path)
    (tmp_path / SHARDS[1]).rename(tmp_path / "model-00003-of-00003.safetensors")
    error = refusal(tmp_path)
    assert "no index says which belong together" in str(error)
    assert_that_names(error, SHARDS[0])


def assert_that_names(error: CheckpointError, *names: str) -> None:
    assert [name for name in names if name not in str(error)] == []


def test_file_or_index_is_loaded_by_its_path(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_single(tmp_path)
    error = refusal(tmp_path)
    assert_that_names(error, "model.safetensors", INDEX, "pass the path")
    assert_loads(tmp_path / "model.safetensors")
    assert_loads(tmp_path / INDEX)


def test_cache_of_the_hub_is_loaded_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    write_sharded(blobs)
    snapshot.mkdir(parents=True)
    for number, name in enumerate((*SHARDS, INDEX)):
        (blobs / name).rename(blobs / f"digest-{number}")
        (snapshot / name).symlink_to(f"../../blobs/digest-{number}")
    assert_loads(snapshot)
    # Elsewhere the same link is none of ours.
    snapshot.rename(tmp_path / "snapshots" / "x")
    (tmp_path / "snapshots").rename(tmp_path / "shots")
    error = refusal(tmp_path / "shots" / "x")
    assert "symbolic link" in str(error)


def test_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path / "elsewhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(
        tmp_path / "elsewhere" / "model.safetensors"
    )
    assert "symbolic link" in str(refusal(tmp_path / "model"))


@pytest.mark.parametrize(
    "name", ["../other/x.safetensors", "/{root}/other/x.safetensors", "a/../../x.safetensors"]
)
def test_index_that_leads_out_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    write_single(tmp_path / "other", "x.safetensors")
    (tmp_path / "model").mkdir()
    write_index(tmp_path / "model", dict.fromkeys(WEIGHTS, name.format(root=tmp_path)))
    error = refusal(tmp_path / "model")
    assert "outside its directory" in str(error)


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {}, "x", {"a.weight": 3}, {"a.weight": None}, {"a.weight": "config.json"}],
    ids=str,
)
def test_index_that_is_none_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, weight_map)
    assert INDEX in str(refusal(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {"a": "x", "a": "y"}}', "NaN"])
def test_index_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(text)
    assert INDEX in str(refusal(tmp_path))


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / SHARDS[0]).unlink()
    error = refusal(tmp_path)
    assert "1 missing" in str(error)
    assert_that_names(error, SHARDS[0])


def test_tensor_that_the_index_places_elsewhere_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_index(tmp_path, {"a.weight": SHARDS[1], "b.weight": SHARDS[1], "c": SHARDS[1]})
    error = refusal(tmp_path)
    assert error.key == "a.weight"
    assert SHARDS[1] in str(error)


def test_tensor_in_two_files_is_refused_unless_the_index_says_which(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file(
        {"a.weight": torch.ones(3, 4), **{k: WEIGHTS[k] for k in ("b.weight", "c")}},
        tmp_path / SHARDS[1],
    )
    assert_loads(tmp_path)
    (tmp_path / INDEX).unlink()
    error = refusal(tmp_path)
    assert (error.key, error.found) == ("a.weight", SHARDS[0])


def test_parts_of_tensors_without_their_places_are_refused(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"DCP_SHARDING_INFO": "{}"})
    assert "HuggingFaceStorageWriter" in str(refusal(tmp_path))


@pytest.mark.parametrize("names", [[], ["config.json"], ["pytorch_model.bin"]], ids=str)
def test_directory_without_weights_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    error = refusal(tmp_path)
    assert isinstance(error, ReadError)
    assert "no weights" in str(error)


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1, "a": 2}'])
def test_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    write_single(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in str(refusal(tmp_path))


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed))
        if rng.random() < 0.5:
            changed[at] = rng.randrange(256)
        else:
            changed[at : at + rng.randint(0, 5)] = rng.choice(
                [b"", b"9" * 20, b"-1", b"[", b"}", b'"', b"\xff", b"null", b"../", b"1e9"]
            )
        changed = changed or bytearray(b"{")
    return bytes(changed)


@pytest.mark.parametrize("what", ["index", "header"])
@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_fuzzed_directory_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, what: str, seed: int
) -> None:
    rng = random.Random(seed)
    directory = tmp_path_factory.getbasetemp() / f"fuzz-{what}"
    write_sharded(directory)
    file = directory / (INDEX if what == "index" else SHARDS[0])
    file.write_bytes(mutated(file.read_bytes(), rng))
    try:
        with OpenInputs(open_directory(directory)) as inputs:
            found = open_hf_directory(inputs)
    except (CorruptCheckpointError, ReadError):
        return
    for key in found.file_of_key:
        stored = found.stored(key)
        path = directory / found.file_of_key[key]
        assert 8 <= stored.start <= stored.start + stored.nbytes <= os.path.getsize(path)
