"""A digests file is read without trust: what we write is read, and nothing else."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.plan.block_columns import columns_of
from dcp_hf_writer.plan.layout import PartTarget
from dcp_hf_writer.plan.rank_digests import (
    encode_digests,
    most_nbytes,
    pack_report,
    parse_digests,
    rank_digests,
)
from dcp_hf_writer.plan.rank_report import DCPFile, RankReport
from dcp_hf_writer.plan.written_block import WrittenBlock
from dcp_hf_writer.tensors.boxes import ByteRuns

BIG = 1 << 62
ROWS = [
    (0, ByteRuns(100, 20, ()), 1),
    (2, ByteRuns(60, 4, ((3, 24), (2, 8))), (1 << 64) - 1),
    (2, ByteRuns(64, 4, ((3, 24), (2, 8))), 3),
]
FILES = [(100, 120), (8, 8), (60, 140)]
DCP = [DCPFile("__1_0.distcp", 50, ((4, 6, "0" * 16), (10, 40, "f" * 16)), "a" * 16)]
DATA, LISTED = encode_digests(rank_digests(columns_of(ROWS), DCP), 1)


def parse(data: bytes, files: Any = FILES, sizes: Any = (50,)) -> Any:
    return parse_digests(data, path="x", hf_files=files, dcp_nbytes=sizes)


def test_what_is_written_is_read_by_stock_safetensors_too() -> None:
    found = parse(DATA)
    assert found.blocks.runs(np.arange(3)) == [runs for _, runs, _ in ROWS]
    assert found.blocks.digest.tolist() == [digest for *_, digest in ROWS]
    assert found.ranges(0) == list(DCP[0].ranges)
    assert (LISTED.name, LISTED.nbytes) == ("dcp-hf/digests-00001.safetensors", len(DATA))
    assert (LISTED.hf_files, LISTED.hf_nbytes) == ((0, 2), 20 + 24 + 24)
    assert load(DATA)["hf.file"].tolist() == [0, 2, 2]


def test_order_of_writing_does_not_change_the_file() -> None:
    targets = {"w": (PartTarget("w", 0, 100, "U8", (8,), ()),)}
    blocks = [WrittenBlock("w", (start,), (2,), f"{start:016x}") for start in range(0, 8, 2)]
    data = {
        pack_report(RankReport(0, "host", blocks=list(order)), targets)
        for order in itertools.permutations(blocks)
    }
    assert len(data) == 1
    assert load(data.pop())["hf.digest"].tolist() == [0, 2, 4, 6]


def test_blocks_are_left_out_without_an_export() -> None:
    assert len(parse(DATA, files=()).blocks) == 0


def test_rank_that_wrote_nothing_has_a_file_too() -> None:
    data, listed = encode_digests(rank_digests(None, []), 0)
    assert (len(parse(data).blocks), listed.hf_files, listed.hf_nbytes) == (0, None, 0)


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(0, 300), st.sampled_from([1, 1 << 40]))
def test_reserved_size_is_enough(loops: list[int], ranges: int, unit: int) -> None:
    rows = [
        (number, ByteRuns(unit * number, 4, ((3, 8),) * count), (1 << 64) - 1)
        for number, count in enumerate(loops)
    ]
    many = tuple((unit * number, unit, "f" * 16) for number in range(ranges))
    digests = rank_digests(columns_of(rows), [DCPFile("__1_0.distcp", 50, many, "a" * 16)])
    data, _ = encode_digests(digests, 12345)
    most = most_nbytes(blocks=len(rows), loops=sum(loops), ranges=ranges)
    assert len(data) <= most <= len(data) + 1024


def changed(name: str, row: Any, value: int) -> bytes:
    columns = {key: column.copy() for key, column in load(DATA).items()}
    columns[name][row] = value
    return save(columns)


def replaced(name: str, column: Any) -> bytes:
    return save({**load(DATA), name: column})


HOSTILE: dict[str, tuple[bytes, str]] = {
    "other file": (changed("hf.file", 0, 3), "numbers below 3"),
    "before the data": (changed("hf.start", 0, 99), "within the data"),
    "below zero": (changed("hf.start", 0, -1), "within the data"),
    "beyond": (changed("hf.start", 0, 101), "within the data"),
    "far beyond": (changed("hf.start", 0, BIG * 2 - 1), "within the data"),
    "no bytes": (changed("hf.nbytes", 0, 0), "within the data"),
    "too many": (changed("hf.nbytes", 0, 21), "within the data"),
    "far too many": (changed("hf.nbytes", 0, BIG * 2 - 1), "within the data"),
    "loop beyond": (changed("hf.loops", (0, 0), 5), "within the data"),
    "loop far beyond": (changed("hf.loops", (0, 0), BIG), "within the data"),
    "loop without steps": (changed("hf.loops", (0, 0), 0), "apart and ascending"),
    "loop stands still": (changed("hf.loops", (0, 1), 0), "apart and ascending"),
    "loop goes back": (changed("hf.loops", (0, 1), -8), "apart and ascending"),
    "loops overlap": (changed("hf.loops", (1, 1), 3), "apart and ascending"),
    "more loops": (changed("hf.loop_count", 0, 1), "as long as hf.loop_count"),
    "many loops": (changed("hf.loop_count", 0, 4_294_967_295), "as long as hf.loop_count"),
    "range of other file": (changed("dcp.file", 1, 1), "numbers below 1"),
    "range beyond": (changed("dcp.nbytes", 1, 41), "within its file"),
    "range below zero": (changed("dcp.nbytes", 1, -1), "within its file"),
    "ranges overlap": (changed("dcp.start", 1, 9), "ascending and apart"),
    "a column less": (save({k: c for k, c in load(DATA).items() if k != "hf.start"}), "tensors"),
    "a column more": (replaced("more", np.zeros(3, np.int64)), "its tensors"),
    "a shorter column": (replaced("hf.start", np.zeros(2, np.int64)), "of one length"),
    "another dtype": (replaced("hf.start", np.zeros(3, np.float64)), "I64 with 1"),
    "other dimensions": (replaced("hf.start", np.zeros((3, 1), np.int64)), "I64 with 1"),
    "loops of three": (replaced("hf.loops", np.zeros((4, 3), np.int64)), "I64 with 2"),
    "129 loops": (
        save(
            {
                **load(DATA),
                "hf.loop_count": np.array([129, 0, 0], np.uint32),
                "hf.loops": np.ones((129, 2), np.int64),
            }
        ),
        "at most 128",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_columns_are_refused(name: str) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        parse(data)
    assert len(str(caught.value)) < 1000


def test_hostile_numbers_take_no_memory() -> None:
    data = changed("hf.loop_count", 0, 4_294_967_295)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpointError):
            parse(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@settings(deadline=None, max_examples=200)
@given(st.binary(min_size=1, max_size=8), st.integers(0, len(DATA) - 1), st.booleans())
def test_damaged_file_is_refused_or_read(
    part: bytes,
    at: int,
    is_cut: bool,  # noqa: FBT001 - drawn
) -> None:
    data = DATA[:at] if is_cut else DATA[:at] + part + DATA[at + len(part) :]
    try:
        found = parse(data)
    except CorruptCheckpointError:
        return
    for file, runs in zip(
        found.blocks.file.tolist(), found.blocks.runs(np.arange(len(found.blocks))), strict=True
    ):
        low, high = FILES[file]
        assert low <= runs.start <= max(runs.starts()) + runs.nbytes <= high
