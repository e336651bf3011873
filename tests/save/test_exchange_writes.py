"""An exchange into sinks as object stores have them: in order, with writes in flight."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dcp_hf_writer.errors import CoverageError, WriteError
from dcp_hf_writer.plan.layout import PartTarget
from dcp_hf_writer.save.exchange_group import ExchangeGroup
from dcp_hf_writer.save.exchange_writes import Exchanged, ExchangedFile, ExchangedWrites
from dcp_hf_writer.save.hf_half import regions_by_file
from dcp_hf_writer.save.tensor_bytes import digest_of
from dcp_hf_writer.tensors.boxes import Box, whole
from dcp_hf_writer.tensors.strided_copies import copy_of_box
from support.ranks import run_ranks

HEADER = bytes(range(1, 97))
SHAPES = ((64, 48), (50, 33), (7,))
FILES = 3
BUDGET = 1 << 20


class Deadline:
    """Stands for the attempt of a save that has time."""

    def __init__(self) -> None:
        self.context = self

    def left_s(self) -> float:
        return 60.0


class Tensors:
    """Resolves items to tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def tensor(self, item: WriteItem) -> torch.Tensor:
        return self._tensors[item.index.fqn]

    def digest(self, item: WriteItem, data: memoryview) -> str:  # noqa: ARG002 - the protocol's
        return digest_of(data)


class SlowSink:
    """Takes cells, writes them in other threads, and keeps the order in which they came."""

    def __init__(self) -> None:
        self.cells: list[tuple[int, int]] = []
        self.found: dict[tuple[int, int], bytes] = {}
        self._pool = ThreadPoolExecutor(4)

    def put(self, file: int, cell: int, data: memoryview) -> Future[None]:
        self.cells.append((file, cell))
        return self._pool.submit(self._write, file, cell, data)

    def _write(self, file: int, cell: int, data: memoryview) -> None:
        time.sleep(0.005)  # the bytes must stay as they are meanwhile
        self.found[file, cell] = bytes(data)


class BrokenSink(SlowSink):
    """Fails at a cell."""

    def _write(self, file: int, cell: int, data: memoryview) -> None:  # noqa: ARG002 - it fails
        if len(self.cells) > 1:
            raise WriteError("the store refuses a part", path=f"file {file}")


def tensor_of(file: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * file + number)
    return torch.randn(SHAPES[number], generator=generator)


def content_of(file: int) -> bytes:
    parts = [tensor_of(file, number).to(torch.bfloat16) for number in range(len(SHAPES))]
    return HEADER + b"".join(
        bytes(one.contiguous().view(torch.uint8).numpy().data) for one in parts
    )


def part_of(shape: tuple[int, ...], rank: int, world_size: int, dim: int) -> Box:
    """Return the rows, or for `dim` 1 the columns, that a rank holds; the last takes the rest."""
    dim = min(dim, len(shape) - 1)
    first = shape[dim] // world_size * rank
    size = shape[dim] - first if rank == world_size - 1 else shape[dim] // world_size
    offsets = tuple(first if d == dim else 0 for d in range(len(shape)))
    return Box(offsets, tuple(size if d == dim else n for d, n in enumerate(shape)))


def work_of(rank: int, world_size: int, *, dim: int) -> tuple[dict[int, Any], Tensors]:
    """Return this rank's part of three files of float32 tensors that become bfloat16."""
    items, targets, tensors = [], {}, {}
    for file in range(FILES):
        start = len(HEADER)
        for number, shape in enumerate(SHAPES):
            fqn, box = f"{file}.{number}", part_of(shape, rank, world_size, dim)
            copies = (copy_of_box(whole(shape)),)
            targets[fqn] = [PartTarget(fqn, file, start, "BF16", shape, copies)]
            index = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            tensors[fqn] = tensor_of(file, number)[index].contiguous()
            chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(shape))
            kind = WriteItemType.SHARD
            items.append(WriteItem(MetadataIndex(fqn, chunk.offsets), kind, tensor_data=data))
            start += 2 * tensor_of(file, number).numel()
    return regions_by_file(items, targets), Tensors(tensors)


def group_of(rank: int, world_size: int) -> ExchangeGroup:
    store = dist.distributed_c10d._get_default_store()
    gloo = dist.ProcessGroupGloo(
        dist.PrefixStore("test", store), rank, world_size, timedelta(seconds=30)
    )
    return ExchangeGroup(gloo, Deadline())  # type: ignore[arg-type]


def exchange(
    rank: int,
    world_size: int,
    sink: SlowSink,
    *,
    dim: int,
    cell: int,
    in_order: bool,
    lost: int = 0,
) -> Exchanged:
    files = [
        ExchangedFile(f"file {number}", len(content_of(number)), cell, in_order)
        for number in range(FILES)
    ]
    work, source = work_of(rank, world_size, dim=dim)
    for of_file in list(work.values())[:1]:
        del of_file[:lost]
    group = group_of(rank, world_size) if world_size > 1 else None
    return ExchangedWrites(group, files).run(
        work,
        source,
        headers=dict.fromkeys(range(FILES), HEADER) if rank == 0 else {},
        sink=sink,
        check=lambda: None,
        host_budget_bytes=BUDGET,
    )


def exchange_all(rank: int, world_size: int, options: dict[str, Any]) -> Any:
    sink = SlowSink()
    done = exchange(rank, world_size, sink, **options)
    digests = sorted((one.key, one.offsets, one.digest) for one in done.blocks)
    told = (done.error, done.sent_nbytes, done.received_nbytes)
    return sink.cells, sink.found, digests, told


@pytest.mark.parametrize("order", ["any order", "in order"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("cell", [700, 1 << 18])
def test_sinks_of_all_ranks_get_each_cell_once_and_in_order(
    cell: int, dim: int, order: str
) -> None:
    in_order = order == "in order"
    options = {"dim": dim, "cell": cell, "in_order": in_order}
    ranks = [
        exchange_all(0, 1, options),
        *run_ranks(exchange_all, 3, options),
    ]
    for some in ([ranks[0]], ranks[1:]):
        found: dict[tuple[int, int], bytes] = {}
        for cells, of_rank, _, (error, _, _) in some:
            assert error is None
            assert not found.keys() & of_rank.keys()
            found |= of_rank
            for file in range(FILES):
                of_file = [number for one, number in cells if one == file]
                assert of_file == sorted(of_file)
                assert not in_order or not of_file or of_file[-1] == len(of_file) - 1
        for file in range(FILES):
            numbers = sorted(number for one, number in found if one == file)
            assert b"".join(found[file, number] for number in numbers) == content_of(file)
        assert sum(sent for *_, (_, sent, _) in some) == sum(got for *_, (_, _, got) in some)
    assert ranks[0][3][1] == 0


def exchange_badly(rank: int, world_size: int, where: str) -> Any:
    sink = BrokenSink() if (rank, where) == (1, "sink") else SlowSink()
    lost = 1 if (rank, where) == (1, "lost block") else 0
    done = exchange(rank, world_size, sink, dim=0, cell=700, in_order=False, lost=lost)
    return done.error, len(done.blocks), len(sink.found)


def test_other_ranks_finish_when_the_sink_of_one_fails() -> None:
    (first, *_), (broken, blocks, _), (third, *_) = run_ranks(exchange_badly, 3, "sink")
    assert first is third is None
    assert isinstance(broken, WriteError)
    assert blocks == 0


def test_no_rank_writes_when_a_byte_is_missing() -> None:
    for error, _, cells in run_ranks(exchange_badly, 3, "lost block"):
        assert isinstance(error, CoverageError)
        assert error.path == "file 0"
        assert cells == 0
