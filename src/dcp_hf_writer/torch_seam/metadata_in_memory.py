"""Let torch's writer make `.metadata` in memory instead of in a directory.

Mechanism: `FileSystemWriter.finish` pickles the metadata into a stream that `self.fs` creates, then
asks `self.fs` to rename the stream's file.

Looked at: torch 2.10 to 2.15, `torch.distributed.checkpoint.filesystem`. When torch changes: if
nothing is written through the stream, `metadata_bytes` raises `UnsupportedTorchError`.
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.filesystem import FileSystem

from dcp_hf_writer.torch_seam.unsupported_torch import unsupported_torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.storage import WriteResult


def metadata_bytes(
    writer: FileSystemWriter, metadata: Metadata, results: list[list[WriteResult]]
) -> bytes:
    """Return the content of `.metadata` as a writer would write it; touches no file.

    Args:
        writer: The writer; it is used for nothing else afterwards.
        metadata: The planner's metadata.
        results: Results of all ranks, by rank.

    Raises:
        UnsupportedTorchError: If the writer does not write through its `fs`.
    """
    held = _Held()
    # Otherwise torch calls `os.sync` for the whole machine: memory has no fsync of its own.
    writer.fs, writer.sync_files = held, False
    writer.finish(metadata, results)
    if len(held.written) != 1:
        raise unsupported_torch(
            "the metadata of a checkpoint on an object store",
            phase="finish",
            expected="FileSystemWriter.finish that writes one stream of its fs",
            hint="save to a local path",
        )
    return held.written[0]


class _Held(FileSystem):
    """A file system that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        del path, mode
        stream = io.BytesIO()
        yield stream
        self.written.append(stream.getvalue())

    def exists(self, path: Any) -> bool:
        del path
        return False

    def rename(self, path: Any, new_path: Any) -> None:
        """Keep nothing by name."""
