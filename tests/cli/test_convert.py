"""`export`, `import` and `materialize`: what they write, and what they refuse."""

from __future__ import annotations

import filecmp
import shutil
from typing import TYPE_CHECKING

import pytest
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport
from support.command import answer, dcp_hf
from support.small_states import dcp_difference, state_of

if TYPE_CHECKING:
    from pathlib import Path

# Each test starts several processes, and each of them imports torch.
pytestmark = pytest.mark.timeout(600)


def differing_files(a: Path, b: Path) -> list[str]:
    """Return the names of files that only one directory has, or that differ."""
    names = {p.name for p in (*a.iterdir(), *b.iterdir())}
    same, _, _ = filecmp.cmpfiles(a, b, names, shallow=False)
    return sorted(names - set(same))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_export_of_a_stock_checkpoint_equals_the_live_export(
    name: str, models: Path, tmp_path: Path
) -> None:
    live = models / name / "live" / "hf"
    options = ("--config", live, "--dtype", "bfloat16", "--max-shard-size", "20KB")
    found = answer("export", models / name / "stock", tmp_path / "hf", *options)
    assert differing_files(live, tmp_path / "hf") == []
    assert len(found["files"]) > 1
    assert found["left_out"] == ["entry 'optim' (1 tensor)"]


def test_export_of_our_checkpoint_takes_ties_from_its_manifest(
    models: Path, tmp_path: Path
) -> None:
    found = answer("export", models / "llama" / "live", tmp_path / "hf")
    assert found["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert answer("diff", tmp_path / "hf", models / "llama" / "live", code=1)["equal"] == 20


def test_export_takes_specs_from_a_file(models: Path, tmp_path: Path) -> None:
    specs = "from dcp_hf_writer import LoadSpec\n"
    specs += "def mine():\n    return [LoadSpec('embed', ('wte',), (7, 4))]\n"
    (tmp_path / "specs.py").write_text(specs)
    dcp.save(state_of(1), checkpoint_id=tmp_path / "dcp")
    where = f"{tmp_path}/specs.py:mine"
    answer("export", tmp_path / "dcp", tmp_path / "hf", "--specs", where)
    keys = answer("inspect", tmp_path / "hf", "--key", "wte|embed")["tensors"]
    assert [one["name"] for one in keys] == ["wte"]
    assert dcp_hf("export", tmp_path / "dcp", tmp_path / "h", "--specs", f"{where}x").code == 2


def test_export_leaves_nothing_behind_when_a_file_is_damaged(models: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(models / "llama" / "stock", tmp_path / "broken")
    (file,) = broken.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-20000])
    (tmp_path / "out").mkdir()
    assert answer("export", broken, tmp_path / "out" / "hf", code=3)["error"]["path"] is not None
    assert list((tmp_path / "out").iterdir()) == []


def test_export_refuses_a_directory_that_holds_weights(models: Path, tmp_path: Path) -> None:
    before = shutil.copytree(models / "llama" / "live" / "hf", tmp_path / "hf")
    error = answer("export", models / "llama" / "stock", before, "--config", before, code=3)
    assert error["error"]["type"] == "TargetExistsError"
    assert differing_files(models / "llama" / "live" / "hf", before) == []


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_materialize_makes_a_checkpoint_that_torch_alone_reads(scheme: str, tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "once", export=HFExport(), weights="once")
    dcp.save(state_of(3), storage_writer=writer)
    found = answer("materialize", tmp_path / "once", f"{scheme}{tmp_path}/plain")
    assert found["path"] == f"{tmp_path}/plain"
    assert dcp_difference(tmp_path / "plain", state_of(3)) is None


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_import_reverses_an_export(name: str, models: Path, tmp_path: Path) -> None:
    live = models / name / "live" / "hf"
    answer("export", models / name / "stock", tmp_path / "hf", "--config", live)
    found = answer("import", tmp_path / "hf", tmp_path / "dcp", "--config", live)
    assert found["missing"] == []
    assert answer("verify", tmp_path / "dcp")["ok"]
    only_stock = answer("diff", tmp_path / "dcp", models / name / "stock", code=1)
    assert [one["name"] for one in only_stock["differences"]] == ["optim.m"]
