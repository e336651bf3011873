"""Cuts of byte runs: positions and offsets agree, and rows give back the bytes between them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcp_hf_writer.tensors.boxes import ByteRuns, whole
from dcp_hf_writer.tensors.copy_cuts import elements_between
from dcp_hf_writer.tensors.run_cuts import last_offset, positions_of, rows_between, total_nbytes
from dcp_hf_writer.tensors.strided_copies import clip, copy_of_box, copy_runs
from support.exchanges import offsets_of, runs_of_box
from support.partitions import boxes_in, shapes


@st.composite
def runs_of_a_box(draw: st.DrawFn) -> ByteRuns:
    shape = draw(shapes(min_side=1))
    box = draw(boxes_in(shape, min_size=1))
    itemsize, start = draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 50))
    (found,) = runs_of_box(box, shape, itemsize=itemsize, start=start)
    return found


@given(runs_of_a_box(), st.lists(st.integers(-5, 2000), max_size=20))
def test_position_counts_the_bytes_before_an_offset(runs: ByteRuns, offsets: list[int]) -> None:
    every = offsets_of(runs)
    expected = [int((every < offset).sum()) for offset in offsets]
    assert positions_of(runs, np.array(offsets, np.int64)).tolist() == expected


@given(runs_of_a_box())
def test_runs_end_behind_their_last_byte(runs: ByteRuns) -> None:
    every = offsets_of(runs)
    assert (total_nbytes(runs), last_offset(runs)) == (len(every), int(every[-1]) + 1)


@given(st.data(), runs_of_a_box())
def test_rows_hold_the_bytes_between_two_positions(data: st.DataObject, runs: ByteRuns) -> None:
    nbytes = total_nbytes(runs)
    first = data.draw(st.integers(0, nbytes))
    stop = data.draw(st.integers(first, nbytes))
    found = [
        row.start + i * row.stride + j
        for row in rows_between(runs, first, stop)
        for i in range(row.count)
        for j in range(row.nbytes)
    ]
    assert found == offsets_of(runs)[first:stop].tolist()


@given(st.data(), shapes(min_side=1))
def test_cut_copies_visit_the_elements_between_two_numbers(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    (copy,) = clip(copy_of_box(whole(shape)), data.draw(boxes_in(shape, min_size=1)))
    first = data.draw(st.integers(0, copy.numel))
    stop = data.draw(st.integers(first, copy.numel))
    every = offsets_of(copy_runs(copy, shape, itemsize=1, tensor_start=0)).tolist()
    found = [
        offset
        for part in elements_between(copy, first, stop)
        for offset in offsets_of(copy_runs(part, shape, itemsize=1, tensor_start=0)).tolist()
    ]
    assert found == every[first:stop]
