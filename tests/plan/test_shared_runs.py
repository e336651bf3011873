"""Which bytes may share disk blocks: every plan gives the same files as plain writes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_hf_writer.plan.shared_runs import (
    MIN_SHARED_NBYTES,
    SharedRun,
    long_runs,
    phase_of,
    whole_blocks,
)
from dcp_hf_writer.tensors.boxes import ByteRuns

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCKS = st.sampled_from([512, 1024, 4096, 65536])


@st.composite
def runs_of_one_block(draw: st.DrawFn) -> list[SharedRun]:
    """Runs that lie one after another in the data, and anywhere in up to three files."""
    runs, offset, ends = [], draw(st.integers(0, 70_000)), [0, 0, 0]
    for _ in range(draw(st.integers(1, 6))):
        nbytes, file = draw(st.integers(1, 200_000)), draw(st.integers(0, 2))
        start = ends[file] + draw(st.integers(0, 70_000))
        runs.append(SharedRun(offset, nbytes, file, start))
        ends[file] = start + nbytes
        offset += nbytes + draw(st.integers(0, 5000))
    return runs


def written_twice(runs: Sequence[SharedRun], data: bytes) -> dict[int, bytearray]:
    files = {number: bytearray() for number in range(3)}
    for run in runs:
        file = files[run.file]
        file.extend(bytes(max(0, run.start + run.nbytes - len(file))))
        file[run.start : run.start + run.nbytes] = data[run.offset : run.offset + run.nbytes]
    return files


@given(runs_of_one_block(), BLOCKS, st.integers(0, 70_000), st.integers(0, 2**32))
def test_a_file_with_shared_blocks_equals_one_that_was_written(
    runs: list[SharedRun], block: int, position: int, seed: int
) -> None:
    size = runs[-1].offset + runs[-1].nbytes + 100
    data = random.Random(seed).randbytes(size)
    outputs = written_twice(runs, data)
    phase = phase_of(runs, block)
    assert phase is not None
    data_start = position + (phase - position) % block
    copy, done = bytearray(data_start), 0
    for run in runs:
        part = whole_blocks(run, data_start=data_start, block_nbytes=block)
        if part is None:
            continue
        # What a file system asks of a clone.
        assert part.start % block == (data_start + part.offset) % block == part.nbytes % block == 0
        assert run.offset <= part.offset
        assert part.offset + part.nbytes <= run.offset + run.nbytes
        copy += data[done : part.offset]
        copy += outputs[part.file][part.start : part.start + part.nbytes]
        done = part.offset + part.nbytes
    copy += data[done:]
    assert bytes(copy[data_start:]) == data


@given(runs_of_one_block(), BLOCKS)
def test_the_place_of_the_data_shares_at_least_as_much_as_any_other(
    runs: list[SharedRun], block: int
) -> None:
    def shared(phase: int) -> int:
        return sum(run.nbytes for run in runs if run.phase(block) == phase)

    phase = phase_of(runs, block)
    assert phase is not None
    assert all(shared(phase) >= shared(run.phase(block)) for run in runs)
    for run in runs:
        part = whole_blocks(run, data_start=phase, block_nbytes=block)
        left = run.nbytes - (0 if part is None else part.nbytes)
        if run.phase(block) == phase:
            # All but the edges.
            assert left < 2 * block


@pytest.mark.parametrize(("nbytes", "count"), [(MIN_SHARED_NBYTES, 3), (MIN_SHARED_NBYTES - 1, 0)])
def test_short_runs_are_not_shared(nbytes: int, count: int) -> None:
    runs = ByteRuns(100, nbytes, ((3, 2 * nbytes),))
    found = long_runs(runs, file=7, offset=40)
    assert found == [
        SharedRun(40 + i * nbytes, nbytes, 7, 100 + 2 * i * nbytes) for i in range(count)
    ]


def test_no_runs_need_no_place() -> None:
    assert phase_of([], 4096) is None
