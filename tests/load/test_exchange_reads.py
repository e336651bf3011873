"""With an exchange each byte is read by one rank, and arrives at all that want it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dcp_hf_writer import HFDualReader, HFDualWriter
from dcp_hf_writer.errors import ConfigError, ReadError
from dcp_hf_writer.load import plan_exchange
from dcp_hf_writer.load.plan_exchange import Segment, rounds, shared_segments
from dcp_hf_writer.storage.local_inputs import _LocalFile
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {"embed": (1000, 64), "w": (256, 512), "b": (2512,), "scale": (), "odd": (77, 33)}


def model() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "x"
    dcp.save({"model": model()}, storage_writer=HFDualWriter(path))
    return path


class Counted:
    """Counts the bytes of tensors that this process reads; fails where it is told to."""

    nbytes = 0
    fails = False

    @classmethod
    def install(cls) -> None:
        read = _LocalFile.read_into

        def counting(self: Any, buffers: Any, start: int) -> None:
            if cls.fails and sum(buffer.nbytes for buffer in buffers) > 4096:
                raise ReadError("the device is gone", phase="read", path=self.path)
            # Headers, metadata and what surrounds an archive are read by every rank.
            nbytes = sum(buffer.nbytes for buffer in buffers)
            cls.nbytes += nbytes if nbytes > 2048 else 0
            read(self, buffers, start)

        _LocalFile.read_into = counting  # type: ignore[method-assign]


def placed(placements: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2))
    return {
        name: distribute_tensor(
            torch.zeros(shape, dtype=dtype),
            mesh,
            placements if len(shape) > 1 else [Replicate()] * 2,
        )
        for name, shape in SHAPES.items()
    }


def load_exchanged(rank: int, world_size: int, path: Path) -> dict[str, tuple[list[str], int]]:
    Counted.install()
    group = dist.new_group(backend="gloo")
    found = {}
    for source, placements, dtype in itertools.product(
        ("dcp", "hf"),
        ((Replicate(), Replicate()), (Replicate(), Shard(0)), (Shard(1), Replicate())),
        (torch.float32, torch.bfloat16),
    ):
        target = placed(placements, dtype)
        Counted.nbytes = 0
        reader = HFDualReader(path, source=source, process_group=group, exchange=True)  # type: ignore[arg-type]
        dcp.load({"model": target}, storage_reader=reader)
        read = Counted.nbytes
        expected = {name: value.to(dtype) for name, value in model().items()}
        wrong = [
            name
            for name, value in target.items()
            if isinstance(value, DTensor) and not torch.equal(value.full_tensor(), expected[name])
        ]
        found[f"{source} {placements} {dtype}"] = (wrong, read)
    return found


def test_each_byte_is_read_once_and_arrives_everywhere(saved: Path) -> None:
    total = sum(value.nbytes for value in model().values())
    results = run_ranks(load_exchanged, 4, saved)
    for name in results[0]:
        assert [found[name][0] for found in results] == [[]] * 4
        read = [found[name][1] for found in results]
        # With what lies between tensors, and what is too small to be counted.
        assert total * 0.99 < sum(read) < total * 1.01, name
        assert max(read) < 0.8 * total, name


def fail_on_one(rank: int, world_size: int, path: Path) -> list[str]:
    """Fail on rank 1, while it reads and before it does; say what each rank raised."""
    Counted.install()
    group = dist.new_group(backend="gloo")
    said = []
    for fails in ("reading", "before"):
        Counted.fails = fails == "reading" and rank == 1
        reader = HFDualReader(path, process_group=group, exchange=True)
        planner = Unable() if fails == "before" and rank == 1 else dcp.DefaultLoadPlanner()
        target = placed((Replicate(), Replicate()), torch.float32)
        with pytest.raises(CheckpointException) as caught:
            dcp.load({"model": target}, storage_reader=reader, planner=planner)
        error, _ = caught.value.failures[rank]
        said.append(f"{type(error).__name__}: {error}")
    # The group is good for another load.
    Counted.fails = False
    dcp.load({"model": target}, storage_reader=reader)
    return said


class Unable(dcp.DefaultLoadPlanner):
    def resolve_tensor(self, read_item: Any) -> torch.Tensor:  # noqa: ARG002 - torch's
        raise RuntimeError("no memory")


def test_failure_of_one_rank_reaches_all_and_nobody_waits(saved: Path) -> None:
    for rank, (reading, before) in enumerate(run_ranks(fail_on_one, 4, saved, timeout_s=60)):
        assert "the device is gone" in reading
        assert "no memory" in before
        if rank != 1:
            assert "on rank 1 of the group" in reading
            assert "on rank 1 of the group" in before


def test_exchange_without_a_group_is_refused() -> None:
    with pytest.raises(ConfigError, match="new_group"):
        HFDualReader("x", exchange=True)


Ranges = list[dict[str, list[tuple[int, int]]]]


@st.composite
def wants(draw: st.DrawFn) -> Ranges:
    """What up to four ranks want of two files, in units of bytes."""
    found: Ranges = []
    for _ in range(draw(st.integers(1, 4))):
        starts = st.tuples(st.integers(0, 40), st.integers(1, 20))
        files = st.dictionaries(st.sampled_from(["a", "b"]), st.lists(starts, max_size=5))
        one = draw(files)
        found.append({file: [(s, s + n) for s, n in ranges] for file, ranges in one.items()})
    return found


def wanting(ranges: Ranges, file: str, byte: int) -> tuple[int, ...]:
    return tuple(
        rank
        for rank, one in enumerate(ranges)
        if any(start <= byte < stop for start, stop in one.get(file, ()))
    )


@settings(max_examples=300, deadline=None)
@given(ranges=wants())
def test_segments_are_what_several_ranks_want_and_no_range_ends_within_one(ranges: Ranges) -> None:
    segments = shared_segments(ranges)
    covered: dict[tuple[str, int], tuple[int, ...]] = {}
    for segment in segments:
        assert segment.nbytes > 0
        assert segment.reader in segment.ranks
        for byte in range(segment.start, segment.stop):
            assert covered.setdefault((segment.file, byte), segment.ranks) is segment.ranks
        borders = {b for one in ranges for r in one.get(segment.file, ()) for b in r}
        assert not borders.intersection(range(segment.start + 1, segment.stop))
    for file, byte in itertools.product("ab", range(60)):
        ranks = wanting(ranges, file, byte)
        assert covered.get((file, byte)) == (ranks if len(ranks) > 1 else None)
    assert segments == sorted(segments, key=lambda s: (s.file, s.start))


def test_reading_is_shared_out_evenly() -> None:
    ranges = [(i * 100, i * 100 + 100) for i in range(40)]
    segments = shared_segments([{"f": ranges}] * 4)
    counts = [sum(segment.reader == rank for segment in segments) for rank in range(4)]
    assert counts == [10] * 4


def test_rounds_are_bounded_and_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_exchange, "ROUND_NBYTES", 100)
    segments = [Segment("f", i, i + n, (0, 1), 0) for i, n in enumerate([40, 40, 40, 300, 1, 1])]
    groups = list(rounds(segments))
    assert [segment for group in groups for segment in group] == segments
    assert [len(group) for group in groups] == [2, 1, 1, 2]
