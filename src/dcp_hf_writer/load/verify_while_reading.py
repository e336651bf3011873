"""Compare the bytes that a load needs with the digests of the manifest, before the load reads them.

A digest covers a whole block. So whole blocks are read here, even if the load needs only a part of
one. If a digest differs, nothing in the state dict has been changed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import partial
from typing import TYPE_CHECKING

from dcp_hf_writer.digests.digest_sweep import Digest, Span, contiguous
from dcp_hf_writer.digests.problems import Problem, first_of
from dcp_hf_writer.digests.recompute import (
    Job,
    Recomputation,
    block_jobs,
    header_job,
    rest_job,
)
from dcp_hf_writer.digests.stored_digests import KeysOfFile, StoredDigests
from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.load.read_plan import span_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from dcp_hf_writer.load.choose_half import CheckpointPlace
    from dcp_hf_writer.load.read_plan import Fetch
    from dcp_hf_writer.plan.manifest import Manifest

_THREADS = 4

_Work = tuple[list[Span], list[Digest]]
_Bytes = list[tuple[int, int]]
"""Byte ranges `(start, stop)` that a load needs of one file: ascending and disjoint."""


def verify_ranges(
    place: CheckpointPlace,
    manifest: Manifest,
    fetches: Sequence[Fetch],
    *,
    whole: Collection[str] = (),
    objects_in: Collection[str] = (),
) -> None:
    """Verify every block that a load reads from.

    Args:
        place: Where the files are.
        manifest: The digests that the files must have.
        fetches: The elements that the load reads; file names are relative to the half it reads.
        whole: Files that the load reads as a whole, such as the metadata.
        objects_in: Files of the DCP half from which the load reads objects.

    Raises:
        CorruptCheckpointError: If a digest differs. Names file, key and bytes of the first
            difference, and counts the others.
        ReadError: If a file cannot be read.
    """
    wanted = _wanted(place, fetches)
    digests = StoredDigests(place.files, manifest)
    jobs = [
        *_dcp_jobs(manifest, digests, wanted),
        *_hf_jobs(place, manifest, digests, wanted),
    ]
    # The metadata has one digest for the whole file. If another writer wrote the DCP half, so has
    # each of its files.
    read_whole = {*whole, *wanted, *objects_in} & manifest.files.keys()
    jobs += [_whole_job(manifest, name) for name in sorted(read_whole)]
    for name in sorted({*objects_in} & manifest.dcp.keys()):
        jobs.append(rest_job(manifest.dcp[name], digests.ranges(name) or []))
    problems = [_unknown(name) for name in wanted.keys() - {job.file for job in jobs}]
    work = Recomputation(place.files, jobs, threads=min(_THREADS, max(len(jobs), 1)))
    problems += work.run(lambda: None)
    if problems:
        raise CorruptCheckpointError(
            "the stored bytes differ from the saved ones; nothing was loaded",
            phase="read",
            path=f"{place.files.path}/{problems[0].file}",
            key=problems[0].key,
            found=first_of(problems),
            hint="load an earlier checkpoint; verify(path) lists everything wrong with this one",
        )


def _wanted(place: CheckpointPlace, fetches: Sequence[Fetch]) -> dict[str, _Bytes]:
    below = f"{place.subdir}/" if place.subdir else ""
    found: dict[str, _Bytes] = {}
    for fetch in fetches:
        if nbytes := span_of(fetch):
            found.setdefault(f"{below}{fetch.file}", []).append((fetch.start, fetch.start + nbytes))
    return {name: _merged(ranges) for name, ranges in found.items()}


def _merged(ranges: _Bytes) -> _Bytes:
    found: _Bytes = []
    for first, last in sorted(ranges):
        if found and first < found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _touching(ranges: _Bytes, start: int, stop: int) -> _Bytes:
    low = bisect_right(ranges, start, key=lambda one: one[1])
    return ranges[low : bisect_left(ranges, stop, key=lambda one: one[0])]


def _dcp_jobs(
    manifest: Manifest, digests: StoredDigests, wanted: Mapping[str, _Bytes]
) -> Iterator[Job]:
    for name in sorted(wanted.keys() & manifest.dcp.keys()):
        covered, ranges = 0, digests.ranges(name) or []
        for start, nbytes, digest in ranges:
            stop = start + nbytes
            if touching := _touching(wanted[name], start, stop):
                found = Digest(digest, "the data", start=start, stop=stop)
                yield Job(name, nbytes, partial(_contiguous, found))
                covered += sum(start <= a and b <= stop for a, b in touching)
        if covered < len(wanted[name]):
            # The digest of the rest of the file covers the bytes outside all ranges.
            yield rest_job(manifest.dcp[name], ranges)


def _hf_jobs(
    place: CheckpointPlace,
    manifest: Manifest,
    digests: StoredDigests,
    wanted: Mapping[str, _Bytes],
) -> Iterator[Job]:
    hf = manifest.hf
    if hf is None:
        return
    names = {hf.path_of(name): name for name in hf.files}
    found = digests.blocks([names[path] for path in wanted if path in names])
    for path, name in names.items():
        if name not in found:
            continue
        yield header_job(path, hf.files[name])
        blocks, groups = found[name], set[int]()
        for start, stop in wanted[path]:
            groups.update(blocks.near(start, stop))
        keys = KeysOfFile(place.files, path, hf.files[name])
        yield from block_jobs(path, blocks, keys, sorted(groups))


def _contiguous(digest: Digest) -> _Work:
    span = Span(digest.start, digest.stop, ((digest, contiguous(digest.start, digest.stop)),))
    return ([span] if digest.start < digest.stop else []), [digest]


def _whole_job(manifest: Manifest, name: str) -> Job:
    file = manifest.files[name]
    digest = Digest(file.digest, "the file", start=0, stop=file.nbytes)
    return Job(name, file.nbytes, partial(_contiguous, digest))


def _unknown(name: str) -> Problem:
    return Problem(file=name, what="the manifest has no digest for the bytes that the load needs")
