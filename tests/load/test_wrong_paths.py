"""Loads of what is no checkpoint: the error says what is there, and what may be meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from dcp_hf_writer import HFDualReader, HFDualWriter, load_hf, materialize, verify
from dcp_hf_writer.errors import CorruptCheckpointError, ReadError
from support.own_errors import own_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def state() -> dict[str, Any]:
    return {"model": {"w": torch.ones(2, 3)}, "step": 3}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with the steps 9 and 10, a file, and a directory without a checkpoint."""
    for step in (9, 10):
        writer = HFDualWriter(tmp_path / f"run/step-{step}")
        dcp.save(state(), storage_writer=writer, no_dist=True)
    (tmp_path / "notes.txt").write_text("of the user")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(path: str) -> None:
    dcp.load(state(), storage_reader=HFDualReader(path), no_dist=True)


ENTRIES: dict[str, Callable[[str], Any]] = {
    "dcp.load": load,
    "load_hf": lambda path: load_hf(state(), path),
    "materialize": lambda path: materialize(path, "plain"),
    "verify": lambda path: verify(path).raise_if_bad(),
}

PATHS: dict[str, tuple[str, ...]] = {
    "run/step-11": ("found nothing", "checkpoints in ", "step-10, step-9"),
    "run": ("pass one of the checkpoints in it: step-10, step-9",),
    "run/step-9/.metadata": ("found a file", "pass the directory: ", "run/step-9"),
    "run/step-9/__0_0.distcp": ("found a file", "pass the directory: ", "run/step-9"),
    "run/step-9/dcp-hf.json": ("found a file", "pass the directory: ", "run/step-9"),
    "notes.txt": ("found a file", "pass a directory"),
    "notes.txt/step-1": ("found nothing", "notes.txt is not a directory"),
    "link": ("found a symbolic link to nothing",),
    "empty": ("empty",),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("path", PATHS)
def test_error_says_what_is_at_a_wrong_path(path: str, entry: str, run: Path) -> None:
    with pytest.raises(BaseException, match=r"there (is|are) no") as caught:
        ENTRIES[entry](path)
    (error,) = own_errors(caught.value)
    assert str(run / path) in str(error)
    assert [word for word in PATHS[path] if word not in str(error)] == []
    assert not (run / "plain").exists()


@pytest.mark.parametrize("entry", ["dcp.load", "load_hf", "verify"])
@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-30B-A3B"])
def test_id_of_a_repository_is_recognised(name: str, entry: str, run: Path) -> None:
    with pytest.raises(BaseException, match="there is no checkpoint") as caught:
        ENTRIES[entry](name)
    (error,) = own_errors(caught.value)
    assert f"huggingface_hub.snapshot_download({name!r})" in str(error)


@pytest.mark.parametrize("name", ["__0_0.distcp", "hf/model.safetensors"])
def test_missing_file_of_a_checkpoint_is_named(name: str, run: Path) -> None:
    (run / "run/step-9" / name).unlink()
    reader = HFDualReader("run/step-9", source="dcp" if "distcp" in name else "hf")
    with pytest.raises(BaseException, match=r"missing|no weights") as caught:
        dcp.load(state(), storage_reader=reader, no_dist=True)
    (error,) = own_errors(caught.value)
    assert isinstance(error, ReadError)
    if "distcp" in name:
        assert error.path == str(run / "run/step-9" / name)
        assert "a file of the checkpoint is missing" in str(error)
        assert "verify(path) lists all" in str(error)
    # The control: the other step is whole.
    load("run/step-10")


def test_missing_shard_of_a_repository_is_named(run: Path) -> None:
    directory = run / "hub"
    directory.mkdir()
    save_file({"w": torch.ones(2, 3)}, directory / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "b.safetensors"}}'
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptCheckpointError, match=r"missing.*b\.safetensors"):
        load_hf({"w": torch.zeros(2, 3), "v": torch.zeros(1)}, directory)


def test_load_hf_says_that_a_checkpoint_has_only_a_dcp_half(run: Path) -> None:
    writer = HFDualWriter("dcp-only", export=None)
    dcp.save(state(), storage_writer=writer, no_dist=True)
    with pytest.raises(ReadError, match="a DCP half only"):
        load_hf(state(), "dcp-only")


def test_load_hf_names_the_files_that_are_no_weights_in_its_format(run: Path) -> None:
    directory = run / "pickled"
    directory.mkdir()
    torch.save({"w": torch.ones(2)}, directory / "pytorch_model.bin")
    with pytest.raises(ReadError, match=r"only 'pytorch_model\.bin'; convert the weights"):
        load_hf(state(), directory)
