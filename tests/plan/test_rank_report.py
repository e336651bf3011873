"""Coverage: what ranks report must tile every output file."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer import HFExport, LoadSpec
from dcp_hf_writer.errors import CoverageError, ExportError
from dcp_hf_writer.plan.assign_hf_keys import RuntimeTensor
from dcp_hf_writer.plan.coverage import check_coverage
from dcp_hf_writer.plan.layout import plan_layout
from dcp_hf_writer.plan.rank_report import DCPFile, RankReport
from dcp_hf_writer.plan.written_block import WrittenBlock
from dcp_hf_writer.tensors.boxes import Box, whole
from support.partitions import partitions_of

if TYPE_CHECKING:
    from dcp_hf_writer.plan.layout import Layout

SHAPE = (6, 4)


def layout_of(*names: str) -> Layout:
    tensors = [RuntimeTensor(name, name, SHAPE, torch.float32, (whole(SHAPE),)) for name in names]
    specs = [LoadSpec("qkv", ["q", "k", "v"], SHAPE)] if "qkv" in names else []
    return plan_layout(tensors, HFExport(specs=specs), tied=())


def block(key: str, box: Box) -> WrittenBlock:
    return WrittenBlock(key, box.offsets, box.sizes, "0" * 16)


def reports_of(blocks: list[WrittenBlock], ranks: int = 2) -> list[RankReport]:
    return [RankReport(rank, "host", blocks=blocks[rank::ranks]) for rank in range(ranks)]


@settings(deadline=None)
@given(st.data())
def test_blocks_of_any_partition_are_accepted(data: st.DataObject) -> None:
    blocks = [
        block(key, box)
        for key in ("a", "b")
        for box in data.draw(partitions_of(whole(SHAPE)))
        if box.numel
    ]
    check_coverage(layout_of("a", "b"), reports_of(data.draw(st.permutations(blocks))))


@settings(deadline=None)
@given(st.data())
def test_tensor_and_file_are_named_when_a_block_is_missing_or_reported_twice(
    data: st.DataObject,
) -> None:
    boxes = [box for box in data.draw(partitions_of(whole(SHAPE))) if box.numel]
    blocks = [block("a", whole(SHAPE)), *(block("b", box) for box in boxes)]
    at = data.draw(st.integers(1, len(blocks) - 1))
    is_missing = data.draw(st.booleans())
    blocks[at : at + 1] = [] if is_missing else [blocks[at]] * 2
    with pytest.raises(CoverageError, match="each of 96 bytes once") as caught:
        check_coverage(layout_of("a", "b"), reports_of(blocks))
    error = caught.value
    assert (error.key, error.path, error.phase) == ("b", "model.safetensors", "finish")


def test_block_is_refused_when_it_leaves_its_tensor() -> None:
    with pytest.raises(CoverageError, match="reaches outside the tensor"):
        check_coverage(layout_of("a"), reports_of([block("a", Box((1, 0), SHAPE))]))


def test_tensor_that_nobody_wrote_is_named() -> None:
    with pytest.raises(CoverageError, match="bytes 256 to 352 from no rank") as caught:
        check_coverage(layout_of("a", "b"), reports_of([block("a", whole(SHAPE))]))
    assert caught.value.key == "b"


def test_report_of_a_tensor_that_is_not_in_the_export_is_refused() -> None:
    blocks = [block("a", whole(SHAPE)), block("stray", whole(SHAPE))]
    with pytest.raises(CoverageError, match="'stray'"):
        check_coverage(layout_of("a"), reports_of(blocks))


def test_parts_of_a_fused_tensor_are_covered_one_by_one() -> None:
    blocks = [block(key, whole((2, 4))) for key in "qkv"]
    check_coverage(layout_of("qkv"), reports_of(blocks))
    with pytest.raises(CoverageError, match="'k'"):
        check_coverage(layout_of("qkv"), reports_of([blocks[0], blocks[2]]))


def test_report_survives_the_way_to_the_coordinator() -> None:
    report = RankReport(
        3,
        "host",
        blocks=[block("a", whole(SHAPE))],
        dcp_files=[DCPFile("__3_0.distcp", 10, ((0, 4, "ab"),), "cd")],
        seconds={"write hf": 0.5},
        nbytes={"dcp": 10, "hf": 96},
    )
    assert pickle.loads(pickle.dumps(report)) == report
    report.export_error = ExportError("it broke", rank=3)
    assert str(pickle.loads(pickle.dumps(report)).export_error) == "rank 3: it broke"
