"""Recompute every digest of a manifest from the files, in several threads."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from dcp_hf_writer.digests.digest_sweep import (
    BEYOND,
    WINDOW_NBYTES,
    Digest,
    Span,
    Sweep,
    contiguous,
)
from dcp_hf_writer.digests.problems import Problem
from dcp_hf_writer.digests.stored_digests import KeysOfFile
from dcp_hf_writer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dcp_hf_writer.digests.file_blocks import FileBlocks
    from dcp_hf_writer.digests.stored_digests import StoredDigests
    from dcp_hf_writer.plan.encode_manifest import WholeFile
    from dcp_hf_writer.plan.manifest import (
        Manifest,
        ManifestDCPFile,
        ManifestDigests,
        ManifestFile,
    )
    from dcp_hf_writer.storage.input_contract import InputFile, InputFiles

# Small enough that all threads finish at about the same time. Large enough that the time to open
# a file does not matter.
_JOB_NBYTES = 64 << 20

# If each read is a request, the request costs more time than a window that fits in cache saves.
_LARGE_WINDOW_NBYTES = 16 << 20

_POLL_S = 0.1

_Work = tuple[list[Span], list[Digest]]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Job:
    """A part of one file that one thread reads and digests."""

    file: str
    """Path within the checkpoint."""
    nbytes: int
    """Bytes to read."""
    work: Callable[[], _Work]
    """Makes spans and digests when the job runs; all at once would need much memory."""


def jobs_of(files: InputFiles, manifest: Manifest, digests: StoredDigests) -> Iterator[Job]:
    """Yield jobs that together recompute every digest of a checkpoint.

    Args:
        files: The files of the checkpoint.
        manifest: Its manifest.
        digests: Its digests.
    """
    for whole in manifest.files.values():
        yield Job(whole.name, whole.nbytes, partial(_whole, whole))
    for one in manifest.digests:
        yield Job(one.name, one.nbytes, partial(_whole, one))
    for dcp in manifest.dcp.values():
        ranges = digests.ranges(dcp.name)
        if ranges is None:
            continue
        yield rest_job(dcp, ranges)
        for group, nbytes in _grouped(ranges, lambda one: one[1]):
            yield Job(dcp.name, nbytes, partial(_ranges, group))
    if manifest.hf is not None:
        blocks = digests.blocks(manifest.hf.files.keys())
        for file in manifest.hf.files.values():
            name = manifest.hf.path_of(file.name)
            yield header_job(name, file)
            keys = KeysOfFile(files, name, file)
            yield from block_jobs(name, blocks[file.name], keys)


def block_jobs(
    name: str, blocks: FileBlocks, keys: KeysOfFile, groups: Iterable[int] | None = None
) -> Iterator[Job]:
    """Yield jobs that recompute the digests of blocks of an output file.

    Args:
        name: Path of the file within the checkpoint.
        blocks: Its blocks.
        keys: Names the tensors.
        groups: The groups of blocks to read, ascending; `None` for all.
    """
    sizes = blocks.stop - blocks.start
    chosen = range(len(sizes)) if groups is None else groups
    for many, nbytes in _grouped(chosen, lambda one: int(sizes[one])):
        yield Job(name, nbytes, partial(blocks.work, many, keys))


def rest_job(file: ManifestDCPFile, ranges: Sequence[tuple[int, int, str]]) -> Job:
    """Return the job for the bytes of a DCP file outside all ranges."""
    data_nbytes = sum(nbytes for _, nbytes, _ in ranges)
    return Job(file.name, file.nbytes - data_nbytes, partial(_rest, file, ranges))


def header_job(name: str, file: ManifestFile) -> Job:
    """Return the job for the header of an output file; `name` is its path in the checkpoint."""
    return Job(name, file.header_nbytes, partial(_header, file))


def _grouped(items: Iterable[_T], size: Callable[[_T], int]) -> Iterator[tuple[list[_T], int]]:
    group: list[_T] = []
    nbytes = 0
    for item in items:
        if group and nbytes + size(item) > _JOB_NBYTES:
            yield group, nbytes
            group, nbytes = [], 0
        group.append(item)
        nbytes += size(item)
    if group:
        yield group, nbytes


def _spans(digest: Digest, ranges: Iterable[tuple[int, int]]) -> list[Span]:
    return [Span(a, b, ((digest, contiguous(a, b)),)) for a, b in ranges if a < b]


def _whole(file: WholeFile | ManifestDigests) -> _Work:
    found = Digest(file.digest, "the file", start=0, stop=file.nbytes)
    return _spans(found, [(0, file.nbytes)]), [found]


def _ranges(ranges: Sequence[tuple[int, int, str]]) -> _Work:
    digests = [
        Digest(digest, "the data of a tensor", start=a, stop=a + n) for a, n, digest in ranges
    ]
    return [span for one in digests for span in _spans(one, [(one.start, one.stop)])], digests


def _rest(file: ManifestDCPFile, ranges: Sequence[tuple[int, int, str]]) -> _Work:
    starts = [start for start, _, _ in ranges]
    stops = [start + nbytes for start, nbytes, _ in ranges]
    gaps = zip([0, *stops], [*starts, file.nbytes], strict=True)
    digest = Digest(file.rest, "the bytes around the tensors", is_of_many=True)
    return _spans(digest, gaps), [digest]


def _header(file: ManifestFile) -> _Work:
    digest = Digest(file.header, "the header", start=0, stop=file.header_nbytes)
    return _spans(digest, [(0, file.header_nbytes)]), [digest]


class Recomputation:
    """Runs jobs in several threads, and returns their problems in the order of the jobs."""

    def __init__(self, files: InputFiles, jobs: Sequence[Job], *, threads: int) -> None:
        """Prepare; `run` starts the threads and ends them."""
        self.total_nbytes = sum(job.nbytes for job in jobs)
        """Bytes to read."""
        self.done_nbytes = 0
        """Bytes read so far."""
        self.digest_count = 0
        """Digests compared so far."""
        self._files, self._jobs, self._threads = files, jobs, threads
        self._lock = threading.Lock()
        self._is_stopped = False
        self._sweeps: queue.SimpleQueue[Sweep] = queue.SimpleQueue()

    def run(self, tick: Callable[[], None]) -> list[Problem]:
        """Run all jobs and wait for them.

        Args:
            tick: Called in this thread about ten times per second; raises to stop.

        Returns:
            Digests that differ, tensors whose blocks do not cover each byte once, and files that
            cannot be read.
        """
        window = _LARGE_WINDOW_NBYTES if self._files.prefers_large_reads else WINDOW_NBYTES
        for _ in range(self._threads):
            self._sweeps.put(Sweep(window))
        with ThreadPoolExecutor(self._threads, thread_name_prefix="dcp-hf-verify") as pool:
            futures = [pool.submit(self._do, job) for job in self._jobs]
            try:
                waiting = set(futures)
                while waiting:
                    done, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    tick()
                return [problem for future in futures for problem in future.result()]
            except BaseException:
                self._is_stopped = True
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _do(self, job: Job) -> list[Problem]:
        sweep = self._sweeps.get()
        spans, digests = job.work()
        try:
            with self._files.open(job.file) as file:
                faults = sweep.run(spans, partial(_read, file), self._count)
        except CheckpointError as error:
            return [Problem.of(error, job.file)]
        finally:
            self._sweeps.put(sweep)
        problems = [
            Problem(file=job.file, what=why, key=span.key, start=span.start, stop=span.stop)
            for span, why in faults
        ]
        if not any(why == BEYOND for _, why in faults):
            for digest in digests:
                if digest.found is None:
                    digest.finish()
        return problems + self._differences(job.file, digests)

    def _differences(self, file: str, digests: Iterable[Digest]) -> list[Problem]:
        problems, count = [], 0
        for digest in digests:
            count += digest.found is not None
            if digest.found not in (None, digest.expected):
                problems.append(
                    Problem(
                        file=file,
                        what=f"the digest of {digest.what} differs",
                        key=digest.key,
                        rank=digest.rank,
                        start=digest.start if digest.stop else None,
                        stop=digest.stop or None,
                        expected=digest.expected,
                        found=digest.found,
                    )
                )
        with self._lock:
            self.digest_count += count
        return problems

    def _count(self, nbytes: int) -> None:
        if self._is_stopped:
            raise _StoppedError
        with self._lock:
            self.done_nbytes += nbytes


class _StoppedError(Exception):
    """The caller stopped the run."""


def _read(file: InputFile, buffer: memoryview, start: int) -> int:
    nbytes = max(0, min(buffer.nbytes, file.nbytes - start))
    if nbytes:
        file.read_into([buffer[:nbytes]], start)
    return nbytes
