"""`drop_from_page_cache`: pages leave the page cache, and the content of the file stays."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.storage.page_cache import drop_from_page_cache
from support.cached_pages import cached_nbytes, require_page_cache

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = bytes(range(256)) * 1024


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A durable file whose pages are in the page cache."""
    require_page_cache(tmp_path)
    path = tmp_path / "weights"
    with path.open("wb") as out:
        out.write(CONTENT)
        out.flush()
        os.fsync(out.fileno())
    assert cached_nbytes(path) == len(CONTENT)
    return path


def test_pages_of_a_durable_file_leave(file: Path) -> None:
    drop_from_page_cache(str(file))
    assert cached_nbytes(file) == 0
    assert file.read_bytes() == CONTENT


def test_a_file_with_a_second_name_stays(file: Path, tmp_path: Path) -> None:
    os.link(file, tmp_path / "newer")
    drop_from_page_cache(str(file))
    assert cached_nbytes(file) == len(CONTENT)


def test_bytes_that_are_not_durable_are_not_lost(file: Path) -> None:
    with file.open("r+b") as out:
        out.write(b"new")
    drop_from_page_cache(str(file))
    assert file.read_bytes() == b"new" + CONTENT[3:]


def test_a_file_that_is_gone_is_no_error(tmp_path: Path) -> None:
    drop_from_page_cache(str(tmp_path / "gone"))


def test_what_is_no_file_is_no_error(tmp_path: Path) -> None:
    # A named pipe without a writer would keep an ordinary open waiting.
    os.mkfifo(tmp_path / "pipe")
    drop_from_page_cache(str(tmp_path / "pipe"))
    drop_from_page_cache(str(tmp_path))


def test_a_link_is_not_followed(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(OSError, match="symbolic"):
        drop_from_page_cache(str(link))
    assert cached_nbytes(file) == len(CONTENT)
