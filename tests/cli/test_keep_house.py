"""`gc`, `pin`, `unpin`, `report`, `doctor`: real commands on real checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from support.command import answer, dcp_hf

if TYPE_CHECKING:
    from pathlib import Path

# Each test starts several processes, and each of them imports torch.
pytestmark = pytest.mark.timeout(600)


def test_gc_deletes_what_the_dry_run_names_and_nothing_else(run: Path, tmp_path: Path) -> None:
    root = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (root / ".deleted-x").mkdir()
    (root / ".deleted-x" / "file").write_bytes(bytes(10))
    before = sorted(p.name for p in root.iterdir())
    dry = answer("gc", root, "--keep-last", "1", "--dry-run")
    assert sorted(p.name for p in root.iterdir()) == before
    # Step 2 is pinned; steps 4 and 5 are not ours.
    assert (dry["steps"], dry["exports"], dry["snapshots"]) == ([1], [], [])
    assert dry["leftovers"] == [{"name": ".deleted-x", "state": "dead", "nbytes": 10}]
    found = answer("gc", root, "--keep-last", "1")
    assert {**found, "dry_run": True} == dry
    gone = set(before) - {p.name for p in root.iterdir()}
    assert gone == {"step-1", ".deleted-x"}
    assert "there is nothing to delete" in dcp_hf("gc", root, "--keep-last", "1").out


def test_gc_keeps_a_save_that_may_be_alive(run: Path, tmp_path: Path) -> None:
    root = shutil.copytree(run, tmp_path / "run", symlinks=True)
    (root / ".incomplete-other").mkdir()
    record = {"save_id": "other", "target": f"{root}/step-9"}
    owner = {"host": "another-host", "boot": "x", "pid": 1, "start": 1}
    text = json.dumps({**record, "owner": owner})
    (root / ".incomplete-other" / ".dcp-hf-save.json").write_text(text)
    found = answer("gc", root)
    assert found["remaining"] == [".incomplete-other"]
    assert found["leftovers"][0]["state"] == "unknown"


def test_pin_and_unpin_decide_what_gc_keeps(run: Path, tmp_path: Path) -> None:
    root = shutil.copytree(run, tmp_path / "run", symlinks=True)
    assert answer("pin", root, "1")["is_pinned"]
    assert answer("gc", root, "--keep-last", "1", "--dry-run")["steps"] == []
    assert not answer("unpin", root, "1")["is_pinned"]
    assert answer("gc", root, "--keep-last", "1", "--dry-run")["steps"] == [1]
    assert answer("pin", root, "77", code=2)["error"]["type"] == "ConfigError"


def test_report_writes_a_picture_a_page_and_a_trace(models: Path, tmp_path: Path) -> None:
    path = models / "llama" / "live"
    files = [tmp_path / name for name in ("out.png", "out.html", "out.json")]
    options = zip(("--plot", "--html", "--trace"), files, strict=True)
    found = answer("report", path, *(part for pair in options for part in pair))
    assert found["written"] == [str(file) for file in files]
    (rank,) = found["ranks"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    page = files[1].read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import", page)
    assert found["save_id"] in page
    events = json.loads(files[2].read_text())["traceEvents"]
    spent = {e["name"]: e["dur"] / 1e6 for e in events if e["ph"] == "X"}
    assert spent.keys() == rank["seconds"].keys()
    assert abs(sum(spent.values()) - sum(rank["seconds"].values())) < 1e-6
    assert "write hf" in dcp_hf("report", path, columns=120).out
    assert answer("report", models / "llama" / "stock", code=3)["error"]["hint"] is not None


def test_doctor_probes_a_place_and_leaves_nothing_behind(tmp_path: Path) -> None:
    found = answer("doctor", tmp_path / "a" / "b" / "step-1", "--mib", "1")
    assert found["probed"] == str(tmp_path)
    assert found["renames"] is True
    assert found["written_nbytes"] == 1 << 20
    assert found["advice"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    assert dcp_hf("doctor", tmp_path / "file").code == 3


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('gone', name='typer')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    monkeypatch.setenv("PYTHONPATH", path)
    found = dcp_hf("ls", ".")
    assert found.code == 2
    assert found.err == "dcp-hf needs typer: pip install 'dcp-hf-writer[cli]'\n"
