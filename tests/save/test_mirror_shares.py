"""Which rank uploads which file of a mirror."""

from __future__ import annotations

import pytest

from dcp_hf_writer.save.mirror_shares import shares_of


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_hold_each_file_once(world_size: int) -> None:
    sizes = {f"hf/model-{i}.safetensors": i for i in range(9)} | {
        f"__{rank}_0.distcp": 10 for rank in range(4)
    }
    shares = shares_of(sizes, world_size)
    assert len(shares) == world_size
    assert sorted(name for share in shares for name in share) == sorted(sizes)


def test_share_of_a_rank_holds_its_own_dcp_files() -> None:
    sizes = {f"__{rank}_0.distcp": 1 + rank for rank in range(3)}
    assert shares_of(sizes, 3) == [["__0_0.distcp"], ["__1_0.distcp"], ["__2_0.distcp"]]


def test_shares_are_balanced_when_the_dcp_files_are_not() -> None:
    sizes = {"__0_0.distcp": 100, "__1_0.distcp": 10, "a": 60, "b": 50, "c": 20}
    shares = shares_of(sizes, 2)
    assert [sum(sizes[name] for name in share) for share in shares] == [120, 120]
    assert shares == shares_of(dict(reversed(sizes.items())), 2)
