"""Restoring what others left under the names of steps, and parts of what is there."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import CheckpointManager, HFDualWriter, HFExport
from dcp_hf_writer.errors import MismatchError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def state(value: float) -> dict[str, Any]:
    return {
        "model": {"layers.0.w": torch.full((4, 3), value), "norm": torch.full((3,), value + 1)},
        "optim": {"state": {"layers.0.w": {"exp_avg": torch.full((4, 3), value + 2)}}},
    }


def sums(found: dict[str, Any]) -> list[float]:
    model, optim = found["model"], found["optim"]
    moment = optim["state"]["layers.0.w"]["exp_avg"]
    return [float(t.flatten()[0]) for t in (model["layers.0.w"], model["norm"], moment)]


def save_with_torch(path: Path, content: dict[str, Any]) -> None:
    dcp.save(content, checkpoint_id=path, no_dist=True)


def whole(root: Path) -> None:
    save_with_torch(root / "step-7", state(5.0))


def apart(root: Path) -> None:
    """As trainers that save the model and the optimizer by two calls, without their names."""
    save_with_torch(root / "step-7" / "model", state(5.0)["model"])
    save_with_torch(root / "step-7" / "optimizer", state(5.0)["optim"])


def apart_with_names(root: Path) -> None:
    save_with_torch(root / "step-7" / "model", {"model": state(5.0)["model"]})
    save_with_torch(root / "step-7" / "optimizer", {"optim": state(5.0)["optim"]})


def together_below(root: Path) -> None:
    """As trainers that keep all tensors in `weights/` and their progress in a file beside it."""
    save_with_torch(root / "step-7" / "weights", state(5.0))
    (root / "step-7" / "train_state.json").write_text(json.dumps({"cur_step": 7}))


@pytest.mark.parametrize("write", [whole, apart, apart_with_names, together_below])
def test_layouts_of_others_are_restored(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    with CheckpointManager(tmp_path) as manager:
        found = state(0.0)
        assert manager.restore(found) == 7
        assert sums(found) == [5.0, 6.0, 7.0]
        assert manager.restored is not None
        expected = {"cur_step": 7} if write is together_below else {}
        assert manager.restored.trainer_state == expected
        assert (manager.latest(), manager.steps()) == (7, [7])


def test_new_run_goes_on_from_an_old_layout_and_leaves_it_alone(tmp_path: Path) -> None:
    apart(tmp_path)
    with CheckpointManager(tmp_path, save_every=1, keep_last=1) as manager:
        found = state(0.0)
        assert manager.restore(found) == 7
        manager.step(8, found)
        manager.step(9, found)
        manager.wait()
        assert manager.steps() == [7, 9]


@pytest.mark.parametrize("missing", [".metadata", "__0_0.distcp"])
def test_half_of_an_old_layout_does_not_count(tmp_path: Path, missing: str) -> None:
    apart(tmp_path)
    (tmp_path / "step-7" / "model" / missing).unlink()
    with CheckpointManager(tmp_path) as manager:
        if missing == ".metadata":
            with pytest.raises(MismatchError, match=r"model"):
                manager.restore(state(0.0))
        else:
            assert manager.latest() is None


def test_export_alone_gives_the_weights_when_asked(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "other" / "step-1", export=HFExport())
    dcp.save(state(5.0), storage_writer=writer, no_dist=True)
    root = tmp_path / "run"
    shutil.copytree(tmp_path / "other" / "step-1" / "hf", root / "step-3" / "hf")
    with CheckpointManager(root) as manager:
        found = state(0.0)
        with pytest.raises(MismatchError, match="load_optimizer=False"):
            manager.restore(found)
        assert manager.restore(found, load_optimizer=False) == 3
        assert sums(found) == [5.0, 6.0, 2.0]


def saved_run(root: Path) -> None:
    with CheckpointManager(root, save_every=1, trainer_state={"tokens": 3}) as manager:
        manager.step(1, {**state(5.0), "note": "first"})


def test_optimizer_stays_as_it_is_when_it_is_left_out(tmp_path: Path) -> None:
    saved_run(tmp_path)
    with CheckpointManager(tmp_path) as manager:
        found = state(0.0)
        assert manager.restore(found, load_optimizer=False) == 1
        assert sums(found) == [5.0, 6.0, 2.0]
        assert manager.restored is not None
        assert manager.restored.trainer_state == {"tokens": 3}


def test_missing_entries_are_an_error_unless_strict_is_off(tmp_path: Path) -> None:
    saved_run(tmp_path)
    with CheckpointManager(tmp_path) as manager:
        found = state(0.0)
        found["model"]["more"] = torch.full((2,), 9.0)
        with pytest.raises(MismatchError, match=r"more"):
            manager.restore(found)
        assert manager.restore(found, strict=False) == 1
        assert sums(found) == [5.0, 6.0, 7.0]
        assert found["model"]["more"].tolist() == [9.0, 9.0]


def test_value_that_is_no_tensor_is_replaced_in_the_dict(tmp_path: Path) -> None:
    saved_run(tmp_path)
    with CheckpointManager(tmp_path) as manager:
        found = {**state(0.0), "note": ""}
        manager.restore(found)
        assert found["note"] == "first"


def test_step_can_be_named(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=1) as manager:
        for step in (1, 2, 3):
            manager.step(step, state(float(step)))
        found = state(0.0)
        assert manager.restore(found, step=2) == 2
        assert sums(found)[0] == 2.0
        assert manager.restore(found, step=9) is None


def test_digests_are_compared_when_asked(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, save_every=1) as manager:
        manager.step(1, state(1.0))
        manager.step(2, state(2.0))
        manager.wait()
        path = tmp_path / "step-2" / "__0_0.distcp"
        data = bytearray(path.read_bytes())
        at = data.index(torch.full((4, 3), 2.0).numpy().tobytes())
        data[at] ^= 1
        path.write_bytes(data)
        found = state(0.0)
        assert manager.restore(found) == 2
        assert manager.restore(found, verify=True) == 1
        assert manager.restored is not None
        assert "digest" in manager.restored.skipped[0]
