"""The digests of a stored checkpoint: from the manifest (version 1), or from the digests files.

Reads only the files that a caller needs: one for a DCP file, and for an output file those of the
ranks that have blocks in it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from dcp_hf_writer.digests.file_blocks import FileBlocks
from dcp_hf_writer.errors import CheckpointError, CorruptCheckpointError
from dcp_hf_writer.formats.parse_safetensors_header import parse_header
from dcp_hf_writer.plan.block_columns import columns_of, joined
from dcp_hf_writer.plan.rank_digests import MAX_DIGESTS_NBYTES, parse_digests

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from dcp_hf_writer.plan.block_columns import BlockColumns, Integers
    from dcp_hf_writer.plan.manifest import Manifest, ManifestDigests, ManifestFile
    from dcp_hf_writer.plan.rank_digests import RankDigests
    from dcp_hf_writer.storage.input_contract import InputFiles

_MOST_READERS = 16


class StoredDigests:
    """Gives the digests of one checkpoint. Thread-safe."""

    def __init__(
        self,
        files: InputFiles,
        manifest: Manifest,
        *,
        on_error: Callable[[str, CheckpointError], None] | None = None,
    ) -> None:
        """Read nothing yet.

        Args:
            files: The files of the checkpoint.
            manifest: Its manifest.
            on_error: Called with the name of a digests file that cannot be read, and with the
                error; then the digests of that rank are left out. `None` raises the error.
        """
        self._files, self._manifest, self._on_error = files, manifest, on_error
        self._by_rank = {file.rank: file for file in manifest.digests}
        self._lock = threading.Lock()
        self._latest: tuple[int, RankDigests | None] | None = None

    def ranges(self, name: str) -> list[tuple[int, int, str]] | None:
        """Return `(start, nbytes, digest)` of each range of a DCP file, ascending.

        `None` if the digests file of its rank cannot be read, and `on_error` was told.

        Raises:
            ReadError: If the digests file cannot be read.
            CorruptCheckpointError: If it is damaged.
        """
        file = self._manifest.dcp[name]
        if file.ranges is not None:
            return list(file.ranges)
        with self._lock:
            if self._latest is None or self._latest[0] != file.rank:
                self._latest = file.rank, self._read(self._by_rank[file.rank])
            found = self._latest[1]
        names = [one.name for one in self._manifest.dcp.values() if one.rank == file.rank]
        return None if found is None else found.ranges(names.index(name))

    def blocks(self, names: Collection[str]) -> dict[str, FileBlocks]:
        """Return the blocks of some output files of the export, by file name.

        Raises:
            ReadError: If a digests file cannot be read.
            CorruptCheckpointError: If one is damaged.
        """
        hf = self._manifest.hf
        if hf is None or not names:
            return {}
        numbers = {name: number for number, name in enumerate(hf.files)}
        wanted = np.array(sorted(numbers[name] for name in names), np.int64)
        columns, ranks, is_complete = self._columns(wanted)
        file = columns.file.astype(np.int64)
        order = np.lexsort((columns.start, file))
        lows = np.searchsorted(file[order], wanted)
        highs = np.searchsorted(file[order], wanted, side="right")
        known = list(hf.files.values())
        found = {}
        for number, low, high in zip(wanted.tolist(), lows, highs, strict=True):
            rows, one = order[low:high], known[number]
            found[one.name] = FileBlocks(
                columns.take(rows), ranks[rows], one.header_nbytes, one.nbytes, is_complete
            )
        return found

    def _columns(self, wanted: Integers) -> tuple[BlockColumns, Integers, bool]:
        """Return the blocks of some output files by number, their ranks, and if all were read."""
        if not self._manifest.digests:
            columns, ranks = _of_version_1(self._manifest)
            return columns, ranks, True
        parts = [
            part
            for part in self._manifest.digests
            if part.hf_files is not None
            and np.searchsorted(wanted, part.hf_files[0])
            < np.searchsorted(wanted, part.hf_files[1], side="right")
        ]
        with ThreadPoolExecutor(max(1, min(_MOST_READERS, self._files.readers))) as pool:
            read = list(pool.map(lambda part: self._wanted(part, wanted), parts))
        kept = [one for one in read if one is not None]
        ranks = np.repeat(
            np.array([p.rank for p, one in zip(parts, read, strict=True) if one is not None], int),
            [len(one) for one in kept],
        ).astype(np.int64)
        return joined(kept), ranks, len(kept) == len(parts)

    def _wanted(self, part: ManifestDigests, wanted: Integers) -> BlockColumns | None:
        found = self._read(part)
        if found is None:
            return None
        is_wanted = np.isin(found.blocks.file, wanted)
        return found.blocks if is_wanted.all() else found.blocks.take(np.flatnonzero(is_wanted))

    def _read(self, part: ManifestDigests) -> RankDigests | None:
        try:
            return self._parse(part)
        except CheckpointError as error:
            if self._on_error is None:
                raise
            with _ON_ERROR:
                self._on_error(part.name, error)
            return None

    def _parse(self, part: ManifestDigests) -> RankDigests:
        path, hf = f"{self._files.path}/{part.name}", self._manifest.hf
        most = min(part.nbytes, MAX_DIGESTS_NBYTES)
        data = self._files.read_whole(part.name, max_nbytes=most)
        digest = str(xxhash.xxh3_64_hexdigest(data))
        if (len(data), digest) != (part.nbytes, part.digest):
            raise CorruptCheckpointError(
                "the digest of the file differs",
                phase="read",
                path=path,
                expected=f"{part.nbytes} bytes with digest {part.digest}",
                found=f"{len(data)} bytes with digest {digest}",
            )
        files = () if hf is None else tuple((f.header_nbytes, f.nbytes) for f in hf.files.values())
        sizes = [one.nbytes for one in self._manifest.dcp.values() if one.rank == part.rank]
        found = parse_digests(data, path=path, hf_files=files, dcp_nbytes=sizes)
        numbers = found.blocks.file
        span = (int(numbers.min()), int(numbers.max())) if len(numbers) else None
        if span != part.hf_files:
            raise CorruptCheckpointError(
                "a digests file has blocks of other output files than the manifest says",
                phase="read",
                path=path,
                expected=f"blocks of files {part.hf_files}",
                found=f"blocks of files {span}",
            )
        return found


_ON_ERROR = threading.Lock()


def _of_version_1(
    manifest: Manifest,
) -> tuple[BlockColumns, Integers]:
    rows, ranks = [], []
    for number, file in enumerate(() if manifest.hf is None else manifest.hf.files.values()):
        for tensor in (file.tensors or {}).values():
            for block in tensor.blocks:
                if block.runs is not None:
                    rows.append((number, block.runs, int(block.digest, 16)))
                    ranks.append(block.rank)
    return columns_of(rows), np.array(ranks, np.int64)


class KeysOfFile:
    """Names the tensor that holds a byte of an output file; reads the header when first asked."""

    def __init__(self, files: InputFiles, name: str, listed: ManifestFile) -> None:
        """Read nothing yet; `name` is the path within the checkpoint."""
        self._files, self._name, self._listed = files, name, listed
        self._lock = threading.Lock()
        self._known: tuple[list[int], list[str]] | None = None

    def __call__(self, position: int) -> str | None:
        """Return the key of the tensor; `None` if the header is damaged, or no tensor is there."""
        with self._lock:
            if self._known is None:
                self._known = self._read()
        starts, keys = self._known
        at = bisect_right(starts, position) - 1
        return keys[at] if at >= 0 else None

    def _read(self) -> tuple[list[int], list[str]]:
        if self._listed.tensors is not None:
            tensors = [t for t in self._listed.tensors.values() if t.nbytes]
            return [one.start for one in tensors], [one.key for one in tensors]
        try:
            with self._files.open(self._name) as file:
                data = file.read(0, min(self._listed.header_nbytes, file.nbytes))
            # The file may be too short: then its keys still tell what it lacks.
            header = parse_header(data, file_nbytes=self._listed.nbytes, path=self._name)
        except CheckpointError:
            # The digest of the header tells that it is damaged; the bytes are checked without keys.
            return [], []
        stored = [one for one in header.tensors.values() if one.nbytes]
        return [one.start for one in stored], [one.key for one in stored]
