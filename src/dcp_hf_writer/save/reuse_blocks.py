"""Blocks that an earlier checkpoint holds already: they are compared, and not written again.

The earlier file of the same name is read where the block belongs. Only if it holds the very bytes
of the block is it used, so damage in the earlier checkpoint never gets into a new one. A tensor
that training changes differs in its first bytes, and then no more of it is read.

A file system that can clone lets the new file share the disk blocks of the earlier one. Elsewhere
only whole files are used again; see `agree_on_links`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import WriteError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.plan.shared_runs import MIN_SHARED_NBYTES, SharedRun, whole_blocks
from dcp_hf_writer.save.block_bytes import BlockBytes
from dcp_hf_writer.storage.block_clones import CANNOT_CLONE
from dcp_hf_writer.storage.posix_outputs import number_and_text
from dcp_hf_writer.storage.stored_copy import StoredCopy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.plan.written_block import WrittenBlock
    from dcp_hf_writer.save.bounce_buffer import BounceBuffer
    from dcp_hf_writer.save.hf_half import ItemTensors
    from dcp_hf_writer.save.previous_files import PreviousFiles
    from dcp_hf_writer.storage.posix_outputs import OutputFile

    Blocks = Sequence[tuple[WriteItem, Region]]

_log = logging.getLogger(__name__)

# A first look at each block of a file: if one differs, no more of the file is read.
_FIRST_NBYTES = 64 << 10


class BlockReuse:
    """What one rank uses again of an earlier checkpoint in one save. Not thread-safe."""

    def __init__(
        self,
        previous: PreviousFiles,
        source: ItemTensors,
        bounce: BounceBuffer,
        *,
        block_nbytes: int | None,
        check: Callable[[], None],
    ) -> None:
        """Read nothing yet.

        Args:
            previous: The files of the earlier checkpoint.
            source: Resolves items to tensors.
            bounce: Memory for blocks that are cast or reordered.
            block_nbytes: Size of a disk block that files can share; `None` if they cannot.
            check: Called before each block is compared; raises if the save was given up.
        """
        self.nbytes = 0
        """Bytes that were used again so far."""
        self._previous, self._source, self._bounce = previous, source, bounce
        self._block_nbytes, self._check = block_nbytes, check
        # What the comparison of a block found, by id of its region. The region is kept: the id of
        # one that is gone may be given to another.
        self._known: dict[int, tuple[Region, WrittenBlock | None]] = {}
        self._open: tuple[str, StoredCopy] | None = None
        self._is_told = False

    def equal_files(self, work: Mapping[int, Blocks]) -> dict[int, list[WrittenBlock]]:
        """Find the output files whose earlier file holds all bytes of this rank.

        Args:
            work: The blocks of each output file that this rank would write.

        Returns:
            By number of the file, what the rank reports about its blocks. A file in which the rank
            has no block is among them.
        """
        found = {}
        for number in sorted(self._previous.numbers):
            blocks = work.get(number, ())
            # The first look spares reading a file of which only the last tensor has changed.
            if all(self._may_be_equal(number, item, region) for item, region in blocks):
                equal = self._equal_blocks(number, blocks)
                if len(equal) == len(blocks):
                    found[number] = equal
        return found

    def _equal_blocks(self, number: int, blocks: Blocks) -> list[WrittenBlock]:
        """Return what to report about the blocks up to the first one that differs."""
        equal = []
        for item, region in blocks:
            written = self._compared(number, item, region)
            if written is None:
                break
            equal.append(written)
        return equal

    def block(
        self, number: int, into: OutputFile, item: WriteItem, region: Region
    ) -> WrittenBlock | None:
        """Let an output file share a block with the earlier file, if that holds the same bytes.

        Args:
            number: Number of the output file.
            into: The output file.
            item: Item of the block's tensor.
            region: The block.

        Returns:
            What the rank reports about the block; `None` if it still has to be written.

        Raises:
            WriteError: If the file system reports an error that a write would meet too.
        """
        runs = region.hf_runs()
        if (
            self._block_nbytes is None
            or number not in self._previous.numbers
            or runs.nbytes < MIN_SHARED_NBYTES
        ):
            return None
        written = self._compared(number, item, region)
        stored = self._stored(self._previous.link_of(number))
        if written is None or stored is None:
            return None
        if not all(self._clone(stored, start, runs.nbytes, into) for start in runs.starts()):
            return None
        self.nbytes += runs.nbytes * runs.count
        return written

    def begin_dcp_file(self, name: str) -> None:
        """Get ready for the `.distcp` file of a name, which this rank writes."""
        if self._block_nbytes is not None:
            self._previous.link_dcp_file(name)

    def dcp_part(self, name: str, data: memoryview, start: int) -> SharedRun | None:
        """Return the part of a tensor's data that its `.distcp` file can share.

        Args:
            name: Name of the file; this rank writes it.
            data: The data.
            start: Where it goes in the file.

        Returns:
            The disk blocks that the data fills, by their place in the data; `None` if the earlier
            file does not hold the data there.
        """
        if self._block_nbytes is None or data.nbytes < MIN_SHARED_NBYTES:
            return None
        stored = self._stored(self._previous.link_of_dcp(name))
        if stored is None or not self._holds(stored, data, start):
            return None
        run = SharedRun(0, data.nbytes, 0, start)
        return whole_blocks(run, data_start=start, block_nbytes=self._block_nbytes)

    def clone_dcp_part(self, name: str, part: SharedRun, into: OutputFile) -> bool:
        """Clone what `dcp_part` returned; returns whether the file system did so."""
        stored = self._stored(self._previous.link_of_dcp(name))
        if stored is None or not self._try_clone(stored, part.start, part.nbytes, into):
            return False
        self.nbytes += part.nbytes
        return True

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
        self._open = None

    def _stored(self, link: str) -> StoredCopy | None:
        """Return an earlier file, open for reading; `None` if it cannot be opened."""
        if self._open is None or self._open[0] != link:
            self.close()
            try:
                self._open = link, StoredCopy(link)
            except FileNotFoundError:
                # Another number of ranks saved it, or no link could be made.
                return None
            except OSError as error:
                self._tell(link, error)
                return None
        return self._open[1]

    def _may_be_equal(self, number: int, item: WriteItem, region: Region) -> bool:
        return self._holds_block(number, self._bytes_of(number, item, region), _FIRST_NBYTES)

    def _compared(self, number: int, item: WriteItem, region: Region) -> WrittenBlock | None:
        """Return what to report about a block if the earlier file holds it; else `None`."""
        if id(region) not in self._known:
            self._check()
            block = self._bytes_of(number, item, region)
            is_equal = self._holds_block(number, block, None)
            self._known[id(region)] = region, block.written() if is_equal else None
        return self._known[id(region)][1]

    def _bytes_of(self, number: int, item: WriteItem, region: Region) -> BlockBytes:
        return BlockBytes(number, item, region, self._source, self._bounce)

    def _holds_block(self, number: int, block: BlockBytes, most: int | None) -> bool:
        """Whether the earlier file holds a block, or its first `most` bytes."""
        stored = self._stored(self._previous.link_of(number))
        if stored is None:
            return False
        nbytes = block.runs.nbytes * block.runs.count
        starts, at, left = block.runs.starts(), 0, 0
        for tensor in block.read(0, nbytes if most is None else min(most, nbytes)):
            data = tensor.numpy().data
            while data.nbytes:
                if not left:
                    at, left = next(starts), block.runs.nbytes
                part = data[:left]
                if not self._holds(stored, part, at):
                    return False
                at, left, data = at + part.nbytes, left - part.nbytes, data[part.nbytes :]
        return True

    def _holds(self, stored: StoredCopy, data: memoryview, offset: int) -> bool:
        try:
            return stored.holds(data, offset)
        except OSError as error:
            self._tell(stored.path, error)
            return False

    def _clone(self, stored: StoredCopy, start: int, nbytes: int, into: OutputFile) -> bool:
        """Clone the disk blocks of a run, and copy its edges; returns whether that worked."""
        run = SharedRun(0, nbytes, 0, start)
        part = whole_blocks(run, data_start=start, block_nbytes=self._block_nbytes or 1)
        if part is None or not self._try_clone(stored, part.start, part.nbytes, into):
            return False
        done = part.offset + part.nbytes
        try:
            stored.copy(start, part.offset, into)
            stored.copy(start + done, nbytes - done, into)
        except WriteError:
            raise
        except OSError as error:
            self._tell(stored.path, error)
            return False
        return True

    def _try_clone(self, stored: StoredCopy, start: int, nbytes: int, into: OutputFile) -> bool:
        """Clone disk blocks; after one refusal of the file system, no more are tried."""
        reach("before reuse")
        try:
            stored.clone(start, nbytes, into)
        except OSError as error:
            if error.errno not in CANNOT_CLONE:
                raise
            self._block_nbytes = None
            self._tell(stored.path, error)
            return False
        return True

    def _tell(self, path: str, error: OSError) -> None:
        """Warn that bytes are written instead; once a save."""
        if not self._is_told:
            self._is_told = True
            _log.warning(
                "an earlier checkpoint is not reused any further, so the rest is written: %s: %s",
                path,
                number_and_text(error),
            )
