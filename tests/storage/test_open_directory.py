"""open_directory: which backend reads what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.storage.fsspec_inputs import FsspecFiles
from dcp_hf_writer.storage.local_inputs import LocalFiles
from dcp_hf_writer.storage.open_directory import open_directory


@pytest.mark.parametrize("path", ["/x/y", Path("/x/y"), "/x/z/../y", "file:///x/y", "local:///x/y"])
def test_path_is_read_by_local_files(path: Any) -> None:
    files = open_directory(path)
    assert (type(files), files.path) == (LocalFiles, "/x/y")


def test_relative_path_is_read_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = open_directory("step-1")
    assert (type(files), files.path) == (LocalFiles, str(tmp_path / "step-1"))


@pytest.mark.parametrize("url", ["memory://x/y", "simplecache::file:///x/y"])
def test_url_is_read_by_fsspec(url: str, tmp_path: Path) -> None:
    options = {"simplecache": {"cache_storage": str(tmp_path)}} if "::" in url else None
    files = open_directory(url, options)
    assert (type(files), files.path) == (FsspecFiles, url)


@pytest.mark.parametrize("path", ["", "a\0b", b"/x", "file://"], ids=ascii)
def test_path_is_refused_when_it_cannot_be_one(path: Any) -> None:
    with pytest.raises(ConfigError, match=r"^path (must be a path|is not the URL of a local path)"):
        open_directory(path)


@pytest.mark.parametrize("path", ["/x/y", "file:///x/y"])
def test_options_are_refused_when_there_is_no_url_to_use_them(path: str) -> None:
    with pytest.raises(ConfigError, match="storage_options are for URLs") as caught:
        open_directory(path, {"key": "value"})
    assert caught.value.found == ["key"]
