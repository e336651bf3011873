"""The report of a rank to the coordinator about its part of a save."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.errors import ExportError
    from dcp_hf_writer.plan.block_columns import BlockColumns
    from dcp_hf_writer.plan.written_block import WrittenBlock

DIGEST_NAME = "xxh3_64"


@dataclass(frozen=True, slots=True)
class DCPFile:
    """One `.distcp` file, written by one rank."""

    name: str
    """File name."""
    nbytes: int
    """Its size."""
    ranges: tuple[tuple[int, int, str], ...]
    """`(start, nbytes, digest)` of the data of each tensor, ascending."""
    rest: str
    """Digest of all other bytes of the file, in order."""


@dataclass(frozen=True, slots=True)
class DigestsFile:
    """The file that holds the digests of what one rank wrote."""

    name: str
    """Path within the checkpoint."""
    nbytes: int
    """Its size."""
    digest: str
    """xxh3_64 of its bytes, in hex."""
    hf_files: tuple[int, int] | None
    """First and last number of the output files that it has blocks of; `None` without blocks."""
    hf_nbytes: int
    """Bytes of the export that the rank wrote."""


@dataclass(slots=True)
class RankReport:
    """What one rank did. It travels as the storage data of one extra `WriteResult`."""

    rank: int
    host: str
    blocks: list[WrittenBlock] = field(default_factory=list)
    """Blocks of the export; empty once they are packed into `columns`."""
    columns: BlockColumns | None = None
    """The same blocks as columns, without digests; `None` before they are packed."""
    dcp_files: list[DCPFile] = field(default_factory=list)
    """Files of the DCP half; without their ranges once `digests` lists them."""
    digests: DigestsFile | None = None
    """The file with the digests of this rank; `None` before it is written."""
    export_digests: DigestsFile | None = None
    """The same beside an export that lies apart from the DCP half; `digests` has the DCP half."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each phase."""
    nbytes: dict[str, int] = field(default_factory=dict)
    """Bytes written for each half, `dcp` and `hf`."""
    export_error: ExportError | None = None
    """Why this rank could not write its part of the export."""
    stamp: str = ""
    """Stamp of this rank's `LocalFacts` in this save."""
    parts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """On an object store: the parts that the rank sent of shared uploads, by key of the object."""
    samples: bytes | None = None
    """Samples of the `LocalFacts`, if DCP's plan cache did not send them to the coordinator."""
