"""The files beside the weights, as they are read and rendered."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig

from dcp_hf_writer import HFExport
from dcp_hf_writer.errors import ConfigError, ExportError
from dcp_hf_writer.save import export_assets
from dcp_hf_writer.save.export_assets import Assets, assets_of, known, preload, preset
from support.compare import INDEX_NAME
from support.sharded_models import MODELS, build_model
from support.unwilling import Unwilling

if TYPE_CHECKING:
    from pathlib import Path


def files_of(*assets: Any, **options: Any) -> dict[str, bytes]:
    return dict(assets_of(HFExport(assets=assets, **options)).files)


class Counting:
    """An object with `save_pretrained`, which counts its calls."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.calls = 0

    def save_pretrained(self, directory: str) -> None:
        from pathlib import Path

        self.calls += 1
        for name, text in self.files.items():
            path = Path(directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


# What may be given


@pytest.mark.parametrize(
    "data",
    [b"data", bytearray(b"data"), memoryview(b"data"), "data"],
    ids=lambda d: type(d).__name__,
)
def test_content_may_be_given_by_name(data: object) -> None:
    assert files_of({"a.json": data, "sub/b.txt": data}) == {
        "a.json": b"data",
        "sub/b.txt": b"data",
    }


def test_files_and_directories_may_be_given_by_path(tmp_path: Path) -> None:
    directory = tmp_path / "tokenizer"
    (directory / "sub").mkdir(parents=True)
    (directory / "vocab.txt").write_text("a")
    (directory / "sub" / "merges.txt").write_text("b")
    (directory / ".git").mkdir()
    (directory / ".git" / "HEAD").write_text("hidden")
    (tmp_path / "README.md").write_text("c")
    assert files_of(directory, str(tmp_path / "README.md")) == {
        "vocab.txt": b"a",
        "sub/merges.txt": b"b",
        "README.md": b"c",
    }


def test_objects_write_themselves() -> None:
    found = files_of(Counting({"tokenizer.json": "{}", "sub/x": "y"}))
    assert found == {"tokenizer.json": b"{}", "sub/x": b"y"}


def test_weights_are_left_out_of_directories_and_of_what_objects_write(tmp_path: Path) -> None:
    weights = ("model-00001-of-00009.safetensors", "pytorch_model.bin", INDEX_NAME)
    for name in (*weights, "config.json"):
        (tmp_path / name).write_text("{}")
    assert files_of(tmp_path) == {"config.json": b"{}"}
    asset = Counting(dict.fromkeys((*weights, "config.json"), "{}"))
    assert files_of(asset) == {"config.json": b"{}"}


def test_assets_may_be_one_or_many_or_nested_and_later_ones_win() -> None:
    one, other = {"a": b"1", "b": b"1"}, {"b": b"2"}
    assert assets_of(HFExport(assets=one)).files == one
    assert files_of([one, (other, None)]) == {"a": b"1", "b": b"2"}
    assert files_of() == {}
    assert assets_of(HFExport(assets=None)).files == {}


def test_configs_are_written_as_transformers_writes_them(tmp_path: Path) -> None:
    config, generation = LlamaConfig(hidden_size=32), GenerationConfig(max_length=7)
    config.save_pretrained(tmp_path)
    generation.save_pretrained(tmp_path)
    assert files_of(config, generation) == {
        path.name: path.read_bytes() for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize("name", MODELS)
def test_model_gives_the_files_that_it_saves_beside_its_weights(tmp_path: Path, name: str) -> None:
    model = build_model(name)
    model.save_pretrained(tmp_path)
    expected = {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".safetensors"
    }
    assert files_of(model) == expected
    assert "config.json" in expected


def test_config_tells_the_dtype_of_the_export() -> None:
    config = LlamaConfig(hidden_size=32, dtype="float32")
    plain = json.loads(files_of(config)["config.json"])
    text = files_of(config, dtype=torch.bfloat16)["config.json"].decode()
    found = json.loads(text)
    key = "dtype" if "dtype" in plain else "torch_dtype"
    assert (plain[key], found[key]) == ("float32", "bfloat16")
    assert {**found, key: "float32"} == plain
    assert text == json.dumps(found, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("values", [{}, {"torch_dtype": "float16"}, {"dtype": "float16"}], ids=str)
def test_dtype_is_told_where_the_config_tells_it(values: dict[str, str]) -> None:
    found = files_of({"config.json": json.dumps(values)}, dtype="bfloat16")["config.json"]
    assert json.loads(found) == dict.fromkeys(values or ["dtype"], "bfloat16")


# A base model


def base(path: Path, weights: dict[str, dict[str, str]], **others: str) -> Path:
    """Make a model directory; `weights` gives the index of each index file."""
    path.mkdir(exist_ok=True)
    for name, weight_map in weights.items():
        (path / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, text in others.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_base_model_gives_the_file_of_each_key_and_its_other_files(tmp_path: Path) -> None:
    weight_map = {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    path = base(tmp_path / "base", {INDEX_NAME: weight_map}, config__json="{}", vocab__txt="v")
    for name in (
        *("model-00001-of-00002.safetensors", "pytorch_model.bin", "model.gguf", "old.onnx"),
        *("pytorch_model.bin.index.json", ".gitattributes"),
    ):
        (path / name).write_bytes(b"weights")
    (path / ".cache").mkdir()
    (path / ".cache" / "lock").touch()
    (path / "sub").mkdir()
    (path / "sub" / "extra.json").write_text("[]")
    found = assets_of(HFExport(like=path))
    assert found.file_of_key == weight_map
    assert found.files == {"config.json": b"{}", "vocab.txt": b"v", "sub/extra.json": b"[]"}


def test_base_model_of_one_file_has_no_index(tmp_path: Path) -> None:
    path = base(tmp_path / "base", {}, config__json="{}")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, path / "model.safetensors")
    found = assets_of(HFExport(like=str(path)))
    assert found.file_of_key == {"a": "model.safetensors", "b": "model.safetensors"}


def test_assets_replace_files_of_the_base_model(tmp_path: Path) -> None:
    path = base(tmp_path / "base", {INDEX_NAME: {"a": "x.safetensors"}}, config__json="old")
    assert files_of({"config.json": b"new"}, like=path) == {"config.json": b"new"}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "within the export directory"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "within the export directory"),
    ],
)
def test_index_that_cannot_be_followed_is_refused(tmp_path: Path, index: str, words: str) -> None:
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(ConfigError, match=words):
        assets_of(HFExport(like=tmp_path))


@pytest.mark.parametrize("count", [0, 2])
def test_base_model_without_an_index_must_have_one_file(tmp_path: Path, count: int) -> None:
    for i in range(count):
        save_file({f"{i}": torch.zeros(1)}, tmp_path / f"{i}.safetensors")
    with pytest.raises(ConfigError, match="an index, or with exactly one safetensors file"):
        assets_of(HFExport(like=tmp_path))


def test_base_model_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="like must be a model directory"):
        assets_of(HFExport(like=tmp_path / "missing"))


def test_damaged_base_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        assets_of(HFExport(like=tmp_path))


# Refusals


@pytest.mark.parametrize("name", ["", "../x", "/x", "a/../../x", "a\\b", "nul\0"])
def test_name_that_leaves_the_directory_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="within the export directory"):
        files_of({name: b""})


@pytest.mark.parametrize("asset", [3, b"bytes", object(), {"a": 3}], ids=lambda a: type(a).__name__)
def test_asset_of_another_kind_is_refused(asset: object) -> None:
    with pytest.raises(ConfigError):
        files_of(asset)


def test_missing_file_is_an_error_of_the_export(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="missing"):
        files_of(tmp_path / "missing.json")


def test_object_that_cannot_be_saved_is_named() -> None:
    with pytest.raises(ExportError, match=r"Unwilling\.save_pretrained failed.*no vocabulary"):
        files_of(Unwilling())


def test_config_that_is_no_json_is_an_error_of_the_export() -> None:
    with pytest.raises(ExportError, match="JSONDecodeError"):
        files_of({"config.json": b"{"}, dtype="bfloat16")


# Read once


def test_assets_are_read_once() -> None:
    asset = Counting({"a": "1"})
    export = HFExport(assets=[asset])
    assert known(export) is None
    preload(export)
    asset.files["a"] = "2"
    assert [dict(assets_of(export).files) for _ in range(3)] == [{"a": b"1"}] * 3
    assert asset.calls == 1
    assert dict(assets_of(HFExport(assets=[asset])).files) == {"a": b"2"}


def test_read_that_failed_is_not_kept() -> None:
    asset = Unwilling()
    export = HFExport(assets=[asset])
    error = preload(export)
    assert isinstance(error, ExportError)
    assert (error.__traceback__, error.__context__) == (None, None)
    with pytest.raises(ExportError, match="no vocabulary"):
        assets_of(export)
    assert known(export) is None
    asset.save_pretrained = Counting({"a": "1"}).save_pretrained  # type: ignore[method-assign]
    assert preload(export) is None
    assert assets_of(export).files == {"a": b"1"}


def test_what_another_process_read_is_used() -> None:
    export = HFExport(assets=[Unwilling()])
    preset(export, Assets({"a": b"1"}, None))
    assert assets_of(export).files == {"a": b"1"}


def test_files_are_kept_for_as_long_as_their_export() -> None:
    before = len(export_assets._cache)
    exports = [HFExport(assets={"a": bytes([i])}) for i in range(20)]
    for export in exports:
        preload(export)
    assert [assets_of(export).files["a"] for export in exports] == [bytes([i]) for i in range(20)]
    assert len(export_assets._cache) == before + 20
    del exports, export
    gc.collect()
    assert len(export_assets._cache) <= before
