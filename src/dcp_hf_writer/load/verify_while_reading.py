"""Compare the bytes that a load needs with the digests of the manifest, before the load reads them.

A digest covers a whole block. So whole blocks are read here, even if the load needs only a part of
one. If a digest differs, nothing in the state dict has been changed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import partial
from typing import TYPE_CHECKING

from dcp_hf_writer.digests.digest_sweep import Digest, Span, contiguous, extent_of
from dcp_hf_writer.digests.problems import Problem, first_of
from dcp_hf_writer.digests.recompute import Job, Recomputation
from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.load.read_plan import span_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from dcp_hf_writer.load.choose_half import CheckpointPlace
    from dcp_hf_writer.load.read_plan import Fetch
    from dcp_hf_writer.plan.parse_manifest import (
        Manifest,
        ManifestFile,
        ManifestTensor,
        StoredBlock,
    )
    from dcp_hf_writer.plan.rank_report import DCPFile

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
    jobs = [*_dcp_jobs(manifest, wanted), *_hf_jobs(manifest, wanted)]
    # The metadata has one digest for the whole file. If another writer wrote the DCP half, so has
    # each of its files.
    read_whole = {*whole, *wanted, *objects_in} & manifest.files.keys()
    jobs += [_whole_job(manifest, name) for name in sorted(read_whole)]
    jobs += [_rest_job(manifest.dcp[name]) for name in objects_in if name in manifest.dcp]
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


def _dcp_jobs(manifest: Manifest, wanted: Mapping[str, _Bytes]) -> Iterator[Job]:
    for name in wanted.keys() & manifest.dcp.keys():
        covered = 0
        for start, nbytes, digest in manifest.dcp[name].ranges:
            stop = start + nbytes
            if touching := _touching(wanted[name], start, stop):
                found = Digest(digest, "the data", start=start, stop=stop)
                yield Job(name, nbytes, partial(_contiguous, found))
                covered += sum(start <= a and b <= stop for a, b in touching)
        if covered < len(wanted[name]):
            # The digest of the rest of the file covers the bytes outside all ranges.
            yield _rest_job(manifest.dcp[name])


def _hf_jobs(manifest: Manifest, wanted: Mapping[str, _Bytes]) -> Iterator[Job]:
    if manifest.hf is None:
        return
    for file in manifest.hf.files.values():
        name = manifest.hf.path_of(file.name)
        if name not in wanted:
            continue
        yield _header_job(name, file)
        for tensor in file.tensors.values():
            if _touching(wanted[name], tensor.start, tensor.start + tensor.nbytes):
                yield from _tensor_jobs(name, tensor, wanted[name])


def _tensor_jobs(name: str, tensor: ManifestTensor, wanted: _Bytes) -> Iterator[Job]:
    blocks = [block for block in tensor.blocks if block.runs is not None]
    if not _follow_one_another(tensor, blocks):
        # The blocks interleave, or leave a gap. One pass over the tensor reads each byte once, and
        # finds any gap.
        yield Job(name, tensor.nbytes, partial(_interleaved, tensor, blocks))
        return
    for block in blocks:
        digest = _digest(tensor, block)
        if _touching(wanted, digest.start, digest.stop):
            yield Job(name, digest.stop - digest.start, partial(_contiguous, digest))


def _follow_one_another(tensor: ManifestTensor, blocks: Sequence[StoredBlock]) -> bool:
    reached = tensor.start
    for runs in sorted((b.runs for b in blocks if b.runs is not None), key=lambda r: r.start):
        if runs.loops or runs.start != reached:
            return False
        reached += runs.nbytes
    return reached == tensor.start + tensor.nbytes


def _digest(tensor: ManifestTensor, block: StoredBlock) -> Digest:
    runs = block.runs
    assert runs is not None
    return Digest(
        block.digest,
        "a block",
        key=tensor.key,
        rank=block.rank,
        start=runs.start,
        stop=runs.start + extent_of(runs),
    )


def _interleaved(tensor: ManifestTensor, blocks: Sequence[StoredBlock]) -> _Work:
    parts = [(_digest(tensor, block), block.runs) for block in blocks if block.runs is not None]
    span = Span(tensor.start, tensor.start + tensor.nbytes, tuple(parts), tensor.key)
    return [span], [digest for digest, _ in parts]


def _contiguous(digest: Digest) -> _Work:
    span = Span(digest.start, digest.stop, ((digest, contiguous(digest.start, digest.stop)),))
    return ([span] if digest.start < digest.stop else []), [digest]


def _header_job(name: str, file: ManifestFile) -> Job:
    digest = Digest(file.header, "the header", start=0, stop=file.header_nbytes)
    return Job(name, file.header_nbytes, partial(_contiguous, digest))


def _whole_job(manifest: Manifest, name: str) -> Job:
    file = manifest.files[name]
    digest = Digest(file.digest, "the file", start=0, stop=file.nbytes)
    return Job(name, file.nbytes, partial(_contiguous, digest))


def _rest_job(file: DCPFile) -> Job:
    return Job(file.name, file.nbytes, partial(_rest, file))


def _rest(file: DCPFile) -> _Work:
    """Digest all bytes outside the data of tensors: objects, and the rest of the archives."""
    digest = Digest(file.rest, "what is beside the tensors", is_of_many=True)
    reached, spans = 0, []
    for start, nbytes, _ in (*file.ranges, (file.nbytes, 0, "")):
        if reached < start:
            spans.append(Span(reached, start, ((digest, contiguous(reached, start)),)))
        reached = start + nbytes
    return spans, [digest]


def _unknown(name: str) -> Problem:
    return Problem(file=name, what="the manifest has no digest for the bytes that the load needs")
