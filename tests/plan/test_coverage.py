"""Coverage on columns: each gap, overlap and wrong size is named with its bytes and ranks."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer import HFExport
from dcp_hf_writer.errors import CoverageError
from dcp_hf_writer.plan.assign_hf_keys import RuntimeTensor
from dcp_hf_writer.plan.block_columns import columns_of, joined, pack_blocks, targets_by_key
from dcp_hf_writer.plan.coverage import check_coverage
from dcp_hf_writer.plan.layout import plan_layout
from dcp_hf_writer.plan.rank_report import RankReport
from dcp_hf_writer.plan.written_block import WrittenBlock
from dcp_hf_writer.tensors import tiling_runs
from dcp_hf_writer.tensors.boxes import ByteRuns, whole
from support.partitions import partitions_of

SHAPES = {"a": (6, 4), "b": (3, 5, 2), "c": (7,), "empty": (0, 3), "scalar": ()}
# Two tensors a file.
LAYOUT = plan_layout(
    [RuntimeTensor(n, n, shape, torch.float32, (whole(shape),)) for n, shape in SHAPES.items()],
    HFExport(max_shard_size=200),
    tied=(),
)
TARGETS = targets_by_key(LAYOUT.targets)


def packed(blocks: list[WrittenBlock], ranks: int) -> list[RankReport]:
    reports = []
    for rank in range(ranks):
        columns = pack_blocks(blocks[rank::ranks], TARGETS, rank=rank)
        reports.append(RankReport(rank, "host", columns=columns.without_digests()))
    return reports


def bytes_of(reports: list[RankReport]) -> dict[int, list[list[int]]]:
    """Return for each file the ranks that wrote each byte of it."""
    found = {n: [[] for _ in range(f.nbytes)] for n, f in enumerate(LAYOUT.files)}
    for report in reports:
        assert report.columns is not None
        runs = report.columns.runs(np.arange(len(report.columns)))
        for file, one in zip(report.columns.file.tolist(), runs, strict=True):
            for start in one.starts():
                for position in range(start, start + one.nbytes):
                    found[file][position].append(report.rank)
    return found


@st.composite
def written(draw: st.DrawFn) -> list[WrittenBlock]:
    blocks = [
        WrittenBlock(key, box.offsets, box.sizes, f"{i:016x}")
        for key, shape in SHAPES.items()
        for i, box in enumerate(draw(partitions_of(whole(shape))))
    ]
    return draw(st.permutations(blocks))


@settings(deadline=None)
@given(written(), st.integers(1, 5))
def test_any_partition_is_accepted(blocks: list[WrittenBlock], ranks: int) -> None:
    reports = packed(blocks, ranks)
    check_coverage(LAYOUT, reports)
    owners = bytes_of(reports)
    for number, file in enumerate(LAYOUT.files):
        assert all(len(one) == 1 for one in owners[number][len(file.header) :])
    found = sum(r.columns.data_nbytes() for r in reports if r.columns is not None)
    assert found == sum(file.nbytes - len(file.header) for file in LAYOUT.files)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_gap_overlap_and_size_are_named_with_bytes_and_ranks(data: st.DataObject) -> None:
    blocks = data.draw(written())
    reports = packed(blocks, data.draw(st.integers(1, 4)))
    at = data.draw(
        st.sampled_from([r for r in reports if r.columns is not None and len(r.columns)])
    )
    columns = at.columns
    assert columns is not None
    row = data.draw(st.integers(0, len(columns) - 1))
    kind = data.draw(st.sampled_from(["lost", "twice", "shorter", "longer", "moved"]))
    rows = np.arange(len(columns))
    if kind in ("lost", "twice"):
        kept = np.delete(rows, row) if kind == "lost" else np.append(rows, row)
        at.columns = columns.take(kept)
    else:
        by = data.draw(st.sampled_from([1, 4]))
        start, nbytes = columns.start.copy(), columns.nbytes.copy()
        if kind == "moved":
            start[row] += by
        else:
            nbytes[row] += by if kind == "longer" else -min(by, int(nbytes[row]) - 1)
        at.columns = replace(columns, start=start, nbytes=nbytes)
    with pytest.raises(CoverageError) as caught:
        check_coverage(LAYOUT, reports)
    error = caught.value
    assert error.phase == "finish"
    assert error.path in {file.name for file in LAYOUT.files}
    text = str(error.found)
    first, last = map(int, re.findall(r"bytes (\d+) to (\d+)", text)[0])
    if " from " not in text:
        # It leaves its tensor or its file: the error names the rank.
        assert error.rank == at.rank
        return
    number = next(n for n, file in enumerate(LAYOUT.files) if file.name == error.path)
    wanted = [int(rank) for rank in re.findall(r"rank (\d+)", text)]
    owners = bytes_of(reports)[number]
    for position in range(first, last):
        assert len(owners[position]) != 1
        assert set(wanted) <= set(owners[position])
        assert ("no rank" in text) == (owners[position] == [])


def test_columns_of_a_matrix_need_no_list_of_their_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling_runs, "MOST_RUNS", 8)
    tiling_runs._fault.cache_clear()
    rows = 1 << 20
    blocks = [ByteRuns(100 + 8 * i, 8, ((rows, 32),)) for i in range(4)]
    assert tiling_runs.runs_fault(blocks, 100, 100 + 32 * rows) is None
    found = tiling_runs.runs_fault([blocks[0], blocks[1], blocks[3]], 100, 100 + 32 * rows)
    assert found == tiling_runs.RunsFault(116, 124, ())
    found = tiling_runs.runs_fault([*blocks, blocks[2]], 100, 100 + 32 * rows)
    assert found == tiling_runs.RunsFault(116, 124, (2, 4))
    tiling_runs._fault.cache_clear()


def test_blocks_with_too_many_runs_are_compared_along_dimensions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiling_runs, "MOST_RUNS", 2)
    tiling_runs._fault.cache_clear()
    corners = [((i, j), (3, 2)) for i in (0, 3) for j in (0, 2)]
    others = [WrittenBlock(k, (0,) * len(s), s, "0" * 16) for k, s in SHAPES.items() if k != "a"]
    blocks = [WrittenBlock("a", at, sizes, "0" * 16) for at, sizes in corners]
    check_coverage(LAYOUT, packed(blocks + others, 2))
    with pytest.raises(CoverageError, match="parts hold 18 elements, the tensor has 24"):
        check_coverage(LAYOUT, packed(blocks[1:] + others, 2))
    tiling_runs._fault.cache_clear()


def test_file_that_is_not_in_the_export_is_refused_with_the_rank() -> None:
    report = RankReport(3, "host", columns=columns_of([(9, ByteRuns(0, 4, ()), 0)]))
    with pytest.raises(CoverageError, match="file number 9") as caught:
        check_coverage(LAYOUT, [report])
    assert caught.value.rank == 3


def test_columns_keep_their_rows_when_joined_and_taken() -> None:
    rows = [(0, ByteRuns(8, 4, ((2, 16), (3, 5))), 7), (1, ByteRuns(9, 2, ()), 8)]
    one, two = columns_of(rows), columns_of(rows[::-1])
    both = joined([one, two])
    assert both.runs(np.array([0, 1, 2, 3])) == [r[1] for r in (*rows, *rows[::-1])]
    assert both.take(np.array([3, 1])).runs(np.array([0, 1])) == [rows[0][1], rows[1][1]]
    assert both.extents().tolist() == [16 + 10 + 4, 2, 2, 16 + 10 + 4]
