"""Where two nests of loops meet, against all their positions."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.tensors import loop_nests
from dcp_hf_writer.tensors.loop_nests import meetings, merged, visits_once

if TYPE_CHECKING:
    from dcp_hf_writer.tensors.loop_nests import Loop


def visited(loops: tuple[Loop, ...], start: int = 0) -> list[tuple[int, int]]:
    """Return `(position read, position written)` of each turn."""
    return [
        (
            start + sum(i * step for i, (_, step, _) in zip(turn, loops, strict=True)),
            sum(i * to for i, (_, _, to) in zip(turn, loops, strict=True)),
        )
        for turn in itertools.product(*(range(extent) for extent, _, _ in loops))
    ]


@st.composite
def nests(draw: st.DrawFn) -> tuple[Loop, ...]:
    """Draw loops that step over one another, with gaps or without."""
    loops, reach = [], 1
    for _ in range(draw(st.integers(0, 3))):
        step = reach + draw(st.sampled_from([0, 0, 0, 1, 2, 5]))
        extent = draw(st.integers(1, 6))
        loops.append((extent, step, draw(st.integers(1, 50))))
        reach = draw(st.sampled_from([extent * step, (extent - 1) * step + reach]))
    return merged(loops)


@given(nests(), nests(), st.integers(-80, 80))
def test_meetings_are_the_positions_that_both_visit(
    first: tuple[Loop, ...], second: tuple[Loop, ...], gap: int
) -> None:
    written_at = defaultdict(list)
    for position, written in visited(first):
        written_at[position].append(written)
    expected = [(a, b) for position, b in visited(second, gap) for a in written_at[position]]
    found = [
        (start + a, other + b)
        for start, other, loops in meetings(first, second, gap)
        for a, b in visited(tuple((n, to, other_to) for n, to, other_to in loops))
    ]
    assert sorted(found) == sorted(expected)


@given(nests(), st.permutations(range(3)))
def test_merged_loops_visit_the_same_in_any_order(nest: tuple[Loop, ...], order: list[int]) -> None:
    shuffled = tuple(nest[i] for i in order if i < len(nest))
    assert sorted(visited(merged(shuffled))) == sorted(visited(nest))
    assert merged(shuffled) == merged(nest)


def test_row_major_dims_merge_to_one_loop() -> None:
    assert merged([(2, 12, 12), (3, 4, 4), (4, 1, 1)]) == ((24, 1, 1),)
    assert merged([(2, 12, 1), (3, 4, 2), (4, 1, 6)]) == ((2, 12, 1), (3, 4, 2), (4, 1, 6))


def test_visits_once_when_no_position_can_be_read_twice() -> None:
    assert visits_once([(3, 4, 0), (4, 1, 0)])
    assert not visits_once([(3, 3, 0), (4, 1, 0)])
    assert not visits_once([(3, 0, 0)])


def test_large_tensors_meet_in_few_loops() -> None:
    # Experts 256 x 4096 x 7168: the first half of each expert's rows, then expert 7 of that.
    gate = merged([(256, 2048 * 7168, 4096 * 7168), (2048 * 7168, 1, 1)])
    row = merged([(2048 * 7168, 1, 1)])
    assert meetings(row, gate, -7 * 2048 * 7168) == [
        (0, 7 * 4096 * 7168, ((2048 * 7168, 1, 1),)),
    ]


def test_meetings_are_refused_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ((1000, 14_337, 1),), ((1000, 14_336, 1), (14_336, 1, 1000))
    assert len(meetings(first, second, 0)) == 1000
    monkeypatch.setattr(loop_nests, "MAX_MEETINGS", 999)
    with pytest.raises(SpecError, match="too many pieces"):
        meetings(first, second, 0)
