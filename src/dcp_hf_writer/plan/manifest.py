"""What a manifest says, as checked values.

Pure. Version 1 of the manifest holds every digest. In version 2 each rank has a digests file, and
the manifest lists these files; `digests/stored_digests` reads both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcp_hf_writer.formats.names_on_disk import path_in_export
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.plan.encode_manifest import OtherHalf, WholeFile
    from dcp_hf_writer.tensors.boxes import ByteRuns, Shape
    from dcp_hf_writer.tensors.strided_copies import IndexLoops


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block of one tensor on disk: elements that one rank wrote."""

    rank: int
    """The rank."""
    offsets: Shape
    """Index of its first element."""
    extent: Shape | IndexLoops
    """Its sizes, one per dimension; or its loops, in the order of the bytes."""
    digest: str
    """xxh3_64 of its bytes in file order, in hex."""
    runs: ByteRuns | None
    """Where its bytes are in the file, ascending; `None` if the block is empty."""


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """One tensor of an output file."""

    key: str
    """HuggingFace name."""
    start: int
    """Offset of its first byte in the file."""
    dtype: str
    """safetensors name of its dtype."""
    shape: Shape
    """Its shape, counted in torch elements."""
    blocks: tuple[StoredBlock, ...]
    """The blocks that the ranks wrote."""

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One output file: its header, and tensors that tile the rest."""

    name: str
    """File name within the export."""
    nbytes: int
    """Its size."""
    header_nbytes: int
    """Size of its header; the first tensor starts here."""
    header: str
    """Digest of the header."""
    tensors: Mapping[str, ManifestTensor] | None
    """Its tensors by key, in the order of their bytes; `None` if digests files hold the blocks."""


@dataclass(frozen=True, slots=True)
class ManifestDCPFile:
    """One file of the DCP half."""

    name: str
    """Path within the checkpoint."""
    nbytes: int
    """Its size."""
    rest: str
    """Digest of the bytes outside all ranges, in order."""
    rank: int
    """Rank that wrote it, and whose digests file has its ranges; 0 in version 1."""
    ranges: tuple[tuple[int, int, str], ...] | None
    """`(start, nbytes, digest)` of the data of each tensor, ascending; `None` if a digests file
    holds them."""


@dataclass(frozen=True, slots=True)
class ManifestDigests:
    """A digests file, which holds the digests of what one rank wrote."""

    name: str
    """Path within the checkpoint."""
    rank: int
    """The rank."""
    nbytes: int
    """Its size."""
    digest: str
    """xxh3_64 of its bytes, in hex."""
    hf_files: tuple[int, int] | None
    """First and last number of the output files that it has blocks of; `None` without blocks."""
    hf_nbytes: int
    """Bytes of the export that the rank wrote."""


@dataclass(frozen=True, slots=True)
class ManifestExport:
    """The HuggingFace half."""

    subdir: str
    """Its directory within the checkpoint; empty if the halves lie apart."""
    tied: Mapping[str, str]
    """Names that the export left out, each with the name that holds its bytes."""
    files: Mapping[str, ManifestFile]
    """Output files by name."""

    def path_of(self, name: str) -> str:
        """Return the path of a file of the export within the checkpoint."""
        return path_in_export(self.subdir, name)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The checked content of a manifest."""

    save_id: str
    """Id of the save."""
    target: str
    """Path that it was saved under."""
    step: int | None
    """Training step, if the path contained it."""
    world_size: int
    """Number of ranks that saved it."""
    files: Mapping[str, WholeFile]
    """Files written in one piece, by path within the checkpoint."""
    dcp: Mapping[str, ManifestDCPFile]
    """Files of the DCP half, by path within the checkpoint."""
    once: tuple[str, ...]
    """FQNs of the tensors that only the export stores."""
    hf: ManifestExport | None
    """The export; `None` without one."""
    export_error: str | None
    """Why a requested export failed; `None` if it did not."""
    seconds: Mapping[str, float]
    """Seconds that the coordinator spent in each phase."""
    ranks: tuple[tuple[int, str, Mapping[str, float]], ...] = ()
    """Rank, host, and seconds in each phase, of each rank."""
    digests: tuple[ManifestDigests, ...] = ()
    """The digests files; none in version 1."""
    other_half: OtherHalf | None = None
    """Where the other half lies, if the halves lie apart; `files` and `sizes` leave it out."""

    @property
    def is_export_alone(self) -> bool:
        """Whether this place holds the export only, and the DCP half lies apart."""
        return self.other_half is not None and self.other_half.holds == "dcp"

    def sizes(self) -> dict[str, int]:
        """Return the size of every file but the manifest, by path within the checkpoint."""
        sizes = {name: file.nbytes for name, file in self.files.items()}
        sizes |= {name: file.nbytes for name, file in self.dcp.items()}
        sizes |= {file.name: file.nbytes for file in self.digests}
        if self.hf is not None:
            sizes |= {self.hf.path_of(n): file.nbytes for n, file in self.hf.files.items()}
        return sizes

    def digest_of(self, name: str) -> str | None:
        """Return the digest of a whole file; `None` if the manifest has digests of its parts only.

        Args:
            name: Path within the checkpoint.
        """
        whole = self.files.get(name)
        if whole is not None:
            return whole.digest
        return next((file.digest for file in self.digests if file.name == name), None)
