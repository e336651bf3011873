"""Column shards of a host's ranks, written as whole rows: which rank writes which.

The ranks of a host tell each other where their column shards lie in staging memory. If each of them
can read the memory of the others, each writes an equal part of the rows, in large pieces. Otherwise
all of them write their own columns, as if there were no neighbours.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.plan.row_groups import ColumnShard, column_shard, row_groups
from dcp_hf_writer.staging.neighbour_slabs import SlabPlace
from dcp_hf_writer.staging.shared_table import TablePlace, read_table, shared_table
from dcp_hf_writer.staging.slab import SLABS
from dcp_hf_writer.tensors.dtypes import NAME_BY_TORCH
from dcp_hf_writer.tensors.strided_copies import runtime_view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.plan.layout import PartTarget
    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.plan.row_groups import RowGroup
    from dcp_hf_writer.save.hf_half import ItemTensors
    from dcp_hf_writer.save.host_meeting import HostMeeting
    from dcp_hf_writer.save.tensor_bytes import TensorSource
    from dcp_hf_writer.staging.neighbour_slabs import NeighbourSlabs
    from dcp_hf_writer.staging.slab import Slab

    Blocks = list[tuple[WriteItem, Region]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RowPart:
    """The part of a group that one of its members writes."""

    group: RowGroup
    units: range
    """Units of the group; may be empty."""
    places: tuple[SlabPlace, ...]
    """The slab of each member of the group."""


@dataclass(frozen=True, slots=True)
class RowShare:
    """Rows of an output file that this rank writes."""

    part: RowPart
    """The rows; not empty."""
    target: PartTarget
    """The tensor on disk."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return len(self.part.units) * self.part.group.unit_nbytes

    @property
    def most_blocks(self) -> int:
        """Most boxes that the rows consist of: two for each dimension that is cut, and a middle."""
        return 2 * len(self.target.shape)

    @property
    def most_loops(self) -> int:
        """Most loops of these boxes together."""
        return self.most_blocks * len(self.target.shape)


@dataclass(frozen=True, slots=True)
class HeldColumns:
    """The column shards that a rank holds in its slab."""

    place: SlabPlace | None
    """The slab; `None` if the rank has none, so that nobody else can read its shards."""
    shards: tuple[ColumnShard, ...]
    bounce_nbytes: int
    """Size of the rank's bounce buffer, in bytes."""

    def to_json(self) -> Any:
        """Return the columns as plain values."""
        place = None if self.place is None else asdict(self.place)
        return [place, [astuple(one) for one in self.shards], self.bounce_nbytes]

    @classmethod
    def from_json(cls, value: Any) -> HeldColumns:
        """Read what `to_json` made."""
        place, shards, bounce_nbytes = value
        return cls(
            None if place is None else SlabPlace(**place),
            tuple(_shard_from_json(one) for one in shards),
            bounce_nbytes,
        )


def _shard_from_json(values: Sequence[Any]) -> ColumnShard:
    plain: Any = (tuple(one) if isinstance(one, list) else one for one in values)
    return ColumnShard(*plain)


def nbytes_of_shares(of_files: Iterable[Sequence[RowShare]]) -> int:
    """Return the size of some rows in their output files."""
    return sum(share.nbytes for shares in of_files for share in shares)


def take_rows(
    meeting: HostMeeting,
    slabs: NeighbourSlabs,
    work: dict[int, Blocks],
    source: TensorSource,
    *,
    bounce_nbytes: int,
) -> dict[int, list[RowShare]]:
    """Agree with the other ranks of the host who writes which rows; all of them call it.

    Args:
        meeting: The meeting of these ranks.
        slabs: Gets the slabs of the ranks whose columns this rank will read.
        work: The blocks of this rank, by output file. Those that are written as rows are removed.
        source: Resolves items to tensors.
        bounce_nbytes: Size of the bounce buffer, in bytes.

    Returns:
        What this rank writes of each output file.

    Raises:
        RankLostError: If a rank of the host is gone, or does not answer by the deadline.
        SaveAbortedError: If a rank of the host gave the save up.
    """
    me = meeting.me
    mine, blocks = held_columns(work, source, bounce_nbytes, slab_at=SLABS.slab_at)
    with shared_table(json.dumps(mine.to_json()).encode()) as table:
        told = meeting.gather("told", None if table is None else asdict(table))
        parts, why = _readable_parts(told, slabs, mine, me)
        refused = [one for one in meeting.gather("ready", why) if one is not None]
    if refused:
        _log.info("column shards are written apart: %s", refused[0])
        return {}
    return divide(work, blocks, parts, me)


def _readable_parts(
    told: Sequence[Any], slabs: NeighbourSlabs, mine: HeldColumns, me: int
) -> tuple[list[RowPart], str | None]:
    """Return this rank's part of each group that it is in, and why it cannot read one."""
    if None in told:
        return [], "a rank could not make a memory file"
    try:
        held = [
            mine if rank == me else HeldColumns.from_json(json.loads(read_table(TablePlace(**one))))
            for rank, one in enumerate(told)
        ]
        parts = row_parts(held, me)
        slabs.open({place for part in parts if part.units for place in part.places})
    except OSError as error:
        return [], f"a rank cannot read the staging memory of another one ({error})"
    return parts, None


def row_parts(held: Sequence[HeldColumns], me: int) -> list[RowPart]:
    """Return a rank's part of each group that it is a member of; every rank finds the same groups.

    Args:
        held: What each rank of the host holds.
        me: Index of the rank.
    """
    places = {rank: one.place for rank, one in enumerate(held) if one.place is not None}
    groups = row_groups(
        {rank: held[rank].shards for rank in places},
        max_unit_nbytes=min(one.bounce_nbytes for one in held),
    )
    return [
        RowPart(
            group,
            group.share_of(me, turn=turn),
            tuple(places[rank] for rank, _ in group.members),
        )
        for turn, group in enumerate(groups)
        if me in group.ranks
    ]


def divide(
    work: dict[int, Blocks],
    blocks: Mapping[ColumnShard, tuple[WriteItem, Region]],
    parts: Sequence[RowPart],
    me: int,
) -> dict[int, list[RowShare]]:
    """Take the blocks that are written as rows out of `work`, and return what replaces them.

    Args:
        work: The blocks of this rank, by output file.
        blocks: The block of each of its column shards.
        parts: Its part of each group that it is a member of.
        me: Index of this rank among the ranks of the host.
    """
    found: dict[int, list[RowShare]] = {}
    taken: set[int] = set()
    for part in parts:
        own = [blocks[shard][1] for rank, shard in part.group.members if rank == me]
        taken.update(map(id, own))
        if part.units:
            share = RowShare(part, own[0].target)
            found.setdefault(part.group.first.file, []).append(share)
    for file in list(work):
        work[file] = [block for block in work[file] if id(block[1]) not in taken]
        if not work[file]:
            del work[file]
    return found


def held_columns(
    work: Mapping[int, Blocks],
    source: ItemTensors,
    bounce_nbytes: int,
    *,
    slab_at: Callable[[int], Slab | None],
) -> tuple[HeldColumns, dict[ColumnShard, tuple[WriteItem, Region]]]:
    """Return the column shards of this rank that lie in its slab, and the block of each.

    Args:
        work: The blocks of this rank, by output file.
        source: Resolves items to tensors.
        bounce_nbytes: Size of the rank's bounce buffer, in bytes.
        slab_at: Returns the slab that holds an address.
    """
    blocks: dict[ColumnShard, tuple[WriteItem, Region]] = {}
    slab: Slab | None = None
    for file, of_file in work.items():
        for block in of_file:
            found = _shard_of(file, *block, source, slab_at)
            if found is not None and (slab is None or found[1] is slab):
                blocks[found[0]], slab = block, found[1]
    place = None if slab is None else SlabPlace.of(slab)
    return HeldColumns(place, tuple(blocks), bounce_nbytes), blocks


def _shard_of(
    file: int,
    item: WriteItem,
    region: Region,
    source: ItemTensors,
    slab_at: Callable[[int], Slab | None],
) -> tuple[ColumnShard, Slab] | None:
    """Return a block as a column shard, and the slab that holds it; `None` if it is not one."""
    runs = region.hf_runs()
    if len(runs.loops) != 1:
        return None
    tensor = source.tensor(item)
    slab = slab_at(tensor.data_ptr()) if tensor.device.type == "cpu" else None
    if slab is None or tensor.dtype not in NAME_BY_TORCH:
        return None
    view = runtime_view(tensor, region.copy)
    shard = column_shard(
        runs,
        key=region.target.key,
        file=file,
        dtype=region.target.dtype,
        held_dtype=NAME_BY_TORCH[tensor.dtype],
        offset=slab.offset_of(view.data_ptr()),
        extents=tuple(view.shape),
        strides=tuple(view.stride()),
    )
    return None if shard is None else (shard, slab)
