"""The files of an earlier checkpoint that a save may use again, under names of the save's own.

The coordinator gives each of them a second name within the directory of the save: a hard link. So
they stay readable if someone deletes the earlier checkpoint meanwhile, and all ranks look at the
same files. The ranks compare their bytes with them. If all of a file is equal, its link becomes the
output file. The other links go before the commit.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CommitError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.storage.posix_outputs import number_and_text, write_errors
from dcp_hf_writer.storage.posix_trees import remove_tree
from dcp_hf_writer.storage.stored_copy import StoredCopy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dcp_hf_writer.plan.layout import Layout, PlannedFile
    from dcp_hf_writer.storage.output_fsync import OpenFiles

_log = logging.getLogger(__name__)

_LINKS_NAME = ".previous"


@dataclass(frozen=True, slots=True)
class PreviousFiles:
    """What one save may use again of an earlier checkpoint; the same values on every rank."""

    checkpoint: str
    """Absolute path of the earlier checkpoint."""
    staging: str
    """The directory that the save writes into; it holds the links."""
    numbers: frozenset[int]
    """Output files, by their number in the layout, whose earlier file has the same name, size and
    header; so each tensor has the same place in it."""

    @classmethod
    def told(cls, told: Mapping[str, Any] | None, staging: str) -> PreviousFiles | None:
        """Return what the coordinator told as `to_tell`; `None` if nothing can be used again."""
        found = (told or {}).get("previous")
        if found is None:
            return None
        return cls(str(found["checkpoint"]), staging, frozenset(found["numbers"]))

    def to_tell(self) -> dict[str, Any]:
        """Return what the other ranks need, as JSON values (coordinator)."""
        return {"checkpoint": self.checkpoint, "numbers": sorted(self.numbers)}

    @property
    def _links(self) -> str:
        return os.path.join(self.staging, _LINKS_NAME)

    def link_of(self, number: int) -> str:
        """Return the path of the link to the earlier file of an output file."""
        return os.path.join(self._links, f"{number:05d}.safetensors")

    def link_of_dcp(self, name: str) -> str:
        """Return the path of the link to the earlier `.distcp` file of a name."""
        return os.path.join(self._links, name)

    def link_dcp_file(self, name: str) -> None:
        """Link the earlier `.distcp` file of a name, if there is one.

        Args:
            name: File name; only the rank that writes the new file of that name calls this.
        """
        try:
            _link(os.path.join(self.checkpoint, name), self.link_of_dcp(name))
        except OSError as error:
            # Another number of ranks saved the earlier checkpoint, or it is being deleted.
            _log.debug("%s of %s cannot be reused: %s", name, self.checkpoint, error)

    def take(
        self, numbers: Iterable[int], layout: Layout, files: OpenFiles, *, subdir: str
    ) -> frozenset[int]:
        """Let links take the places of output files that no rank has written to (coordinator).

        Args:
            numbers: The output files; each byte of their earlier files is as planned.
            layout: The export.
            files: Keeps the output files open; those that are replaced are closed.
            subdir: Directory of the export within the checkpoint.

        Returns:
            The output files that are now complete.

        Raises:
            WriteError: If the file system refuses a rename.
        """
        taken = frozenset(numbers)
        for number in sorted(taken):
            reach("before link")
            path = os.path.join(self.staging, subdir, layout.files[number].name)
            made = files.take(path)
            if made is not None:
                made.discard()
            with write_errors(path):
                os.rename(self.link_of(number), path)
        return taken

    def remove(self) -> None:
        """Remove the links that are left (coordinator).

        Raises:
            CommitError: If they cannot be removed; then nothing may be published.
        """
        remove_tree(self._links)
        if os.path.lexists(self._links):
            msg = "links to the files of an earlier checkpoint could not be removed"
            raise CommitError(msg, phase="finish", path=self._links)


def link_previous(
    checkpoint: str, staging: str, layout: Layout | None, *, subdir: str
) -> PreviousFiles | None:
    """Link the files of an earlier checkpoint that may have equal bytes (coordinator).

    Never raises for a checkpoint that cannot be used: the save then writes everything, and one
    warning says why.

    Args:
        checkpoint: Path of the earlier checkpoint. It must be committed: only then its files do not
            change any more.
        staging: The directory that the save writes into.
        layout: The export; `None` without one.
        subdir: Directory of the export within each checkpoint.

    Returns:
        The links; `None` if nothing can be used again.
    """
    try:
        _check_committed(checkpoint)
        os.mkdir(os.path.join(staging, _LINKS_NAME))
        # Whether links work here at all; the manifest is a file that every checkpoint has.
        probe = os.path.join(staging, _LINKS_NAME, MANIFEST_NAME)
        _link(os.path.join(checkpoint, MANIFEST_NAME), probe)
        os.unlink(probe)
    except OSError as error:
        _log.warning(
            "%s cannot be reused, so everything is written: %s", checkpoint, number_and_text(error)
        )
        remove_tree(os.path.join(staging, _LINKS_NAME))
        return None
    found = PreviousFiles(checkpoint, staging, frozenset())
    numbers = [
        number
        for number, file in enumerate(() if layout is None else layout.files)
        if _links_file(os.path.join(checkpoint, subdir, file.name), found.link_of(number), file)
    ]
    return PreviousFiles(checkpoint, staging, frozenset(numbers))


def _check_committed(checkpoint: str) -> None:
    manifest = os.path.join(checkpoint, MANIFEST_NAME)
    if not stat.S_ISREG(os.lstat(manifest).st_mode):
        raise OSError(errno.EINVAL, "its manifest is not a file", manifest)


def _links_file(path: str, link: str, file: PlannedFile) -> bool:
    """Link an earlier file if it has the size and the header of a planned one."""
    try:
        _link(path, link)
        if os.stat(link).st_size == file.nbytes:
            with StoredCopy(link) as stored:
                if stored.holds(memoryview(file.header), 0):
                    return True
        os.unlink(link)
    except OSError as error:
        # The usual reason: the earlier checkpoint has no export, or its files have other names.
        _log.debug("%s cannot be reused: %s", path, error)
    return False


def _link(path: str, link: str) -> None:
    os.link(path, link, follow_symlinks=False)
    if not stat.S_ISREG(os.lstat(link).st_mode):
        os.unlink(link)
        raise OSError(errno.EINVAL, "not a regular file", path)
