"""Checkpoints that earlier versions wrote are read, to the last bit."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualReader, load_hf, materialize, verify
from dcp_hf_writer.formats.weights_once_places import StoredOnce
from support import audit
from support.compare import tensor_difference
from support.golden_states import KINDS, PAIR, STEP, exported, whole
from support.stock_readers import load_hf as load_safetensors

TESTS = Path(__file__).parents[1]
FORMATS = ("pickled-once", "plain-once", "rank-digests")
GOLDEN = [(name, kind) for name in FORMATS for kind in KINDS]
each_golden = pytest.mark.parametrize(("name", "kind"), GOLDEN)


@pytest.fixture
def golden(name: str, kind: str, tmp_path: Path) -> Path:
    """Return a copy: nothing may change what is committed."""
    return shutil.copytree(TESTS / "golden" / name / kind, tmp_path / "step-100")


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in state.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def saved(kind: str) -> dict[str, Any]:
    """Return what was saved, by FQN; the moment of experts is two levels deeper."""
    state = whole(kind)
    if kind == "hand-sharded":
        state["optim"] = {"state": {"experts": state["optim"]}}
    return flat(state)


def blank(kind: str) -> dict[str, Any]:
    state = saved(kind)
    return {
        k: torch.full_like(v, -1) if isinstance(v, torch.Tensor) else -1 for k, v in state.items()
    }


def assert_saved(found: dict[str, Any], kind: str) -> None:
    expected = saved(kind)
    assert found.pop("step") == expected.pop("step") == STEP
    assert tensor_difference(found, expected) is None


def test_every_golden_checkpoint_is_here() -> None:
    found = [
        path.parent.relative_to(TESTS / "golden") for path in TESTS.glob("golden/*/*/.metadata")
    ]
    assert sorted(map(str, found)) == sorted(f"{name}/{kind}" for name, kind in GOLDEN)


@each_golden
def test_golden_checkpoint_is_whole(golden: Path) -> None:
    report = verify(golden)
    assert (report.ok, report.checked) == (True, "digests"), str(report)
    assert audit.faults(golden) == []


@each_golden
def test_damage_to_a_golden_checkpoint_is_found(golden: Path) -> None:
    path = golden / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xa5")
    assert not verify(golden).ok


@each_golden
def test_our_reader_loads_what_was_saved(golden: Path, kind: str) -> None:
    state = blank(kind)
    dcp.load(state, storage_reader=HFDualReader(golden, verify=True), no_dist=True)
    assert_saved(state, kind)


@each_golden
def test_export_holds_what_was_saved(golden: Path, kind: str) -> None:
    assert tensor_difference(load_safetensors(golden / "hf"), dict(exported(kind))) is None


@each_golden
def test_export_is_loaded_into_the_model(golden: Path, kind: str) -> None:
    if kind == "hand-sharded":
        wanted = dict(exported(kind))
        model = {key: torch.zeros_like(one) for key, one in wanted.items()}
        specs = None
    else:
        dtype = torch.bfloat16 if kind == "cast" else torch.float32
        wanted = {key: one.to(dtype) for key, one in whole(kind)["model"].items()}
        model, specs = {key: torch.zeros_like(one) for key, one in wanted.items()}, [PAIR]
    load_hf(model, golden / "hf", specs=specs)
    assert tensor_difference(model, wanted) is None


@each_golden
def test_materialized_golden_checkpoint_is_one_that_torch_reads(
    golden: Path, kind: str, tmp_path: Path
) -> None:
    materialize(golden, tmp_path / "plain")
    state = blank(kind)
    dcp.load(state, checkpoint_id=tmp_path / "plain", no_dist=True)
    assert_saved(state, kind)


@pytest.fixture(scope="module")
def by_torch_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Return what a process found that cannot import the package."""
    root = tmp_path_factory.mktemp("alone")
    paths = {}
    for name, kind in GOLDEN:
        paths[name, kind] = shutil.copytree(TESTS / "golden" / name / kind, root / name / kind)
    done = subprocess.run(
        [sys.executable, TESTS / "support" / "without_package.py", root / "found", *paths.values()],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(root / "found", weights_only=True)
    return {golden: found[str(path)] for golden, path in paths.items()}


@pytest.mark.parametrize(("name", "kind"), [one for one in GOLDEN if one[1] != "once"])
def test_torch_loads_everything_where_the_package_is_not_installed(
    by_torch_alone: dict[tuple[str, str], Any], name: str, kind: str
) -> None:
    found = by_torch_alone[name, kind]
    assert set(found["errors"].values()) == {None}
    assert_saved(found["weights"] | found["rest"], kind)
    assert_saved(flat(torch.load(found["file"], weights_only=True)), kind)


def test_torch_loads_what_is_not_stored_once_where_the_package_is_not_installed(
    by_torch_alone: dict[tuple[str, str], Any],
) -> None:
    found = by_torch_alone["plain-once", "once"]
    weights = {fqn: one for fqn, one in saved("once").items() if fqn.startswith("model.")}
    assert_saved(found["rest"] | weights, "once")
    assert found["weights"].keys() == weights.keys()
    assert all(bool((one == -1).all()) for one in found["weights"].values())
    assert len(found["errors"]) == 3
    for reader, text in found["errors"].items():
        assert re.search("HFDualReader.*dcp_hf_writer.materialize", text), reader


def test_weights_stored_once_by_an_earlier_version_need_our_reader(
    by_torch_alone: dict[tuple[str, str], Any],
) -> None:
    # The control of the tests above: that process cannot import the package.
    assert by_torch_alone["pickled-once", "once"] == {"not installed": "dcp_hf_writer"}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["once"])
def test_golden_checkpoint_stores_weights_once(golden: Path) -> None:
    storage = HFDualReader(golden).read_metadata().storage_data or {}
    once = {index.fqn for index, where in storage.items() if isinstance(where, StoredOnce)}
    assert once == {"model.pair", "model.norm"}
    assert set(audit.read_manifest(golden)["once"]) == once
