"""Write whole rows of column shards: a rank puts them together from the slabs of its host.

The ranks of a host tell each other through the store of the process group where their column shards
lie. If each of them can read the slabs of the others, each writes an equal part of the rows, in
large pieces. Otherwise all of them write their own columns, as if there were no neighbours.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from dcp_hf_writer.errors import RankLostError, StagingError
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.plan.rank_report import WrittenBlock
from dcp_hf_writer.plan.row_groups import ColumnShard, is_column_shard, row_groups, row_loops
from dcp_hf_writer.save.tensor_bytes import host_bytes
from dcp_hf_writer.staging.neighbour_slabs import NeighbourSlabs, SlabPlace
from dcp_hf_writer.staging.slab import SLABS
from dcp_hf_writer.tensors.boxes import Box
from dcp_hf_writer.tensors.dtypes import NAME_BY_TORCH, TORCH_BY_NAME
from dcp_hf_writer.tensors.strided_copies import hf_box, runtime_view

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch.distributed.checkpoint.planner import WriteItem

    from dcp_hf_writer.plan.regions import Region
    from dcp_hf_writer.plan.row_groups import RowGroup
    from dcp_hf_writer.save.bounce_buffer import BounceBuffer
    from dcp_hf_writer.save.rank_progress import Rendezvous
    from dcp_hf_writer.save.tensor_bytes import TensorSource
    from dcp_hf_writer.storage.posix_outputs import OutputFile

    Blocks = list[tuple[WriteItem, Region]]

_log = logging.getLogger(__name__)

# How long a rank waits for its neighbours before it writes its columns alone, and for the rank that
# decides. They come from the same step of the save, so they are late only if they are lost.
_WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class RowShare:
    """The rows of a group that this rank writes."""

    group: RowGroup
    steps: range
    """Steps of the outer loop of the group; not empty."""
    places: tuple[SlabPlace, ...]
    """The slab of each member of the group."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return len(self.steps) * self.group.step_nbytes


class WholeRows:
    """The column shards of one save that the ranks of a host write as whole rows."""

    def __init__(
        self,
        rendezvous: Rendezvous,
        *,
        save_id: str,
        host: int,
        host_rank: int,
        host_size: int,
        check: Callable[[], None],
    ) -> None:
        """Take part with the ranks of this host; all of them do.

        Args:
            rendezvous: Records of the ranks.
            save_id: Id of the save.
            host: Number of the host.
            host_rank: Index of this rank among the ranks of the host.
            host_size: Number of these ranks.
            check: Called while waiting; raises if the save was given up.
        """
        self._rendezvous, self._check = rendezvous, check
        self._rank, self._size = host_rank, host_size
        self._prefix = f"rows/{save_id}/{host}"

    def take(
        self, work: dict[int, Blocks], source: TensorSource, *, bounce_nbytes: int
    ) -> dict[int, list[RowShare]]:
        """Agree with the other ranks, and take out of `work` what is written as whole rows.

        Args:
            work: The blocks of this rank, by output file. Blocks in a group are removed.
            source: Resolves items to tensors.
            bounce_nbytes: Size of the bounce buffer, in bytes.

        Returns:
            What this rank writes of each output file.

        Raises:
            RankLostError: If the rank that decides does not answer.
        """
        # What this rank told in an earlier save: that save is over on all ranks.
        self._rendezvous.drop_texts()
        place, shards = self._shards_of(work, source)
        told = {
            "slab": None if place is None else asdict(place),
            "bounce_nbytes": bounce_nbytes,
            "shards": [] if place is None else [_as_json(one) for one in shards.values()],
        }
        self._put("held", told)
        held = self._collect("held", range(self._size))
        groups, places = self._groups(held)
        is_ready = len(held) == self._size and _can_read(places)
        if not self._decide(is_ready=is_ready and bool(groups)):
            return {}
        grouped = {one for group in groups for rank, one in group.members if rank == self._rank}
        for file in list(work):
            work[file] = [b for b in work[file] if shards.get(_key_of(b)) not in grouped]
            if not work[file]:
                del work[file]
        found: dict[int, list[RowShare]] = {}
        for group in groups:
            steps = group.share_of(self._rank)
            if steps:
                of_members = tuple(places[rank] for rank, _ in group.members)
                share = RowShare(group, steps, of_members)
                found.setdefault(group.first.file, []).append(share)
        return found

    def _shards_of(
        self, work: Mapping[int, Blocks], source: TensorSource
    ) -> tuple[SlabPlace | None, dict[_Key, ColumnShard]]:
        """Return this rank's slab and column shards; no slab if they do not all lie in one."""
        found: dict[_Key, ColumnShard] = {}
        slabs = set()
        for file, blocks in work.items():
            for block in blocks:
                shard, slab = _shard_of(file, *block, source)
                if shard is not None:
                    found[_key_of(block)] = shard
                    slabs.add(slab)
        slab = slabs.pop() if len(slabs) == 1 else None
        return (None, {}) if slab is None else (SlabPlace.of(slab), found)

    def _groups(
        self, held: Mapping[int, dict[str, Any]]
    ) -> tuple[list[RowGroup], dict[int, SlabPlace]]:
        with_slab = {rank: one for rank, one in held.items() if one["slab"] is not None}
        places = {rank: SlabPlace(**one["slab"]) for rank, one in with_slab.items()}
        shards = {rank: map(_from_json, one["shards"]) for rank, one in with_slab.items()}
        smallest = min(one["bounce_nbytes"] for one in held.values())
        return row_groups(shards, max_step_nbytes=smallest), places

    def _decide(self, *, is_ready: bool) -> bool:
        """Return whether all ranks of the host are ready; the same on each of them.

        One rank decides: if each judged by itself, some might wait longer for a late rank than
        others.
        """
        self._put("ready", is_ready)
        if self._rank == 0:
            ready = self._collect("ready", range(self._size))
            self._put("decided", len(ready) == self._size and all(ready.values()))
        # The first rank may have waited twice before it decides.
        decided = self._collect("decided", [0], wait_s=3 * _WAIT_S)
        if not decided:
            raise RankLostError(
                "the first rank of this host did not say how column shards are written",
                phase="write",
                expected=f"an answer within {3 * _WAIT_S:.0f} s",
                found="no answer",
                hint="look for its error in the log; restart the run if it is gone",
            )
        return bool(decided[0])

    def _put(self, what: str, value: Any) -> None:
        self._rendezvous.put(f"{self._prefix}/{what}/{self._rank}", json.dumps(value))

    def _collect(
        self, what: str, ranks: Sequence[int], *, wait_s: float = _WAIT_S
    ) -> dict[int, Any]:
        """Return what ranks of the host have put, without those that are late."""
        found: dict[int, Any] = {}
        until = time.monotonic() + wait_s
        pause = 0.0005
        while len(found) < len(ranks) and time.monotonic() < until:
            for rank in ranks:
                if rank not in found:
                    data = self._rendezvous.get(f"{self._prefix}/{what}/{rank}")
                    if data is not None:
                        found[rank] = json.loads(data)
            if len(found) < len(ranks):
                self._check()
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        return found


_Key = tuple[int, int]
"""Identity of the item and of the region of a block."""


def _key_of(block: tuple[WriteItem, Region]) -> _Key:
    return id(block[0]), id(block[1])


def _shard_of(
    file: int, item: WriteItem, region: Region, source: TensorSource
) -> tuple[ColumnShard | None, Any]:
    """Return a block as a column shard, and the slab that holds it; `None` if it is not one."""
    target, box = region.target, hf_box(region.copy)
    if box is None or region.hf_runs().count < 2:  # noqa: PLR2004 - one run is whole already
        return None, None
    tensor = source.tensor(item)
    slab = SLABS.slab_at(tensor.data_ptr()) if tensor.device.type == "cpu" else None
    if slab is None or tensor.dtype not in NAME_BY_TORCH:
        return None, None
    view = runtime_view(tensor, region.copy)
    shard = ColumnShard(
        key=target.key,
        file=file,
        start=target.start,
        dtype=target.dtype,
        shape=tuple(target.shape),
        box=box,
        held_dtype=NAME_BY_TORCH[tensor.dtype],
        offset=slab.offset_of(view.data_ptr()),
        extents=tuple(view.shape),
        strides=tuple(view.stride()),
    )
    return (shard, slab) if is_column_shard(shard) else (None, None)


def _as_json(shard: ColumnShard) -> list[Any]:
    box = shard.box
    return [*(getattr(shard, name) for name in _PLAIN), box.offsets, box.sizes]


_PLAIN = ("key", "file", "start", "dtype", "shape", "held_dtype", "offset", "extents", "strides")


def _from_json(values: Sequence[Any]) -> ColumnShard:
    *plain, offsets, sizes = (tuple(one) if isinstance(one, list) else one for one in values)
    named: dict[str, Any] = dict(zip(_PLAIN, plain, strict=True))
    return ColumnShard(box=Box(offsets, sizes), **named)


_NEIGHBOURS = NeighbourSlabs()
"""The mappings of this process: they last from save to save, like the slabs themselves."""


def _can_read(places: Mapping[int, SlabPlace]) -> bool:
    _NEIGHBOURS.keep_only(set(places.values()))
    try:
        for place in places.values():
            _NEIGHBOURS.open(place)
    except (OSError, StagingError) as error:
        _log.info("column shards are written apart: a rank's staging memory is private (%s)", error)
        return False
    return True


def write_rows(
    file: OutputFile, shares: Sequence[RowShare], bounce: BounceBuffer, check: Callable[[], None]
) -> list[WrittenBlock]:
    """Write this rank's rows of one output file.

    Args:
        file: The output file, open for writing and of its final size.
        shares: The rows.
        bounce: The bounce buffer; one step of each group fits.
        check: Called before each piece; raises if the save was given up.

    Returns:
        One reported block, with its digest, for each of `shares`.

    Raises:
        WriteError: If the file system refuses a write.
    """
    return [_write_share(file, share, bounce, check) for share in shares]


def _write_share(
    file: OutputFile, share: RowShare, bounce: BounceBuffer, check: Callable[[], None]
) -> WrittenBlock:
    group, digest = share.group, xxhash.xxh3_64()
    dtype = TORCH_BY_NAME[group.first.dtype]
    views = [
        _NEIGHBOURS.view(
            place,
            offset=one.offset,
            dtype=TORCH_BY_NAME[one.held_dtype],
            extents=one.extents,
            strides=one.strides,
        )
        for place, (_, one) in zip(share.places, group.members, strict=True)
    ]
    at_once = max(1, bounce.nbytes // group.step_nbytes)
    for begin in range(share.steps.start, share.steps.stop, at_once):
        check()
        reach("mid hf")
        steps = range(begin, min(begin + at_once, share.steps.stop))
        rows = bounce.take(dtype, (len(steps) * group.rows_per_step, group.row_numel))
        for (_, one), view in zip(group.members, views, strict=True):
            _columns_of(rows, one, group, len(steps)).copy_(view[steps.start : steps.stop])
        data = host_bytes(rows)
        digest.update(data)
        file.write(data, group.start_of(steps.start))
    box = group.box_of(share.steps)
    return WrittenBlock(group.first.key, box.offsets, box.sizes, str(digest.hexdigest()))


def _columns_of(
    rows: torch.Tensor, shard: ColumnShard, group: RowGroup, steps: int
) -> torch.Tensor:
    """Return the columns of a shard in some whole rows, with the dimensions of its view."""
    first, count = shard.columns
    columns = rows[:, first : first + count]
    outer = row_loops(shard, group.steps * group.rows_per_step)
    assert outer is not None
    inner = shard.extents[outer:]
    # A single column has no loop of its own.
    columns = columns.unflatten(1, inner) if inner else columns.squeeze(1)
    return columns.unflatten(0, (steps, *shard.extents[1:outer])) if outer > 1 else columns
