"""The digests file of a rank, `dcp-hf/digests-00000.safetensors`: digests of what it wrote.

Pure. The file holds columns of numbers in the safetensors format, so that a job of a thousand ranks
needs no list of all blocks in one place. The manifest lists the file with its size and digest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import xxhash

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.encode_safetensors_header import HFTensor, encode_header, in_file_order
from dcp_hf_writer.formats.names_on_disk import digests_file_name
from dcp_hf_writer.formats.parse_safetensors_header import header_nbytes, parse_header
from dcp_hf_writer.plan.block_columns import (
    BlockColumns,
    columns_of,
    pack_blocks,
    targets_by_key,
)
from dcp_hf_writer.plan.rank_report import DigestsFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from dcp_hf_writer.plan.block_columns import Digests, Integers
    from dcp_hf_writer.plan.layout import PartTarget
    from dcp_hf_writer.plan.rank_report import DCPFile, RankReport

MAX_DIGESTS_NBYTES = 1 << 30
"""Callers refuse a larger file before they read it. A block takes 32 bytes, a DCP range 28."""

_MAX_LOOPS = 128
_DTYPES = {"U32": "<u4", "I64": "<i8", "U64": "<u8"}
_COLUMNS = {
    "hf.file": "U32",
    "hf.start": "I64",
    "hf.nbytes": "I64",
    "hf.loop_count": "U32",
    "hf.loops": "I64",
    "hf.digest": "U64",
    "dcp.file": "U32",
    "dcp.start": "I64",
    "dcp.nbytes": "I64",
    "dcp.digest": "U64",
}
_ROWS_OF_TWO = "hf.loops"


@dataclass(frozen=True, slots=True, eq=False)
class RankDigests:
    """The digests of what one rank wrote."""

    blocks: BlockColumns
    """Blocks of the export; `file` counts the output files as the manifest lists them."""
    dcp_file: npt.NDArray[np.uint32]
    """Of each DCP range, the file: it counts the rank's DCP files as the manifest lists them."""
    dcp_start: Integers
    """Offset of the data of a tensor in that file, in bytes; ascending within a file."""
    dcp_nbytes: Integers
    """Length of the data, in bytes."""
    dcp_digest: Digests
    """xxh3_64 of the data."""

    def ranges(self, file: int) -> list[tuple[int, int, str]]:
        """Return `(start, nbytes, digest)` of each range of a DCP file, ascending."""
        rows = np.flatnonzero(self.dcp_file == file)
        return [
            (start, nbytes, f"{digest:016x}")
            for start, nbytes, digest in zip(
                self.dcp_start[rows].tolist(),
                self.dcp_nbytes[rows].tolist(),
                self.dcp_digest[rows].tolist(),
                strict=True,
            )
        ]


def rank_digests(blocks: BlockColumns | None, dcp_files: Sequence[DCPFile]) -> RankDigests:
    """Return the digests of a rank's blocks and DCP files."""
    rows = [(number, *one) for number, file in enumerate(dcp_files) for one in file.ranges]
    return RankDigests(
        blocks or columns_of([]),
        np.array([row[0] for row in rows], np.uint32),
        np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.int64),
        np.array([int(row[3], 16) for row in rows], np.uint64),
    )


def pack_report(report: RankReport, targets: Mapping[str, Sequence[PartTarget]]) -> bytes:
    """Move the digests of a report into a digests file, so that the report stays small.

    Args:
        report: The report; it keeps what the coordinator needs, and how the manifest lists the
            file.
        targets: The targets of the tensors that the rank wrote, by FQN.

    Returns:
        The content of the digests file.
    """
    columns = pack_blocks(report.blocks, targets_by_key(targets), rank=report.rank)
    data, report.digests = encode_digests(rank_digests(columns, report.dcp_files), report.rank)
    report.columns, report.blocks = columns.without_digests(), []
    report.dcp_files = [replace(file, ranges=()) for file in report.dcp_files]
    return data


def encode_digests(digests: RankDigests, rank: int) -> tuple[bytes, DigestsFile]:
    """Return the digests file of a rank, and how the manifest lists it."""
    blocks = digests.blocks
    columns: dict[str, npt.NDArray[Any]] = {
        "hf.file": blocks.file,
        "hf.start": blocks.start,
        "hf.nbytes": blocks.nbytes,
        "hf.loop_count": blocks.loop_count,
        "hf.loops": blocks.loops,
        "hf.digest": blocks.digest,
        "dcp.file": digests.dcp_file,
        "dcp.start": digests.dcp_start,
        "dcp.nbytes": digests.dcp_nbytes,
        "dcp.digest": digests.dcp_digest,
    }
    tensors = in_file_order(
        [HFTensor(name, dtype, columns[name].shape) for name, dtype in _COLUMNS.items()]
    )
    header, _ = encode_header(tensors, metadata={"dcp-hf": "digests"}, align=8)
    data = b"".join(
        [header, *(columns[one.key].astype(_DTYPES[one.dtype]).tobytes() for one in tensors)]
    )
    files = None
    if len(blocks):
        files = int(blocks.file.min()), int(blocks.file.max())
    digest = str(xxhash.xxh3_64_hexdigest(data))
    return data, DigestsFile(
        digests_file_name(rank), len(data), digest, files, blocks.data_nbytes()
    )


def most_nbytes(*, blocks: int, loops: int, ranges: int) -> int:
    """Return the largest size of a digests file.

    Args:
        blocks: Number of its blocks.
        loops: Number of loops of all blocks together.
        ranges: Number of its DCP ranges.
    """
    empty, _ = encode_digests(rank_digests(None, []), 0)
    # Numbers in the header get longer with the columns, by at most 16 digits each.
    return len(empty) + 64 * len(_COLUMNS) + 32 * blocks + 16 * loops + 28 * ranges


def parse_digests(
    data: bytes, *, path: str, hf_files: Sequence[tuple[int, int]], dcp_nbytes: Sequence[int]
) -> RankDigests:
    """Parse and check a digests file, which may be damaged or hostile.

    Args:
        data: The whole file.
        path: Path of the file, for the error.
        hf_files: Of each output file of the export, the size of its header and of the whole file;
            empty if the checkpoint has no export. The blocks are not returned then.
        dcp_nbytes: Size of each DCP file of the rank.

    Raises:
        CorruptCheckpointError: If the file is no such file, or holds bytes outside their files.
    """
    columns = _columns(data, path)
    lengths = {name.partition(".")[0]: set[int]() for name in _COLUMNS}
    for name, column in columns.items():
        if name != _ROWS_OF_TWO:
            lengths[name.partition(".")[0]].add(len(column))
    for half, found in lengths.items():
        if len(found) > 1:
            _refuse(path, f"the columns of {half}", "of one length", sorted(found))
    if int(columns["hf.loop_count"].sum(dtype=np.uint64)) != len(columns["hf.loops"]):
        _refuse(path, "hf.loops", "as long as hf.loop_count says", len(columns["hf.loops"]))
    blocks = BlockColumns(*(columns[name] for name in _COLUMNS if name.startswith("hf.")))
    if hf_files:
        _check_blocks(blocks, path, hf_files)
    else:
        blocks = columns_of([])
    ranges = (columns[name] for name in _COLUMNS if name.startswith("dcp."))
    found_digests = RankDigests(blocks, *ranges)
    _check_ranges(found_digests, path, dcp_nbytes)
    return found_digests


def _columns(data: bytes, path: str) -> dict[str, npt.NDArray[Any]]:
    nbytes = header_nbytes(data[:8], file_nbytes=len(data), path=path)
    tensors = parse_header(data[:nbytes], file_nbytes=len(data), path=path).tensors
    if tensors.keys() != _COLUMNS.keys():
        _refuse(path, "its tensors", f"{sorted(_COLUMNS)}", sorted(tensors)[:20])
    found: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in _COLUMNS.items():
        one, ndim = tensors[name], 2 if name == _ROWS_OF_TWO else 1
        if one.dtype != dtype or len(one.shape) != ndim or one.shape[1:] not in ((), (2,)):
            _refuse(path, name, f"{dtype} with {ndim} dimensions", f"{one.dtype} {one.shape}")
        count = one.nbytes // np.dtype(_DTYPES[dtype]).itemsize
        column = np.frombuffer(data, _DTYPES[dtype], count, one.start)
        found[name] = column.reshape(one.shape)
    return found


def _check_blocks(blocks: BlockColumns, path: str, hf_files: Sequence[tuple[int, int]]) -> None:
    """Check that each block lies within its file, and that its runs ascend without overlap."""
    if not len(blocks):
        return
    file = blocks.file.astype(np.int64)
    if int(file.max()) >= len(hf_files):
        _refuse(path, "hf.file", f"numbers below {len(hf_files)}", int(file.max()))
    if int(blocks.loop_count.max()) > _MAX_LOOPS:
        _refuse(path, "hf.loop_count", f"at most {_MAX_LOOPS}", int(blocks.loop_count.max()))
    bounds = np.array(hf_files, np.int64)
    low, high = bounds[file, 0], bounds[file, 1]
    outside = (blocks.start < low) | (blocks.start > high)
    outside |= (blocks.nbytes <= 0) | (blocks.nbytes > high - np.minimum(blocks.start, high))
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        _refuse(path, "a block", "within the data of its file", _shown(blocks, row))
    looped = np.flatnonzero(blocks.loop_count)
    first = blocks.first_loop
    for row, room in zip(looped.tolist(), (high - blocks.start)[looped].tolist(), strict=True):
        begin = int(first[row])
        loops = blocks.loops[begin : begin + int(blocks.loop_count[row])].tolist()
        reach = int(blocks.nbytes[row])
        for count, stride in reversed(loops):
            # Python's numbers: the product of hostile numbers does not overflow.
            if count < 1 or stride < reach:
                _refuse(path, "the loops of a block", "apart and ascending", [count, stride])
            reach += (count - 1) * stride
        if reach > room:
            _refuse(path, "a block", "within the data of its file", _shown(blocks, row))


def _shown(blocks: BlockColumns, row: int) -> str:
    return (
        f"{int(blocks.nbytes[row])} bytes from byte {int(blocks.start[row])} of file number "
        f"{int(blocks.file[row])}"
    )


def _check_ranges(digests: RankDigests, path: str, dcp_nbytes: Sequence[int]) -> None:
    file = digests.dcp_file.astype(np.int64)
    if not len(file):
        return
    if int(file.max()) >= len(dcp_nbytes):
        _refuse(path, "dcp.file", f"numbers below {len(dcp_nbytes)}", int(file.max()))
    start, nbytes = digests.dcp_start, digests.dcp_nbytes
    high = np.array(dcp_nbytes, np.int64)[file]
    outside = (
        (start < 0) | (nbytes < 0) | (start > high) | (nbytes > high - np.minimum(start, high))
    )
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        found = f"{int(nbytes[row])} bytes from byte {int(start[row])} of DCP file {int(file[row])}"
        _refuse(path, "a DCP range", "within its file", found)
    is_same = file[1:] == file[:-1]
    if (file[1:] < file[:-1]).any() or (is_same & (start[1:] < (start + nbytes)[:-1])).any():
        _refuse(path, "the DCP ranges", "ascending and apart", "other ranges")


def _refuse(path: str, where: str, expected: str, found: object) -> NoReturn:
    raise CorruptCheckpointError(
        "a digests file holds an invalid value",
        phase="read",
        path=path,
        expected=f"{where} to be {expected}",
        found=str(found)[:200],
    )
