"""Compare what a load is about to read with the digests of the manifest, before it reads it.

A digest is of a whole block, so that is what is read: more than the load itself needs where it
takes a part of one. Nothing has been changed in the state dict when a digest differs.
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

    from dcp_hf_writer.load.checkpoint_half import Place
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
"""First byte, and one past the last, of what is wanted of a file: ascending and apart."""


def verify_ranges(
    place: Place,
    manifest: Manifest,
    fetches: Sequence[Fetch],
    *,
    whole: Collection[str] = (),
    objects_in: Collection[str] = (),
) -> None:
    """Verify every block that a load takes something of.

    Args:
        place: Where the files are.
        manifest: What they should hold.
        fetches: What the load takes; files are named from the half that it reads.
        whole: Files that are read as a whole, such as the metadata.
        objects_in: Files of the DCP half from which objects are read.

    Raises:
        CorruptCheckpointError: Naming file, key and bytes of the first difference, and the number
            of the others.
        ReadError: If a file cannot be read.
    """
    wanted = _wanted(place, fetches)
    jobs = [*_dcp_jobs(manifest, wanted), *_hf_jobs(manifest, wanted)]
    # A DCP half of a writer that is not ours has one digest a file.
    read_whole = {*whole, *wanted, *objects_in} & manifest.files.keys()
    jobs += [_whole_job(manifest, name) for name in sorted(read_whole)]
    jobs += [_rest_job(manifest.dcp[name]) for name in objects_in if name in manifest.dcp]
    problems = [_unknown(name) for name in wanted.keys() - {job.file for job in jobs}]
    work = Recomputation(place.files, jobs, threads=min(_THREADS, max(len(jobs), 1)))
    problems += work.run(lambda: None)
    if problems:
        raise CorruptCheckpointError(
            "what is stored is not what was saved; nothing was loaded",
            phase="read",
            path=f"{place.files.path}/{problems[0].file}",
            key=problems[0].key,
            found=first_of(problems),
            hint="verify(path) lists all that is wrong with a checkpoint; load an earlier one",
        )


def _wanted(place: Place, fetches: Sequence[Fetch]) -> dict[str, _Bytes]:
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
            # What no range holds is in the digest of the rest.
            yield _rest_job(manifest.dcp[name])


def _hf_jobs(manifest: Manifest, wanted: Mapping[str, _Bytes]) -> Iterator[Job]:
    if manifest.hf is None:
        return
    for file in manifest.hf.files.values():
        name = f"{manifest.hf.subdir}/{file.name}"
        if name not in wanted:
            continue
        yield _header_job(name, file)
        for tensor in file.tensors.values():
            if _touching(wanted[name], tensor.start, tensor.start + tensor.nbytes):
                yield from _tensor_jobs(name, tensor, wanted[name])


def _tensor_jobs(name: str, tensor: ManifestTensor, wanted: _Bytes) -> Iterator[Job]:
    blocks = [block for block in tensor.blocks if block.runs is not None]
    if not _follow_one_another(tensor, blocks):
        # Blocks lie between each other, or leave a gap: one pass over all of them reads each byte
        # once, and tells.
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
    """All bytes beside the data of tensors: objects, and what archives consist of."""
    digest = Digest(file.rest, "what is beside the tensors", is_of_many=True)
    reached, spans = 0, []
    for start, nbytes, _ in (*file.ranges, (file.nbytes, 0, "")):
        if reached < start:
            spans.append(Span(reached, start, ((digest, contiguous(reached, start)),)))
        reached = start + nbytes
    return spans, [digest]


def _unknown(name: str) -> Problem:
    return Problem(file=name, what="the manifest says nothing of what is read from this file")
