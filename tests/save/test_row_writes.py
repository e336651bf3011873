"""Rows that are put together from several slabs: the bytes are those of ranks that write apart."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer.errors import SaveAbortedError
from dcp_hf_writer.plan.layout import PartTarget
from dcp_hf_writer.plan.regions import chunk_regions
from dcp_hf_writer.save.bounce_buffer import BounceBuffer
from dcp_hf_writer.save.hf_half import BlockWriter
from dcp_hf_writer.save.row_writes import write_rows
from dcp_hf_writer.save.tensor_bytes import digest_of
from dcp_hf_writer.save.whole_rows import divide, held_columns, row_parts
from dcp_hf_writer.staging.neighbour_slabs import NeighbourSlabs
from dcp_hf_writer.staging.slab import Slab
from dcp_hf_writer.storage.posix_outputs import OutputFile
from dcp_hf_writer.tensors.boxes import Box, tiling_fault
from dcp_hf_writer.tensors.dtypes import NAME_BY_TORCH, TORCH_BY_NAME
from dcp_hf_writer.tensors.strided_copies import copies_of, strides_of
from support.partitions import partitions_of

if TYPE_CHECKING:
    from pathlib import Path

    from dcp_hf_writer.plan.written_block import WrittenBlock

FEW = settings(max_examples=25, deadline=None)
START = 24  # of the tensor in its file
FLOATS = [torch.float32, torch.bfloat16, torch.float64]


def is_solid(extent: Any) -> bool:
    """Whether a block has sizes instead of loops."""
    return not (extent and isinstance(extent[0], tuple))


@dataclass
class Case:
    """A tensor, its parts on some ranks, and how the file stores it."""

    whole: torch.Tensor
    target: PartTarget
    chunks: list[Box]
    ranks: list[int]
    """Rank of each chunk."""

    @property
    def nbytes(self) -> int:
        return START + self.whole.numel() * TORCH_BY_NAME[self.target.dtype].itemsize


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=4)))
    held, on_disk = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    numel = torch.Size(shape).numel()
    whole = torch.arange(1, numel + 1, dtype=torch.float64).reshape(shape).to(held)
    # The file stores the dimensions in another order now and then.
    order = draw(st.sampled_from([tuple(range(len(shape))), *_orders(len(shape))]))
    hf_shape, strides = tuple(shape[d] for d in order), strides_of(shape)
    hf_strides = strides_of(hf_shape)
    loops = [(shape[d], hf_strides[i], strides[d]) for i, d in enumerate(order)]
    copies = copies_of(loops, hf_start=0, start=0, hf_shape=hf_shape, shape=shape)
    target = PartTarget("w", 0, START, NAME_BY_TORCH[on_disk], hf_shape, copies)
    chunks = [one for one in draw(partitions_of(Box((0,) * len(shape), shape))) if one.numel]
    ranks = [draw(st.integers(0, 3)) for _ in chunks]
    return Case(whole, target, chunks, ranks)


def _orders(ndim: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(ndim)))


class Local:
    """The tensors of one rank, each in its slab."""

    def __init__(self, case: Case, rank: int) -> None:
        self.slab = Slab(1 << 16)
        self.tensors: dict[int, torch.Tensor] = {}
        self.work: dict[int, list[Any]] = {}
        at = 64
        for number, (chunk, owner) in enumerate(zip(case.chunks, case.ranks, strict=True)):
            if owner != rank:
                continue
            index = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            local = self.slab.tensor(at, case.whole.dtype, chunk.sizes)
            local.copy_(case.whole[index])
            at += -(-local.nbytes // 64) * 64
            self.tensors[number] = local
            for region in chunk_regions(chunk, [case.target]):
                self.work.setdefault(0, []).append((number, region))

    def tensor(self, item: Any) -> torch.Tensor:
        return self.tensors[item]

    def digest(self, item: Any, data: memoryview) -> str:  # noqa: ARG002 - of the protocol
        return digest_of(data)

    def slab_at(self, address: int) -> Slab | None:
        return self.slab if self.slab.holds(address) else None


def ranks_of(case: Case) -> list[Local]:
    return [Local(case, rank) for rank in range(4)]


def write_apart(path: Path, case: Case) -> bytes:
    path.write_bytes(bytes(case.nbytes))
    with OutputFile(str(path), create=False) as file:
        for rank in ranks_of(case):
            blocks = rank.work.get(0, ())
            BlockWriter().write_file(file, blocks, rank, check=nothing, bounce_nbytes=64)
    return path.read_bytes()


def nothing() -> None:
    """Check nothing."""


def write_together(
    path: Path, case: Case, *, bounce_nbytes: int
) -> tuple[bytes, list[WrittenBlock], int]:
    """Write as the ranks of a host do; return the file, all reports, and the blocks left over."""
    path.write_bytes(bytes(case.nbytes))
    ranks = ranks_of(case)
    found = [held_columns(one.work, one, bounce_nbytes, slab_at=one.slab_at) for one in ranks]
    held = [type(columns).from_json(columns.to_json()) for columns, _ in found]
    bounce, written, left = BounceBuffer(), [], 0
    bounce.resize(bounce_nbytes)
    with OutputFile(str(path), create=False) as file, NeighbourSlabs() as slabs:
        for me, rank in enumerate(ranks):
            parts = row_parts(held, me)
            slabs.open({place for part in parts for place in part.places})
            shares = divide(rank.work, found[me][1], parts, me)
            blocks = rank.work.get(0, ())
            left += sum(region.hf_runs().count > 1 for _, region in blocks)
            written += BlockWriter().write_file(
                file, blocks, rank, check=nothing, bounce_nbytes=bounce_nbytes
            )
            written += write_rows(file, shares.get(0, ()), slabs, bounce, nothing)
    return path.read_bytes(), written, left


@FEW
@given(cases(), st.sampled_from([8, 40, 1 << 20]))
def test_bytes_are_those_of_ranks_that_write_apart(
    tmp_path_factory: pytest.TempPathFactory, case: Case, bounce_nbytes: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "file"
    found, written, _ = write_together(path, case, bounce_nbytes=bounce_nbytes)
    assert found == write_apart(path, case)
    solid = [one for one in written if is_solid(one.extent)]
    if len(solid) == len(written):
        boxes = [Box(one.offsets, one.extent) for one in solid]
        assert tiling_fault(boxes, case.target.shape) is None
    data = bytearray(found[START:])
    stored = torch.frombuffer(data, dtype=TORCH_BY_NAME[case.target.dtype])
    for one in solid:
        index = tuple(slice(o, o + n) for o, n in zip(one.offsets, one.extent, strict=True))
        box = stored.reshape(case.target.shape)[index].contiguous()
        digest = xxhash.xxh3_64_hexdigest(box.reshape(-1).view(torch.uint8).numpy().data)
        assert one.digest == digest


def two_ranks(shape: tuple[int, ...], dim: int, *, dtype: str = "F32") -> Case:
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    loops = [(n, s, s) for n, s in zip(shape, strides_of(shape), strict=True)]
    copies = copies_of(loops, hf_start=0, start=0, hf_shape=shape, shape=shape)
    half = shape[dim] // 2
    edges = [(0, half), (half, shape[dim])]
    chunks = [
        Box(
            tuple(a if d == dim else 0 for d in range(len(shape))),
            tuple(b - a if d == dim else n for d, n in enumerate(shape)),
        )
        for a, b in edges
    ]
    return Case(whole, PartTarget("w", 0, START, dtype, shape, copies), chunks, [0, 1])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("shape", "dim"), [((12, 10), 1), ((3, 5, 7), 2), ((3, 4, 6), 1), ((9, 3), 1)], ids=str
)
def test_no_run_is_left_when_the_ranks_hold_all_columns(
    tmp_path: Path, shape: tuple[int, ...], dim: int, dtype: str
) -> None:
    case = two_ranks(shape, dim, dtype=dtype)
    found, written, left = write_together(tmp_path / "file", case, bounce_nbytes=1 << 20)
    assert (left, found) == (0, write_apart(tmp_path / "file", case))
    # Each rank writes half of the rows: more blocks than two only if it cuts an outer index.
    assert 2 <= len(written) <= 4


def test_slab_that_was_given_to_another_save_fails_the_write(tmp_path: Path) -> None:
    case = two_ranks((12, 10), 1)
    ranks = ranks_of(case)
    found = [held_columns(one.work, one, 1 << 20, slab_at=one.slab_at) for one in ranks]
    parts = row_parts([columns for columns, _ in found], 0)
    shares = divide(ranks[0].work, found[0][1], parts, 0)
    path = tmp_path / "file"
    path.write_bytes(bytes(case.nbytes))
    with OutputFile(str(path), create=False) as file, NeighbourSlabs() as slabs:
        slabs.open(parts[0].places)
        write_rows(file, shares[0], slabs, BounceBuffer(), nothing)
        ranks[1].slab.begin_turn()
        with pytest.raises(SaveAbortedError, match="filled for save 1"):
            write_rows(file, shares[0], slabs, BounceBuffer(), nothing)
