"""Which rank uploads which file of a mirror. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.formats.names_on_disk import rank_of_dcp_file

if TYPE_CHECKING:
    from collections.abc import Mapping


def shares_of(sizes: Mapping[str, int], world_size: int) -> list[list[str]]:
    """Divide the files of a checkpoint among the ranks.

    A rank gets the DCP files that it wrote itself: its host may still have them in memory. Each
    other file, the largest first, goes to the rank with the fewest bytes so far.

    Args:
        sizes: Size of each file in bytes, by path within the checkpoint.
        world_size: Number of ranks.

    Returns:
        The files of each rank. Each file is in one share; the same on every rank.
    """
    shares: list[list[str]] = [[] for _ in range(world_size)]
    nbytes = [0] * world_size
    for name in sorted(
        sizes, key=lambda name: (rank_of_dcp_file(name) is None, -sizes[name], name)
    ):
        own = rank_of_dcp_file(name)
        is_of_rank = own is not None and own < world_size
        rank = own if is_of_rank and own is not None else nbytes.index(min(nbytes))
        shares[rank].append(name)
        nbytes[rank] += sizes[name]
    return shares
