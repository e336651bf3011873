"""check_output_place: where a checkpoint cannot be made, before anything is written."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.errors import StorageError, TargetExistsError, WriteError
from dcp_hf_writer.storage.output_place import check_output_place
from support.mounts import mount_tmpfs, needs_mounts, remount
from support.processes import in_fresh_process

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["step-1", "run/step-1", "a/b/c/step-1", "there"])
def test_place_is_fine_when_its_parents_are_directories_or_missing(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    check_output_place(str(tmp_path / name))
    assert os.listdir(tmp_path) == ["there"]


def test_place_is_refused_when_it_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "step-1").write_text("of the user")
    with pytest.raises(TargetExistsError) as caught:
        check_output_place(str(tmp_path / "step-1"))
    assert caught.value.path == str(tmp_path / "step-1")
    assert "a file is not replaced" in str(caught.value)


@pytest.mark.parametrize("kind", ["a file", "a symbolic link"])
@pytest.mark.parametrize("below", ["step-1", "run/step-1"])
def test_place_is_refused_when_a_parent_is(kind: str, below: str, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    if kind == "a file":
        parent.write_text("of the user")
    else:
        parent.symlink_to(tmp_path / "absent")
    with pytest.raises(WriteError) as caught:
        check_output_place(str(parent / below))
    assert (caught.value.path, caught.value.errno) == (str(parent), errno.ENOTDIR)
    assert kind in str(caught.value)
    assert str(parent / below) in str(caught.value)


def refused_read_only(root: Path) -> tuple[int | None, str]:
    mount_tmpfs(root)
    remount(root, "ro")
    try:
        check_output_place(str(root / "run" / "step-1"))
    except StorageError as error:
        return error.errno, str(error)
    return None, ""


@needs_mounts
def test_place_is_refused_when_the_file_system_is_read_only(tmp_path: Path) -> None:
    number, text = in_fresh_process(refused_read_only, tmp_path)
    assert number == errno.EROFS
    assert str(tmp_path) in text
    assert "read-only" in text
