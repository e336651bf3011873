"""`reuse=`: what an earlier checkpoint holds is linked instead of written; the same bytes result.

Here the files are on a file system that cannot clone; `test_reuse_clones.py` has the others.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport, verify
from dcp_hf_writer.errors import ConfigError, WriteError
from dcp_hf_writer.storage.posix_outputs import OutputFile
from support.faults import Strike
from support.processes import FreshProcess
from support.ranks import run_ranks
from support.reused_steps import (
    EXPORT,
    WEIGHT_NBYTES,
    check_as_written,
    files_in,
    is_linked,
    reused_nbytes,
    run_state,
    save_step,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    path = tmp_path / "step-1"
    save_step(path, 1)
    return path


@pytest.mark.parametrize("weights", ["both", "once"])
def test_files_whose_bytes_are_all_equal_are_linked(tmp_path: Path, weights: str) -> None:
    earlier, step = tmp_path / "step-1", tmp_path / "step-2"
    save_step(earlier, 1, weights=weights)
    save_step(step, 2, weights=weights, reuse=earlier)
    assert is_linked(step, earlier) == [True, True, False]
    assert reused_nbytes(step) == 4 * WEIGHT_NBYTES
    check_as_written(step, 2, weights=weights)


def test_casts_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    import torch

    export = HFExport(dtype=torch.bfloat16, max_shard_size="1.2MB", assets=EXPORT.assets)
    save_step(tmp_path / "step-1", 1, export=export)
    save_step(tmp_path / "step-2", 2, export=export, reuse=tmp_path / "step-1")
    assert is_linked(tmp_path / "step-2", tmp_path / "step-1") == [True, True, False]
    check_as_written(tmp_path / "step-2", 2, export=export)


@pytest.mark.parametrize("gone", ["step-1", "step-2"])
def test_either_step_stays_whole_when_the_other_is_deleted(earlier: Path, gone: str) -> None:
    step = earlier.with_name("step-2")
    save_step(step, 2, reuse=earlier)
    shutil.rmtree(earlier.with_name(gone))
    (kept,) = {"step-1", "step-2"} - {gone}
    assert verify(earlier.with_name(kept)).ok
    check_as_written(earlier.with_name(kept), int(kept[-1]))


def save_sharded(rank: int, world_size: int, root: Path) -> None:
    save_step(root / "step-1", 1)
    save_step(root / "step-2", 2, reuse=root / "step-1")
    save_step(root / "step-3", 2, reuse=root / "step-2")
    # Frozen on one rank only: the other rank's shard of the second file has changed.
    state = dcp_state_with_change_on(1)
    writer = HFDualWriter(root / "step-4", export=EXPORT, reuse=root / "step-3")
    dcp.async_save(state, storage_writer=writer).result()
    check_plain = HFDualWriter(root / "plain-4", export=EXPORT)
    dcp.async_save(state, storage_writer=check_plain).result()
    dist.barrier()


def dcp_state_with_change_on(rank: int) -> dict[str, Any]:
    from support.reused_steps import sharded_run_state

    state = sharded_run_state(2)
    if dist.get_rank() == rank:
        state["model"]["layers.2.w"].to_local()[-1, -1] += 1
    return state


def test_a_file_is_linked_if_it_is_equal_on_every_rank(tmp_path: Path) -> None:
    run_ranks(save_sharded, 2, tmp_path)
    assert is_linked(tmp_path / "step-2", tmp_path / "step-1") == [True, True, False]
    assert is_linked(tmp_path / "step-3", tmp_path / "step-1") == [True, True, False]
    assert is_linked(tmp_path / "step-3", tmp_path / "step-2") == [True, True, True]
    assert is_linked(tmp_path / "step-4", tmp_path / "step-3") == [True, False, True]
    assert reused_nbytes(tmp_path / "step-3") == 6 * WEIGHT_NBYTES
    for name in files_in(tmp_path / "plain-4" / "hf"):
        found, plain = (tmp_path / one / "hf" / name for one in ("step-4", "plain-4"))
        assert found.read_bytes() == plain.read_bytes(), name
    assert all(verify(tmp_path / f"step-{n}").ok for n in (1, 2, 3, 4))


def change_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damage_weights(earlier: Path) -> None:
    change_byte(earlier / "hf" / "model-00001-of-00003.safetensors", -1)


def damage_header(earlier: Path) -> None:
    change_byte(earlier / "hf" / "model-00001-of-00003.safetensors", 20)


def cut(earlier: Path) -> None:
    os.truncate(earlier / "hf" / "model-00001-of-00003.safetensors", 5000)


def replace_by_symlink(earlier: Path) -> None:
    file = earlier / "hf" / "model-00001-of-00003.safetensors"
    file.rename(earlier.with_name("elsewhere"))
    file.symlink_to(earlier.with_name("elsewhere"))


def write_other_version(earlier: Path) -> None:
    manifest = json.loads((earlier / "dcp-hf.json").read_text())
    (earlier / "dcp-hf.json").write_text(json.dumps({**manifest, "version": 99}))


def drop_manifest(earlier: Path) -> None:
    (earlier / "dcp-hf.json").unlink()


@pytest.mark.parametrize(
    ("damage", "linked"),
    [
        (damage_weights, [False, True, False]),
        (damage_header, [False, True, False]),
        (cut, [False, True, False]),
        (replace_by_symlink, [False, True, False]),
        # What counts is the bytes of the files; the manifest only says that they do not change.
        (write_other_version, [True, True, False]),
        (drop_manifest, [False, False, False]),
    ],
)
def test_no_damage_of_the_earlier_checkpoint_gets_into_the_new_one(
    earlier: Path, damage: Callable[[Path], None], linked: list[bool]
) -> None:
    damage(earlier)
    step = earlier.with_name("step-2")
    save_step(step, 2, reuse=earlier)
    assert is_linked(step, earlier) == linked
    check_as_written(step, 2)


@pytest.mark.parametrize("point", ["directory made", "before link"])
def test_the_earlier_checkpoint_may_be_deleted_at_any_time(earlier: Path, point: str) -> None:
    step = earlier.with_name("step-2")
    strike = Strike(rank=0, point=point, action="call", call=lambda _: shutil.rmtree(earlier))
    with strike.installed(0, earlier.parent):
        save_step(step, 2, reuse=earlier)
    assert not earlier.exists()
    assert reused_nbytes(step) == (4 * WEIGHT_NBYTES if point == "before link" else None)
    check_as_written(step, 2)


def test_the_checkpoint_that_is_replaced_may_be_reused(earlier: Path) -> None:
    before = [file.stat().st_ino for file in sorted(earlier.glob("hf/*.safetensors"))]
    save_step(earlier, 2, reuse=earlier, overwrite=True)
    after = [file.stat().st_ino for file in sorted(earlier.glob("hf/*.safetensors"))]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, True, False]
    assert reused_nbytes(earlier) == 4 * WEIGHT_NBYTES
    assert {file.stat().st_nlink for file in earlier.glob("hf/*")} == {1}
    check_as_written(earlier, 2)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and "reused" in record.getMessage()
    ]


def test_a_checkpoint_of_another_file_system_is_written_anew_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Path("/dev/shm") / f"reuse-{os.getpid()}"
    assert Path("/dev/shm").stat().st_dev != tmp_path.stat().st_dev
    try:
        save_step(other, 1)
        save_step(tmp_path / "step-2", 2, reuse=other)
    finally:
        shutil.rmtree(other, ignore_errors=True)
    (line,) = warnings_of(caplog)
    assert str(other) in line
    assert "EXDEV" in line
    check_as_written(tmp_path / "step-2", 2)


def test_a_checkpoint_that_is_not_there_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_step(tmp_path / "step-2", 2, reuse=tmp_path / "step-1")
    (line,) = warnings_of(caplog)
    assert str(tmp_path / "step-1") in line
    assert "ENOENT" in line
    check_as_written(tmp_path / "step-2", 2)


@pytest.mark.parametrize(
    ("number", "refused"),
    [
        (errno.EXDEV, "dcp-hf.json"),
        (errno.EPERM, "dcp-hf.json"),
        (errno.EMLINK, "model-00001-of-00003.safetensors"),
        (errno.ENOSPC, "model-00001-of-00003.safetensors"),
    ],
)
def test_a_file_is_written_if_its_link_is_refused(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, number: int, refused: str
) -> None:
    link, calls = os.link, []

    def refusing(source: str, target: str, **options: Any) -> None:
        if os.path.basename(source) == refused:
            calls.append(source)
            raise OSError(number, os.strerror(number), source)
        link(source, target, **options)

    monkeypatch.setattr(os, "link", refusing)
    step = earlier.with_name("step-2")
    save_step(step, 2, reuse=earlier)
    assert len(calls) == 1
    is_first = refused == "dcp-hf.json"
    assert is_linked(step, earlier) == [False, not is_first, False]
    check_as_written(step, 2)


def test_a_read_error_of_the_earlier_file_is_one_warning(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    step = earlier.with_name("step-2")
    strike = Strike(
        rank=0,
        point="before comparison",
        action="call",
        call=lambda _: monkeypatch.setattr(os, "preadv", failing),
    )
    with strike.installed(0, earlier.parent):
        save_step(step, 2, reuse=earlier)
    monkeypatch.undo()
    assert is_linked(step, earlier) == [False, False, False]
    (line,) = warnings_of(caplog)
    assert "EIO" in line
    check_as_written(step, 2)


def test_a_checkpoint_with_another_layout_is_written_anew(earlier: Path) -> None:
    step, export = earlier.with_name("step-2"), HFExport(max_shard_size="4MB")
    save_step(step, 2, export=export, reuse=earlier)
    assert reused_nbytes(step) == 0
    check_as_written(step, 2, export=export)


def test_nothing_is_reused_unless_asked_for(earlier: Path) -> None:
    step = earlier.with_name("step-2")
    save_step(step, 1)
    assert is_linked(step, earlier) == [False, False, False]
    assert reused_nbytes(step) is None


def test_halves_that_lie_apart_are_not_reused(tmp_path: Path) -> None:
    export = HFExport(path=str(tmp_path / "hf-2"))
    with pytest.raises(ConfigError, match="reuse cannot be used with HFExport"):
        HFDualWriter(tmp_path / "step-2", export=export, reuse=tmp_path / "step-1")


@pytest.mark.parametrize(
    ("target", "reuse", "words"),
    [
        ("step-2", "auto", "CheckpointManager"),
        ("step-2", "s3://bucket/step-1", "object stores"),
        ("step-2", "", "reuse must be a path"),
        ("step-2", 7, "reuse must be a path"),
        ("memory://bucket/step-2", "step-1", "reuse is for local paths"),
    ],
)
def test_what_cannot_be_reused_is_refused_at_once(target: str, reuse: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HFDualWriter(target, reuse=reuse)


def test_an_output_file_with_a_second_name_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"earlier")
    os.link(tmp_path / "file", tmp_path / "link")
    with pytest.raises(WriteError, match="several names"):
        OutputFile(str(tmp_path / "link"), create=False)
    assert (tmp_path / "file").read_bytes() == b"earlier"


def save_one(root: Path, step: int) -> None:
    save_step(root / f"step-{step}", step, reuse=root / "step-1")


def test_two_jobs_reuse_one_checkpoint_at_the_same_time(earlier: Path) -> None:
    root = earlier.parent
    with FreshProcess(save_one, root, 2) as one, FreshProcess(save_one, root, 3) as other:
        one.result()
        other.result()
    for step in (2, 3):
        assert is_linked(root / f"step-{step}", earlier) == [True, True, False]
        check_as_written(root / f"step-{step}", step)
    assert verify(earlier).ok


def fail_in_the_round(rank: int, world_size: int, root: Path) -> str:
    save_step(root / "step-1", 1)
    with Strike(rank=0, point="before link", action="raise", hit=2).installed(rank, root):
        try:
            save_step(root / "step-2", 2, reuse=root / "step-1")
        except BaseException as error:  # noqa: BLE001 - torch's own kind is a BaseException
            return f"{type(error).__name__}: {error}"
    return "saved"


def test_a_failure_between_links_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    found = run_ranks(fail_in_the_round, 2, tmp_path)
    assert all("injected at before link" in one or "another rank" in one for one in found), found
    assert not (tmp_path / "step-2").exists()
    assert verify(tmp_path / "step-1").ok


def test_the_state_of_these_tests_changes_as_it_says() -> None:
    one, two = run_state(1)["model"], run_state(2)["model"]
    assert [name for name in one if not one[name].equal(two[name])] == ["layers.5.w"]
