"""What the coordinator checks before and after the writing."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport, failpoints
from dcp_hf_writer.errors import (
    CommitError,
    CoverageError,
    ExportError,
    LayoutError,
    TargetExistsError,
    WriteError,
)
from dcp_hf_writer.plan.assign_hf_keys import RuntimeTensor
from dcp_hf_writer.plan.layout import Layout, plan_layout
from dcp_hf_writer.plan.rank_report import DCPFile, RankReport
from dcp_hf_writer.said_once import SaidOnce
from dcp_hf_writer.save import coordinator
from dcp_hf_writer.save.attempt import Attempt
from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.coordinator import (
    check_files,
    drop_export,
    export_files,
    prepare_export,
)
from dcp_hf_writer.save.export_assets import Assets
from dcp_hf_writer.save.owner_process import is_over_here, new_save_id
from dcp_hf_writer.save.posix_target import LocalOptions, PosixTarget
from dcp_hf_writer.save.replace_target import saved_id
from dcp_hf_writer.save.save_context import SaveContext
from dcp_hf_writer.save.save_log import step_of
from dcp_hf_writer.tensors.boxes import whole
from support.audit import faults
from support.small_states import dcp_difference, difference, leftovers, state_of
from support.unwilling import Unwilling

if TYPE_CHECKING:
    from collections.abc import Iterator

Written = tuple[StagingDirectory, Layout, list[RankReport]]


# Names


def layout_of(*names: str, **options: Any) -> Layout:
    tensors = [RuntimeTensor(name, name, (10,), torch.float32, (whole((10,)),)) for name in names]
    return plan_layout(tensors, HFExport(**options), tied=())


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_asset_that_would_take_the_name_of_a_weight_file_is_refused(name: str) -> None:
    with pytest.raises(LayoutError, match="leave it out of assets") as caught:
        export_files(layout_of("w"), Assets({name: b"", "config.json": b""}, None), HFExport())
    assert caught.value.path == name


def test_files_of_an_export_are_its_weights_and_assets() -> None:
    assets = Assets({"config.json": b"", "sub/model.safetensors": b""}, None)
    assert export_files(layout_of("w"), assets, HFExport(subdir="out")) == {
        *("out/config.json", "out/sub/model.safetensors", "out/model.safetensors")
    }
    assert export_files(None, assets, HFExport()) == frozenset()


@pytest.mark.parametrize(
    ("target", "step"),
    [
        ("/run/step-100", 100),
        ("/run/step_7", 7),
        ("/run/global_step000123", 123),
        ("/run-3/last", None),
        ("/run/step-5-final", None),
        ("/run/42", 42),
        ("/run/run2-step-30", 30),
        ("/run/2024-05-06-step_9", 9),
        ("/run/2024-05-06", None),
        ("/step-1/v1.2", None),
    ],
)
def test_step_is_read_off_the_end_of_the_name(target: str, step: int | None) -> None:
    assert step_of(target) == step


# The directory


@contextlib.contextmanager
def made(target: Path) -> Iterator[tuple[Attempt, Path]]:
    """Make the directory of a save, and end the save with the block."""
    attempt = Attempt(SaveContext(str(target), time.monotonic() + 60))
    place = PosixTarget(StagingDirectory(str(target), new_save_id()), LocalOptions())
    place.make(attempt, overwrite=False, new_files=())
    try:
        yield attempt, Path(place.path)
    finally:
        attempt.end()


def prepared(
    attempt: Attempt, layout: Layout, files: dict[str, bytes], said: SaidOnce | None = None
) -> list[str]:
    """Prepare the export of a save; return the names of the files written whole."""
    assert isinstance(attempt.directory, PosixTarget)
    assert attempt.files is not None
    whole_files = prepare_export(
        attempt.directory.directory,
        layout,
        Assets(files, None),
        attempt.files,
        subdir="hf",
        said=said or SaidOnce(),
    )
    return sorted(file.name for file in whole_files)


def test_directory_holds_headers_index_and_assets_before_ranks_write(tmp_path: Path) -> None:
    layout = layout_of("a", "b", max_shard_size=50)
    with made(tmp_path / "step-1") as (attempt, path):
        assert sorted(entry.name for entry in path.iterdir()) == [
            ".dcp-hf-live",
            ".dcp-hf-save.json",
            "dcp-hf",
        ]
        assert prepared(attempt, layout, {"config.json": b"{}", "sub/x.txt": b"x"}) == [
            "hf/config.json",
            "hf/model.safetensors.index.json",
            "hf/sub/x.txt",
        ]
        for file in layout.files:
            content = (path / "hf" / file.name).read_bytes()
            assert content == file.header + bytes(file.nbytes - len(file.header))
        assert (path / "hf" / "model.safetensors.index.json").read_bytes() == layout.index
        assert (path / "hf" / "sub" / "x.txt").read_bytes() == b"x"
    assert list(tmp_path.iterdir()) == []


def test_space_is_looked_for_before_files_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "free_bytes", lambda _: 100)
    with made(tmp_path / "step-1") as (attempt, path):
        with pytest.raises(WriteError, match="100 bytes free") as caught:
            prepared(attempt, layout_of("a", "b"), {})
        assert caught.value.errno == errno.ENOSPC
        assert not (path / "hf").exists()


def test_space_that_is_not_told_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "free_bytes", lambda _: None)
    with made(tmp_path / "step-1") as (attempt, _):
        assert prepared(attempt, layout_of("a"), {"config.json": b"{}"}) == ["hf/config.json"]


def test_target_that_exists_leaves_no_directory(tmp_path: Path) -> None:
    (tmp_path / "step-1").write_text("a file")
    with pytest.raises(TargetExistsError), made(tmp_path / "step-1"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_missing_config_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = SaidOnce()
    caplog.set_level(logging.WARNING)
    for files in ({"config.json": b"{}"}, {}, {}):
        with made(tmp_path / "step-1") as (attempt, _):
            prepared(attempt, layout_of("a"), files, said)
    assert caplog.text.count("the export has no config.json") == 1


@pytest.mark.parametrize("problem", ["no space", "two files of one name"])
def test_dcp_half_is_committed_when_the_export_cannot_be_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    assets = {}
    if problem == "no space":
        monkeypatch.setattr(coordinator, "free_bytes", lambda _: 100)
    else:
        assets = {"a": b"", "a/b": b""}
    writer = HFDualWriter(tmp_path / "step-1", export=HFExport(assets=assets))
    with pytest.raises(ExportError):
        dcp.async_save(state_of(1), storage_writer=writer).result()
    assert dcp_difference(tmp_path / "step-1", state_of(1)) is None
    assert faults(tmp_path / "step-1") == []
    assert not (tmp_path / "step-1" / "hf").exists()
    assert leftovers(tmp_path) == []


# What is there at the end


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Make the files that a layout and a report name, of the right sizes."""
    layout = layout_of("a", "b", max_shard_size=50)
    directory = StagingDirectory(str(tmp_path / "step-1"), new_save_id())
    root = Path(directory.path)
    (root / "hf").mkdir(parents=True)
    for file in layout.files:
        (root / "hf" / file.name).write_bytes(bytes(file.nbytes))
    (root / "__0_0.distcp").write_bytes(bytes(30))
    return (
        directory,
        layout,
        [RankReport(0, "one", dcp_files=[DCPFile("__0_0.distcp", 30, (), "")])],
    )


def test_files_of_the_planned_and_reported_sizes_pass(written: Written) -> None:
    directory, layout, reports = written
    check_files(directory, layout, reports, "hf")
    check_files(directory, None, reports, "hf")


@pytest.mark.parametrize("name", ["hf/model-00002-of-00002.safetensors", "__0_0.distcp"])
@pytest.mark.parametrize("change", ["longer", "shorter", "missing"])
def test_file_that_is_not_as_it_was_written_is_named(
    written: Written, name: str, change: str
) -> None:
    directory, layout, reports = written
    path = Path(directory.path) / name
    size = path.stat().st_size
    if change == "missing":
        path.unlink()
    else:
        os.truncate(path, size + (1 if change == "longer" else -1))
    with pytest.raises(CoverageError, match=r"missing or has the wrong size") as caught:
        check_files(directory, layout, reports, "hf")
    assert caught.value.path == str(path)
    assert caught.value.expected == f"{size} bytes"
    assert (caught.value.found == "ENOENT") == (change == "missing")


def test_failed_export_is_taken_out(written: Written) -> None:
    directory, _, reports = written
    drop_export(directory, "hf")
    drop_export(directory, "hf")
    assert [path.name for path in Path(directory.path).iterdir()] == ["__0_0.distcp"]
    check_files(directory, None, reports, "hf")


def test_export_that_cannot_be_taken_out_stops_the_commit(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "remove_tree", lambda _: None)
    with pytest.raises(CommitError, match="nothing was published"):
        drop_export(written[0], "hf")


@pytest.mark.parametrize(
    ("content", "save_id"),
    [(b'{"save_id": "a"}', "a"), (b"{}", None), (b"[]", None), (b"{", None), (None, None)],
)
def test_id_of_the_visible_save_is_read_from_its_manifest(
    tmp_path: Path, content: bytes | None, save_id: str | None
) -> None:
    if content is not None:
        (tmp_path / "dcp-hf.json").write_bytes(content)
    assert saved_id(str(tmp_path)) == save_id


# A file that is spoilt before the commit


@pytest.mark.parametrize("name", ["model.safetensors", "__0_0.distcp"])
def test_checkpoint_is_not_published_when_a_file_lost_its_end(tmp_path: Path, name: str) -> None:
    def cut(point: str) -> None:
        if point == "before manifest":
            path = next(tmp_path.rglob(name))
            os.truncate(path, path.stat().st_size - 1)

    writer = HFDualWriter(tmp_path / "step-1")
    failpoints.set_hook(cut)
    try:
        with pytest.raises(CoverageError, match="missing or has the wrong size"):
            dcp.async_save(state_of(1), storage_writer=writer).result()
    finally:
        failpoints.set_hook(None)
    assert list(tmp_path.iterdir()) == []
    dcp.async_save(state_of(1), storage_writer=writer).result()
    assert difference(tmp_path / "step-1", 1) is None


def test_failed_export_is_a_warning_when_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = HFDualWriter(
        tmp_path / "step-1", export=HFExport(assets=[Unwilling()]), on_export_error="warn"
    )
    dcp.async_save(state_of(1), storage_writer=writer).result()
    assert "has no export" in caplog.text
    assert "no vocabulary" in caplog.text
    assert dcp_difference(tmp_path / "step-1", state_of(1)) is None
    assert faults(tmp_path / "step-1") == []
    assert leftovers(tmp_path) == []


def test_save_is_over_when_its_future_is_done(tmp_path: Path) -> None:
    ids: list[str] = []

    def note(point: str) -> None:
        if point == "before rename":
            ids.extend(path.name.removeprefix(".incomplete-") for path in tmp_path.iterdir())

    failpoints.set_hook(note)
    try:
        dcp.async_save(state_of(1), storage_writer=HFDualWriter(tmp_path / "step-1")).result()
    finally:
        failpoints.set_hook(None)
    assert len(ids) == 1
    assert saved_id(str(tmp_path / "step-1")) == ids[0]
    assert is_over_here(ids[0])
