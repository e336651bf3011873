"""What is refused when the writer is made or warmed up, before any hour of training is lost."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from transformers import LlamaConfig, LlamaForCausalLM

from dcp_hf_writer import (
    HFDualReader,
    HFDualWriter,
    HFExport,
    WriteSlots,
    load_hf,
    materialize,
    verify,
)
from dcp_hf_writer.errors import ConfigError, ExportError, TargetExistsError, WriteError
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable


def state() -> dict[str, Any]:
    return {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "step": 3}


def base_model(path: Path) -> Path:
    path.mkdir(parents=True)
    save_file({"w": torch.zeros(2, 3)}, path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")
    return path


# Options


def shown(value: object) -> str:
    """Name a value in the id of a test; some values are too long."""
    return repr(value)[:30]


HUGE = 10**400
BAD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "timeout_s": (HUGE, -HUGE, 0, -1, float("nan"), float("inf"), 1e300, True, "60", None, [1]),
    "host_budget_bytes": (float("nan"), -1, 0, True, "1", 2.0**30, None),
    "overwrite": ("no", 1, None),
    "weights": (None, 1, ["both"], "BOTH"),
    "staging": (None, True, {}),
    "on_export_error": (None, 1, "ignore"),
    "strategy": (None, 0, "fast"),
    "slots": (None, 3, "2"),
    "process_group": ("gloo", 3, []),
    "dcp_writer": (3, "fs", FileSystemWriter),
    "storage_options": (3, {"anon": True}, "x"),
    "export": (3, "hf", HFExport, HFExport(subdir="dcp-hf.json"), HFExport(subdir=".metadata")),
}


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option, values in BAD_OPTIONS.items() for value in values],
    ids=shown,
)
def test_writer_refuses_an_option_and_names_it(option: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        HFDualWriter(tmp_path / "step-1", **{option: value})
    name = "subdir" if isinstance(value, HFExport) else option
    assert str(caught.value).startswith(name)
    assert len(str(caught.value)) < 500


BAD_EXPORT_OPTIONS: dict[str, tuple[Any, ...]] = {
    "max_shard_size": ("9" * 400 + "GB", "nan", "", None, 1.5, True),
    "header_align": (True, 8.0, 7, "8", HUGE + 1),
    "subdir": (3, b"x", Path("hf"), "", ".", "a/b", "a\0"),
    "key": (3, ""),
    "tied": (3, ["a"], {"a": 1}),
    "expect_keys": ("abc", 3, [1]),
    "metadata": (3, ["a"], {"a": 1}, {"format": "pt"}),
    "groups": (3, "ab", ["ab"], [("a", 1)]),
    "total_parameters": (-1, "x", True, 1.0),
    "keep_dtype": (3, "norm", [1], ["("]),
    "like": (3, "", b"x"),
    "checksums": ([], "md5", True),
    "order": ([], None, "random"),
    "specs": (3, "x", [1]),
    "dtype": (3, "nope", torch.int8),
}


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option, values in BAD_EXPORT_OPTIONS.items() for value in values],
    ids=shown,
)
def test_export_refuses_an_option_and_names_it(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        HFExport(**{option: value})
    assert option in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("timeout_s", value) for value in (HUGE, 0, float("nan"), True, "1")),
        *(("slots", value) for value in (-1, True, 2.0, "2")),
        *(("directory", value) for value in ("", 3, b"x")),
    ],
    ids=shown,
)
def test_slots_refuse_an_option_and_name_it(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        WriteSlots(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("source", []), ("verify", "yes"), ("exchange", 1), ("key", ""), ("path", 3), ("path", None)],
)
def test_reader_refuses_an_option_and_names_it(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        HFDualReader(**{"path": "x", option: value})


def test_expected_keys_may_be_an_iterator() -> None:
    assert HFExport(expect_keys=iter(["a", "b"])).expect_keys == {"a", "b"}


# Paths


class Foreign:
    """A path of another library."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __fspath__(self) -> str:
        return self.text


FORMS: dict[str, Callable[[str], Any]] = {
    "~": lambda name: f"~/{name}",
    "Path with ~": lambda name: Path(f"~/{name}"),
    "PathLike": lambda name: Foreign(f"~/{name}"),
    "file URL": lambda name: f"file://{os.environ['HOME']}/{name}",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_entry_takes_a_path_as_users_write_it(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    base_model(home / "base")
    (home / "notes.txt").write_text("n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    path = FORMS[form]
    asset: Any = path("notes.txt")
    export = HFExport(like=path("base"), assets=[asset])
    slots = WriteSlots(directory=path("slots"))
    writer = HFDualWriter(path("run/step-1"), export=export, slots=slots)
    dcp.save(state(), storage_writer=writer, no_dist=True)
    dcp.save(state(), storage_writer=writer, checkpoint_id=path("run/step-2"), no_dist=True)
    assert sorted(os.listdir(home / "run")) == ["step-1", "step-2"]
    assert (home / "slots").is_dir()
    beside = {"notes.txt", "tokenizer.json", "model.safetensors"}
    assert set(os.listdir(home / "run" / "step-1" / "hf")) == beside

    for reader, where in (
        (HFDualReader(path("run/step-1")), None),
        (HFDualReader("elsewhere"), path("run/step-2")),
    ):
        loaded = {"model": {"w": torch.zeros(2, 3)}, "step": 0}
        dcp.load(loaded, storage_reader=reader, checkpoint_id=where, no_dist=True)
        assert torch.equal(loaded["model"]["w"], state()["model"]["w"])  # type: ignore[index]
    weights = {"w": torch.zeros(2, 3)}
    load_hf(weights, path("run/step-1/hf"))
    assert torch.equal(weights["w"], state()["model"]["w"])
    assert verify(path("run/step-1")).ok
    materialize(path("run/step-1"), path("run/plain"))
    assert verify(path("run/plain")).ok
    assert sorted(os.listdir(tmp_path)) == ["home"]


@pytest.mark.parametrize("kind", ["target", "parent"])
def test_writer_is_refused_when_a_file_is_in_the_way(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the user")
    path = tmp_path / "file" if kind == "target" else tmp_path / "file" / "step-1"
    error = TargetExistsError if kind == "target" else WriteError
    with pytest.raises(error, match="file") as caught:
        HFDualWriter(path)
    assert caught.value.path == str(tmp_path / "file")
    # A path that comes with the save meets the same check, in its planning step.
    writer = HFDualWriter(tmp_path / "step-1")
    with pytest.raises(BaseException, match=error.__name__):
        dcp.save(state(), storage_writer=writer, checkpoint_id=path, no_dist=True)
    assert os.listdir(tmp_path) == ["file"]


# What the export needs


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"like": "absent"}, ConfigError, "like must be a model directory"),
        ({"like": "file"}, ConfigError, "found a file"),
        ({"like": "empty"}, ConfigError, "like must be a directory with an index"),
        ({"like": "owner/name"}, ConfigError, "snapshot_download('owner/name')"),
        ({"assets": "absent"}, ExportError, "nothing at this path"),
        ({"assets": ["file", "absent"]}, ExportError, "nothing at this path"),
        ({"assets": 3}, ConfigError, "assets must be paths"),
        ({"assets": [None, {"a": 3}]}, ConfigError, "must be bytes or text"),
    ],
    ids=str,
)
def test_writer_is_refused_when_the_export_cannot_have_its_files(
    options: dict[str, Any],
    error: type[Exception],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("of the user")
    Path("empty").mkdir()
    with pytest.raises(error) as caught:
        HFDualWriter("step-1", export=HFExport(**options))
    assert words in str(caught.value)


def test_writer_warns_when_an_asset_is_not_there_and_errors_of_the_export_only_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export = HFExport(assets=tmp_path / "absent")
    with caplog.at_level(logging.WARNING):
        writer = HFDualWriter(tmp_path / "step-1", export=export, on_export_error="warn")
    assert str(tmp_path / "absent") in caplog.text
    dcp.save(state(), storage_writer=writer, no_dist=True)
    assert "hf" not in os.listdir(tmp_path / "step-1")


def test_writer_does_not_look_again_at_what_has_been_read(tmp_path: Path) -> None:
    export = HFExport(like=base_model(tmp_path / "base"))
    dcp.save(state(), storage_writer=HFDualWriter(tmp_path / "1", export=export), no_dist=True)
    (tmp_path / "base").rename(tmp_path / "moved")
    dcp.save(state(), storage_writer=HFDualWriter(tmp_path / "2", export=export), no_dist=True)
    assert (tmp_path / "2" / "hf" / "tokenizer.json").is_file()


def make_on_ranks(rank: int, world_size: int, root: Path, launcher: dict[str, list[str]]) -> str:
    for name in ("RANK", "LOCAL_WORLD_SIZE", "SLURM_NODEID"):
        os.environ.pop(name, None)
    os.environ.update({name: values[rank] for name, values in launcher.items()})
    try:
        HFDualWriter(root / "step-1", export=HFExport(like=root / "absent"))
    except ConfigError as error:
        return str(error)
    return ""


def test_all_ranks_of_one_host_raise_together(tmp_path: Path) -> None:
    launcher = {"RANK": ["0", "1"], "LOCAL_WORLD_SIZE": ["2", "2"]}
    for environment in ({}, launcher):
        for text in run_ranks(make_on_ranks, 2, tmp_path, environment):
            assert "like must be a model directory" in text


@pytest.mark.parametrize(
    "launcher",
    [{"RANK": ["0", "1"], "LOCAL_WORLD_SIZE": ["1", "1"]}, {"SLURM_NODEID": ["0", "1"]}],
    ids=["torchrun", "Slurm"],
)
def test_base_model_may_be_missing_on_other_hosts(
    launcher: dict[str, list[str]], tmp_path: Path
) -> None:
    first, second = run_ranks(make_on_ranks, 2, tmp_path, launcher)
    assert "like must be a model directory" in first
    assert second == ""


def model_that_save_pretrained_refuses() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    model.generation_config.temperature = 0.5
    return model


def test_warm_up_fails_when_an_asset_cannot_be_read_and_the_error_is_not_kept(
    tmp_path: Path,
) -> None:
    model = model_that_save_pretrained_refuses()
    export = HFExport.from_transformers(model)
    weights = {"model": model.state_dict()}
    writer = HFDualWriter(tmp_path / "1", export=export)
    with pytest.raises(ExportError, match="temperature"):
        writer.warm_up(weights)
    with pytest.raises(ExportError, match="temperature"):
        dcp.async_save(weights, storage_writer=writer).result()
    assert sorted(os.listdir(tmp_path)) == ["1"]
    model.generation_config.temperature = None
    for name, save in (("2", dcp.save), ("3", lambda *a, **k: dcp.async_save(*a, **k).result())):
        again = HFDualWriter(tmp_path / name, export=export)
        again.warm_up(weights)
        save(weights, storage_writer=again)
        assert (tmp_path / name / "hf" / "generation_config.json").is_file()


def test_failed_read_of_one_save_does_not_reach_the_next(tmp_path: Path) -> None:
    """Without `warm_up`, and with the same writer."""
    model = model_that_save_pretrained_refuses()
    weights = {"model": model.state_dict()}
    writer = HFDualWriter(tmp_path / "1", export=HFExport.from_transformers(model))
    with pytest.raises(ExportError, match="temperature"):
        dcp.async_save(weights, storage_writer=writer).result()
    model.generation_config.temperature = None
    dcp.async_save(weights, storage_writer=writer, checkpoint_id=tmp_path / "2").result()
    assert verify(tmp_path / "2").ok
    assert (tmp_path / "2" / "hf").is_dir()
