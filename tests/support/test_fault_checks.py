"""The checks that fault tests make: each must fail on what it is there to find."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from dcp_hf_writer.errors import ExportError, WriteError
from support.faults import (
    AT_ONCE_S,
    BadCall,
    Outcome,
    Resources,
    Strike,
    check_outcomes,
    check_storage,
    hits,
    save,
    writer_options,
)
from support.named_bytes import filled, manifest_fault, save_held_by, saves_named_by
from support.rank_process import Raised

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a tree with save 1 as `step-1` and save 2 as `step-2`."""
    tree = tmp_path / "run"
    tree.mkdir()
    check_outcomes([save(tree, "step-1", 1), save(tree, "step-2", 2)], None)
    check_storage(tree, {"step-1": 1, "step-2": 2})
    return tree


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_each_element_names_its_save(dtype: torch.dtype) -> None:
    for number in range(1, 8):
        assert saves_named_by(filled(number, "model.a", (5, 7), dtype)) == {number}
    mixed = torch.cat([filled(n, "model.a", (3,), dtype) for n in (1, 5)])
    assert saves_named_by(mixed) == {1, 5}


def swap_dcp_file(root: Path) -> None:
    shutil.copy(root / "step-1" / "__0_0.distcp", root / "step-2" / "__0_0.distcp")


def swap_export(root: Path) -> None:
    shutil.rmtree(root / "step-2" / "hf")
    shutil.copytree(root / "step-1" / "hf", root / "step-2" / "hf")


def mix_one_element(root: Path) -> None:
    path = min((root / "step-2" / "hf").glob("*.safetensors"))
    tensors = load_file(path)
    first = next(iter(tensors))
    tensors[first].view(-1)[-1] = filled(1, f"model.{first}", (1,), tensors[first].dtype)[0]
    save_file(tensors, path, metadata={"format": "pt"})


def flip_config(root: Path) -> None:
    (root / "step-2" / "hf" / "config.json").write_bytes(b"{}")


def lose_export(root: Path) -> None:
    shutil.rmtree(root / "step-2" / "hf")


def lose_manifest(root: Path) -> None:
    (root / "step-2" / "dcp-hf.json").unlink()


def truncate_dcp_file(root: Path) -> None:
    path = root / "step-2" / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)


def leave_temporary_file(root: Path) -> None:
    (root / "step-2" / ".metadata.tmp").write_bytes(b"")


def leave_staging_directory(root: Path) -> None:
    (root / ".incomplete-x").mkdir()


def publish_early(root: Path) -> None:
    (root / "step-3").mkdir()
    (root / "step-3" / ".metadata").write_bytes(b"")


def name_staging_like_a_step(root: Path) -> None:
    (root / ".incomplete-step-3" / "hf").mkdir(parents=True)
    (root / ".incomplete-step-3" / "hf" / "model.safetensors.index.json").write_bytes(b"")


def lose_checkpoint(root: Path) -> None:
    shutil.rmtree(root / "step-1")


@pytest.mark.parametrize(
    "damage",
    [
        swap_dcp_file,
        swap_export,
        mix_one_element,
        flip_config,
        lose_export,
        lose_manifest,
        truncate_dcp_file,
        leave_temporary_file,
        leave_staging_directory,
        publish_early,
        name_staging_like_a_step,
        lose_checkpoint,
    ],
)
def test_check_of_the_storage_fails_when_something_is_wrong(
    damage: Callable[[Path], None], root: Path
) -> None:
    damage(root)
    with pytest.raises((AssertionError, OSError, CheckpointException)):
        check_storage(root, {"step-1": 1, "step-2": 2})


def test_check_of_the_storage_fails_when_another_save_is_there(root: Path) -> None:
    with pytest.raises(AssertionError, match="holds save 2, expected 3"):
        check_storage(root, {"step-1": 1, "step-2": 3})


@pytest.mark.parametrize("half", ["__0_0.distcp", "hf", ".metadata"])
def test_every_byte_is_covered_by_a_digest_of_the_manifest(half: str, root: Path) -> None:
    target = root / "step-1" / half
    paths = sorted(target.glob("*")) if target.is_dir() else [target]
    for path in paths:
        whole = path.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little") if path.suffix == ".safetensors" else 0
        for position in range(header, len(whole), max(1, len(whole) // 40)):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            path.write_bytes(damaged)
            assert manifest_fault(root / "step-1") is not None, f"byte {position} of {path.name}"
        path.write_bytes(whole)
    assert manifest_fault(root / "step-1") is None


def outcome(error: BaseException | None, seconds: float = 0.1) -> Outcome:
    return Outcome(0, None if error is None else Raised(error, ""), seconds)


def test_check_of_outcomes_fails_when_a_rank_saw_something_else() -> None:
    error = WriteError("no", phase="write", path="/a")
    check_outcomes([outcome(error)], WriteError, ("/a",))
    check_outcomes([outcome(None)], None)
    with pytest.raises(WriteError):
        check_outcomes([outcome(error)], None)
    with pytest.raises(WriteError):
        check_outcomes([outcome(error)], ExportError)
    with pytest.raises(AssertionError, match="saw no error"):
        check_outcomes([outcome(error), outcome(None)], WriteError)
    with pytest.raises(AssertionError, match="not told of"):
        check_outcomes([outcome(error)], WriteError, ("/b",))
    with pytest.raises(AssertionError, match="learned it after"):
        check_outcomes([outcome(error, seconds=AT_ONCE_S + 1)], WriteError)
    with pytest.raises(AssertionError, match="not told the phase"):
        check_outcomes([outcome(WriteError("no"))], WriteError)
    with pytest.raises(AssertionError, match="no rank"):
        check_outcomes([], WriteError)


def test_leaks_are_seen(root: Path) -> None:
    resources = Resources(root)
    assert resources.leaked() == []
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left-behind")
    thread.start()
    with (root / "step-1" / ".metadata").open("rb"):
        leaked = sorted(resources.leaked(settle_s=0.0))
    stop.set()
    thread.join()
    assert leaked == [f"file {root}/step-1/.metadata", "thread left-behind"]
    slots = writer_options(root)["slots"]
    with slots.hold(str(root), "dcp", deadline=0.0):
        assert any("slot" in leak for leak in resources.leaked(settle_s=0.0))
    assert resources.leaked() == []


def test_faults_strike_once_and_only_below_the_tree(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    bad = BadCall(rank=0, name="pwritev", errno=errno.EIO)
    with bad.installed(0, root):
        check_outcomes([save(other, "step-1", 1)], None)
        assert hits(root) == []
        check_outcomes([save(root, "step-3", 3)], WriteError, ("EIO",))
        check_outcomes([save(root, "step-3", 3)], None)
    assert len(hits(root)) == 1
    with bad.installed(1, root), Strike(rank=1, point="staged", action="raise").installed(0, root):
        check_outcomes([save(root, "step-4", 4)], None)
    assert len(hits(root)) == 1


def test_checkpoint_without_export_is_told_from_one_with(root: Path) -> None:
    check_outcomes([save(root, "step-3", 3, export=None)], None)
    assert save_held_by(root / "step-3", has_export=False) == 3
    with pytest.raises(FileNotFoundError):
        save_held_by(root / "step-3")
