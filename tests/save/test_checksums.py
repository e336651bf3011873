"""Checksums of an export: right, in the form that SGLang reads, and only where asked for."""

from __future__ import annotations

import json
import logging
import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, verify
from dcp_hf_writer.errors import ConfigError, ExportError, SaveTimeoutError
from dcp_hf_writer.save import checksums
from support.audit import faults, read_manifest
from support.ranks import run_ranks
from support.small_states import dcp_difference, state_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAME = "checksums.json"
ASSETS = {"config.json": b"{}", "nested/tokenizer.json": b"[1, 2]"}


def save(rank: int, world_size: int, directory: Path) -> None:
    state = state_of(1, init_device_mesh("cpu", (world_size,)))
    export = HFExport(checksums="sha256", max_shard_size=100, assets=ASSETS)
    dcp.async_save(state, storage_writer=HFDualWriter(directory, export=export)).result()


def save_alone(directory: Path, **options: Any) -> Path:
    export = HFExport(**{"assets": ASSETS, **options})
    writer = HFDualWriter(directory, export=export)
    # Its future raises our errors; a synchronous save raises torch's.
    dcp.async_save(state_of(1), storage_writer=writer, no_dist=True).result()
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checksums") / "step-1"
    run_ranks(save, 2, directory)
    return directory


def test_checksums_are_those_of_sha256sum_for_every_file_of_the_export(saved: Path) -> None:
    export = saved / "hf"
    listed = json.loads((export / NAME).read_bytes())
    assert listed.keys() == {"files"}
    names = {str(p.relative_to(export)) for p in export.rglob("*") if p.is_file()} - {NAME}
    assert listed["files"].keys() == names
    assert {"config.json", "nested/tokenizer.json", "model.safetensors.index.json"} < names
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert all(entry.keys() == {"sha256", "size"} for entry in listed["files"].values())
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in listed["files"].items())
    done = subprocess.run(
        ["sha256sum", "--check", "--strict"],
        input=lines,
        cwd=export,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": OK") == len(names)
    for name, entry in listed["files"].items():
        assert entry["size"] == (export / name).stat().st_size


def test_manifest_accounts_for_the_file_and_for_its_cost(saved: Path) -> None:
    assert faults(saved) == []
    assert verify(saved).ok
    manifest = read_manifest(saved)
    assert f"hf/{NAME}" in manifest["files"]
    assert manifest["timings"]["coordinator"]["checksums"] > 0


def test_cost_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dcp_hf_writer"):
        save_alone(tmp_path / "step-1", checksums="sha256")
    assert re.search(r"sha256 of 3 export files \(\d+ bytes\) took \d+\.\d\d s", caplog.text)


def test_there_are_none_unless_asked_for(tmp_path: Path) -> None:
    directory = save_alone(tmp_path / "step-1")
    assert not (directory / "hf" / NAME).exists()
    assert "checksums" not in read_manifest(directory)["timings"]["coordinator"]
    writer = HFDualWriter(tmp_path / "step-2", export=None)
    dcp.save(state_of(1), storage_writer=writer, no_dist=True)
    assert not list((tmp_path / "step-2").rglob(NAME))


@pytest.mark.parametrize("kind", ["md5", True, ""])
def test_unknown_kind_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="checksums has an unknown value"):
        HFExport(checksums=kind)


def test_asset_of_the_same_name_is_refused(tmp_path: Path) -> None:
    assets = {**ASSETS, NAME: b"{}"}
    with pytest.raises(ExportError, match="an asset has the name of a file that the export makes"):
        save_alone(tmp_path / "step-1", checksums="sha256", assets=assets)
    directory = save_alone(tmp_path / "step-2", assets=assets)
    assert (directory / "hf" / NAME).read_bytes() == b"{}"


def test_checksums_of_the_base_model_are_not_copied(tmp_path: Path) -> None:
    base = save_alone(tmp_path / "base", checksums="sha256") / "hf"
    assert (base / NAME).exists()
    directory = save_alone(tmp_path / "step-1", like=base)
    assert not (directory / "hf" / NAME).exists()
    again = save_alone(tmp_path / "step-2", like=base, checksums="sha256")
    listed = json.loads((again / "hf" / NAME).read_bytes())["files"]
    assert "model.safetensors" in listed
    assert verify(again).ok


def refusing(error: BaseException) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    return refuse


def test_failure_costs_the_export_and_not_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_sha256", refusing(OSError(5, "Input/output error")))
    with pytest.raises(ExportError, match="Input/output error"):
        save_alone(tmp_path / "step-1", checksums="sha256")
    assert not (tmp_path / "step-1" / "hf").exists()
    assert verify(tmp_path / "step-1").ok
    assert dcp_difference(tmp_path / "step-1", state_of(1)) is None


def test_deadline_holds_while_checksums_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_sha256", refusing(SaveTimeoutError("the deadline passed")))
    with pytest.raises(SaveTimeoutError, match="the deadline passed"):
        save_alone(tmp_path / "step-1", checksums="sha256")
    assert list(tmp_path.iterdir()) == []


def test_save_that_is_given_up_stops_between_pieces(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "x").write_bytes(torch.zeros(3 << 20, dtype=torch.uint8).numpy().tobytes())
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 2:
            msg = "given up"
            raise SaveTimeoutError(msg)

    with pytest.raises(SaveTimeoutError, match="given up"):
        checksums.add_checksums(str(tmp_path), "hf", check=check)
    assert len(calls) == 2
    assert not (tmp_path / "hf" / NAME).exists()
