"""What works on the steps of a run whose exports lie in another place: everything, on its half."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import CheckpointManager, HFDualWriter, HFExport, load_hf, verify
from dcp_hf_writer.cli.inspect_command import inspect_checkpoint
from dcp_hf_writer.cli.report_command import report
from dcp_hf_writer.manager.keep_house import Housekeeper
from dcp_hf_writer.manager.open_run import open_run
from dcp_hf_writer.manager.retention import Retention
from dcp_hf_writer.manager.step_names import StepNames
from support.command import answer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps in `train`, with their exports in `serve`."""
    root = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.fill_(step)
        export = HFExport(path=root / "serve" / f"step-{step}")
        writer = HFDualWriter(root / "train" / f"step-{step}", export=export)
        dcp.save({"model": model.state_dict()}, storage_writer=writer, no_dist=True)
    return root


def test_ls_and_latest_show_the_place_of_the_other_half(root: Path) -> None:
    steps = answer("ls", root / "train")["steps"]
    assert [one["state"] for one in steps] == ["committed", "committed"]
    assert [one["other_half"] for one in steps] == [
        str(root / "serve" / f"step-{step}") for step in (1, 2)
    ]
    assert [one["hf_nbytes"] for one in steps] == [0, 0]
    latest = answer("latest", root / "train")
    assert latest["path"] == str(root / "train" / "step-2")
    assert latest["export"] == str(root / "serve" / "step-2")
    exports = answer("ls", root / "serve")["steps"]
    assert [one["kind"] for one in exports] == ["hf", "hf"]
    assert all(one["hf_nbytes"] > 0 for one in exports)


def test_inspect_and_report_take_either_half(root: Path) -> None:
    value = inspect_checkpoint(str(root / "train" / "step-1"), pattern=None).value
    assert value["save"]["other_half"] == str(root / "serve" / "step-1")
    assert value["hf"] is None
    export = inspect_checkpoint(str(root / "serve" / "step-1"), pattern=None).value
    assert export["dcp"] is None
    assert export["hf"] is not None
    assert export["save"]["step"] == 1
    for place in ("train", "serve"):
        found = report(str(root / place / "step-1"), plot=None, page=None, trace=None).value
        assert found["nbytes"] > 0


def test_load_hf_finds_the_export_by_the_dcp_half(root: Path) -> None:
    for path in (root / "train" / "step-2", root / "serve" / "step-2"):
        model = torch.nn.Linear(3, 2)
        load_hf(model, path, specs={})
        assert model.weight.unique().tolist() == [2.0]


def test_manager_restores_the_dcp_half(root: Path) -> None:
    with CheckpointManager(root / "train", save_rng=False) as manager:
        assert manager.steps() == [1, 2]
        model = torch.nn.Linear(3, 2)
        state = {"model": model.state_dict()}
        assert manager.restore(state, verify=True) == 2
        assert state["model"]["weight"].unique().tolist() == [2.0]


def test_retention_and_gc_act_on_the_place_that_they_are_pointed_at(root: Path) -> None:
    train = open_run(root / "train", StepNames())
    Housekeeper(train, Retention(keep_last=1, export_keep_last=1)).run()
    assert train.steps() == [2]
    assert verify(root / "train" / "step-2").ok
    # Nobody deletes an export for a DCP half that is gone: it may be served.
    serve = open_run(root / "serve", StepNames())
    serve.remove_dead_saves()
    Housekeeper(serve, Retention(keep_last=1)).run()
    assert sorted(path.name for path in (root / "serve").glob("step-*")) == ["step-1", "step-2"]
    assert verify(root / "serve" / "step-1").ok
