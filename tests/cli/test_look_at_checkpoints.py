"""`ls`, `latest`, `verify`, `inspect`, `diff`, `schema`: real commands on real checkpoints."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.cli.json_schemas import SCHEMAS
from support.checkpoints import flip
from support.command import answer, dcp_hf

if TYPE_CHECKING:
    from pathlib import Path

# Each test starts several processes, and each of them imports torch.
pytestmark = pytest.mark.timeout(600)


def test_ls_tells_state_sizes_and_pins_of_each_step(run: Path) -> None:
    found = answer("ls", run)
    steps = {one["step"]: one for one in found["steps"]}
    assert [one["state"] for one in steps.values()] == [
        *("committed", "committed", "committed", "unverified", "incomplete"),
    ]
    assert found["latest"] == 4
    assert [n for n, one in steps.items() if one["is_pinned"]] == [2]
    assert [n for n, one in steps.items() if one["hf_nbytes"]] == [2]
    assert steps[2]["metrics"] == {"loss": 0.5}
    assert steps[5]["dcp_nbytes"] == 1000
    total = sum(p.stat().st_size for p in (run / "step-2").rglob("*") if p.is_file())
    assert steps[2]["dcp_nbytes"] + steps[2]["hf_nbytes"] == total
    assert "no save was committed here" in steps[5]["problem"]


def test_ls_fits_into_80_columns(run: Path) -> None:
    found = dcp_hf("ls", run)
    lines = found.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["step", "state", "DCP", "HF", "ranks", "age", "notes"]
    assert lines[2].split()[:2] == ["2", "committed"]
    assert "pinned" in lines[2]


def test_latest_prints_the_path_alone_and_exits_1_without_a_checkpoint(
    run: Path, tmp_path: Path
) -> None:
    found = dcp_hf("latest", run)
    assert (found.code, found.out) == (0, f"{run}/step-4\n")
    none = answer("latest", tmp_path, code=1)
    assert (none["step"], none["path"]) == (None, None)


def test_error_is_one_message_without_a_traceback_unless_asked(tmp_path: Path) -> None:
    found = dcp_hf("ls", tmp_path / "nowhere")
    assert (found.code, found.out) == (2, "")
    assert "there is no directory of a run here" in found.err
    assert "Traceback" not in found.err
    assert "Traceback" in dcp_hf("ls", tmp_path / "nowhere", "--debug").err
    error = answer("ls", tmp_path / "nowhere", code=2)["error"]
    assert (error["type"], error["path"]) == ("ConfigError", f"{tmp_path}/nowhere")


def test_verify_checks_a_checkpoint_and_all_steps_of_a_run(run: Path, tmp_path: Path) -> None:
    assert answer("verify", run / "step-2")["ok"]
    damaged = shutil.copytree(run, tmp_path / "run")
    flip(damaged / "step-2" / "hf" / "model.safetensors", -1)
    found = answer("verify", damaged, code=1)
    assert [one["ok"] for one in found["checkpoints"]] == [True, False, True, True, False]
    problem = found["checkpoints"][1]["problems"][0]
    assert problem["file"] == "hf/model.safetensors"
    shown = dcp_hf("verify", damaged / "step-2")
    assert shown.code == 1
    assert "1 problem" in shown.out


def test_inspect_tells_what_both_halves_hold(models: Path) -> None:
    found = answer("inspect", models / "llama" / "live")
    entries = found["dcp"]["entries"]
    assert entries["model"]["dtypes"] == {"float32": 21}
    assert entries["optim"]["tensors"] == 1
    assert entries["step"]["values"] == 1
    assert found["hf"]["dtypes"] == {"BF16": 20}
    assert found["hf"]["architectures"] == ["LlamaForCausalLM"]
    assert found["ranks"][0]["hf_nbytes"] == found["hf"]["nbytes"]
    assert found["save"]["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}


def test_inspect_shows_where_the_tensors_of_a_pattern_are(models: Path) -> None:
    path = models / "llama" / "live"
    found = answer("inspect", path, "--key", r"0\.self_attn\.q_proj")["tensors"]
    assert [(one["half"], one["dtype"]) for one in found] == [("dcp", "float32"), ("hf", "BF16")]
    assert [one["shape"] for one in found] == [[32, 32], [32, 32]]
    (place,) = found[1]["places"]
    assert (path / "hf" / place["file"]).stat().st_size >= place["start"] + place["nbytes"]
    assert answer("inspect", path, "--key", "no such", code=1)["tensors"] == []
    assert dcp_hf("inspect", path, "--key", "(").code == 2


def test_inspect_says_that_the_dcp_half_cannot_be_loaded(models: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(models / "llama" / "live", damaged)
    (damaged / ".metadata").unlink()
    found = dcp_hf("inspect", damaged)
    assert found.code == 1
    assert "DCP half: .metadata is missing" in found.out


def test_inspect_and_report_say_what_is_at_a_wrong_path(run: Path) -> None:
    for command in ("inspect", "report"):
        nothing = dcp_hf(command, run / "step-100")
        assert nothing.code == 3
        assert "there is no checkpoint at this path" in nothing.err
        assert "step-4" in nothing.err
        whole_run = dcp_hf(command, run)
        assert whole_run.code == 3
        assert "pass one of the checkpoints in it" in whole_run.err


@pytest.mark.parametrize("columns", [80, 40])
def test_report_cuts_no_number(models: Path, columns: int) -> None:
    path = models / "llama" / "live"
    told = answer("report", path)
    found = dcp_hf("report", path, columns=columns)
    words = found.out.split()
    for rank in told["ranks"]:
        for phase, seconds in rank["seconds"].items():
            assert seconds <= 0 or f"{seconds:.3f}" in words, phase
    if columns == 80:
        assert max(map(len, found.out.splitlines()[1:])) <= 80


def test_diff_names_every_kind_of_difference(tmp_path: Path) -> None:
    a = {"same": torch.arange(4.0), "only_a": torch.ones(1), "shape": torch.ones(2, 3)}
    b = {"same": torch.arange(4.0), "only_b": torch.ones(1), "shape": torch.ones(3, 2)}
    a |= {"dtype": torch.ones(3), "value": torch.tensor([1.0, -4.0]), "nan": torch.zeros(2)}
    b |= {"dtype": torch.ones(3).bfloat16(), "value": torch.tensor([1.0, -3.0])}
    b["nan"] = torch.tensor([0.0, torch.nan])
    a["big"], b["big"] = torch.tensor([2**53]), torch.tensor([2**53 + 1])
    for name, state in (("a", a), ("b", b)):
        dcp.save({"model": state}, storage_writer=HFDualWriter(tmp_path / name, export=None))
    found = answer("diff", tmp_path / "a", tmp_path / "b", code=1)
    assert found["equal"] == 1
    kinds = {one["name"].removeprefix("model."): one for one in found["differences"]}
    assert {name: one["what"] for name, one in kinds.items()} == {
        "only_a": "only in a",
        "only_b": "only in b",
        "shape": "shape",
        "dtype": "dtype",
        "value": "values",
        "nan": "values",
        "big": "values",
    }
    value = kinds["value"]
    assert (value["differing"], value["max_abs"], value["max_rel"]) == (1, 1.0, 0.25)
    assert (kinds["nan"]["is_finite"], kinds["big"]["differing"]) == (False, 1)
    shown = dcp_hf("diff", tmp_path / "a", tmp_path / "b")
    assert "1 of 2 elements differ; max abs 1, max rel 0.25" in shown.out


def test_diff_compares_a_dcp_half_with_a_huggingface_directory(models: Path) -> None:
    llama = models / "llama"
    found = answer("diff", llama / "live" / "hf", llama / "stock", code=1)
    assert found["halves"] == ["hf", "dcp"]
    only = [one["name"] for one in found["differences"] if one["what"] == "only in b"]
    assert only == ["lm_head.weight"]
    assert answer("diff", llama / "live", llama / "stock")["equal"] == 22


def test_schema_prints_the_schema_of_each_command() -> None:
    found = dcp_hf("schema", "ls")
    assert found.code == 0
    assert json.loads(found.out) == SCHEMAS["ls"]
    assert dcp_hf("schema", "nothing").code == 2
