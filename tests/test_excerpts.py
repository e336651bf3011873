"""Long lists are cut in messages, and the messages say by how much."""

from __future__ import annotations

import pytest

from dcp_hf_writer.excerpts import some_of, some_ranks


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2 and 1 more"), (9, "0, 1, 2 and 6 more")],
)
def test_texts_beyond_the_most_are_counted(count: int, text: str) -> None:
    assert some_of(map(str, range(count)), most=3) == text


def test_texts_are_shown_as_given() -> None:
    assert some_of(["b", "a; c", "d"], most=2, separator="; ") == "b; a; c and 1 more"


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([], "[]"),
        ([3, 1], "[1, 3]"),
        (range(8), "[0, 1, 2, 3, 4, 5, 6, 7]"),
        (range(9), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
    ],
)
def test_ranks_are_sorted_and_those_beyond_eight_are_left_out(ranks: list[int], text: str) -> None:
    assert some_ranks(ranks) == text
