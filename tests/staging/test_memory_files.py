"""Memory files, and files of other processes: what is there is read, and nothing is waited for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.staging.memory_files import memory_file, open_of_process

if TYPE_CHECKING:
    from pathlib import Path


def test_content_of_a_memory_file_is_found_by_process_and_descriptor() -> None:
    fd = memory_file("dcp-hf-test", b"content")
    with open(open_of_process(os.getpid(), fd, os.O_RDONLY), "rb") as file:
        assert file.read() == b"content"
    os.close(fd)
    with pytest.raises(FileNotFoundError):
        open_of_process(os.getpid(), fd, os.O_RDONLY)


@pytest.mark.timeout(20)
def test_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    os.close(open_of_process(os.getpid(), pipe, os.O_RDONLY))
    os.close(pipe)
