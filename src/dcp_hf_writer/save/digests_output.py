"""The digests file of a rank on a POSIX file system: reserved before the data, written after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.storage.posix_outputs import OutputFile

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from dcp_hf_writer.storage.output_fsync import OpenFiles


class DigestsOutput:
    """A file with room for all digests of a rank.

    The room is taken first: an export that fills the device must not cost the DCP half, and the
    digests of the DCP half are in this file. As a context manager, it closes what was not written.
    """

    def __init__(self, path: str, most_nbytes: int) -> None:
        """Make the file.

        Raises:
            StorageError: If there is no space.
        """
        self._file: OutputFile | None = OutputFile(path, create=True)
        try:
            # Zeros, and not only a size: they take the space on every file system.
            self._file.write(memoryview(bytes(most_nbytes)), 0)
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.discard()

    def write(self, data: bytes, files: OpenFiles) -> None:
        """Write the digests, and let `files` make them durable; once.

        Raises:
            StorageError: If the file cannot be written.
        """
        assert self._file is not None
        self._file.write(memoryview(data), 0)
        self._file.cut(len(data))
        file, self._file = self._file, None
        files.sync(file)
