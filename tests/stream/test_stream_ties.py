"""What is tied is the same to a save and to a stream of the same tensors."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import (
    HFDualWriter,
    HFExport,
    HFSavePlanner,
    LoadSpec,
    ShardSpec,
    iter_hf_buckets,
)
from support.ranks import run_ranks
from support.stock_readers import load_hf

if TYPE_CHECKING:
    from pathlib import Path

# With one row, one of two ranks holds all of a tensor and the other one nothing.
SHAPE = (1, 4)

CASES: dict[str, dict[str, Any]] = {
    "found": {},
    "alias": {"alias_of": "c"},
    "given": {"tied": {"d": "c"}},
    "none": {"tied": {}},
}
KEPT = {"found": {"a"}, "alias": {"c"}, "given": {"a", "b", "c"}, "none": {"a", "b", "c", "d"}}


def export_of(holder: int, *, tied: Any = None, alias_of: str | None = None) -> HFExport:
    """Return an export in which the one row of `a` is on rank `holder`, that of `b` on the other.

    Args:
        holder: Index of the part of `a` that this rank holds: 0 has the row.
        tied: As of `HFExport`.
        alias_of: Of the spec of `d`.
    """
    cuts = {"a": ShardSpec(0, holder, 2), "b": ShardSpec(0, 1 - holder, 2)}
    specs = [LoadSpec(name, name, SHAPE, shards=[cut]) for name, cut in cuts.items()]
    return HFExport(specs=[*specs, LoadSpec("d", "d", SHAPE, alias_of=alias_of)], tied=tied)


def save_and_stream(
    rank: int, world_size: int, root: Path
) -> dict[tuple[str, int], tuple[set[str], set[str]]]:
    """Save and stream four names of one tensor; no rank sees that all four share their memory."""
    tensor, nothing = torch.arange(4.0).reshape(SHAPE), torch.empty(0, 4)
    found = {}
    for case, holder in itertools.product(CASES, (0, 1)):
        index = (rank + holder) % 2
        first, second = (nothing, tensor) if index else (tensor, nothing)
        state = {"model": {"a": first, "b": second, "c": tensor, "d": tensor}}
        export, where = export_of(index, **CASES[case]), root / f"{case}-{holder}"
        planner = HFSavePlanner(export.spec_by_fqn)
        writer = HFDualWriter(where, export=export)
        dcp.async_save(state, storage_writer=writer, planner=planner).result()
        buckets = iter_hf_buckets(state, export, bucket_bytes="1MB")
        streamed = [key for bucket in buckets for key, _ in bucket]
        assert len(streamed) == len(set(streamed))
        found[case, holder] = (set(load_hf(where / "hf")), set(streamed))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_ranks(save_and_stream, 2, tmp_path_factory.mktemp("ties"))


@pytest.mark.parametrize("holder", [0, 1], ids=["first on rank 0", "first on rank 1"])
@pytest.mark.parametrize("case", CASES)
def test_save_and_stream_have_the_same_names_when_no_rank_sees_the_whole_tie(
    results: list[dict[Any, Any]], case: str, holder: int
) -> None:
    for found in results:
        saved, streamed = found[case, holder]
        assert (saved, streamed) == (KEPT[case], KEPT[case])
