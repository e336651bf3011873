"""Planned reads put every wanted element in its place, whatever is wanted of whatever layout."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer.errors import ReadError
from dcp_hf_writer.load import read_phase, read_plan
from dcp_hf_writer.load.read_phase import is_direct, run_reads
from dcp_hf_writer.load.read_plan import Bounce, Direct, Fetch, Read, plan_reads
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.open_inputs import OpenInputs

if TYPE_CHECKING:
    from pathlib import Path

FILE_NBYTES = 4096
CONTENT = bytes((i * 7 + i // 256) % 251 for i in range(FILE_NBYTES))
DTYPES = (torch.uint8, torch.int16, torch.float32)


@pytest.fixture
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that tensors of a few elements reach."""
    for name, value in {
        "PIECE_NBYTES": 256,
        "BOUNCE_NBYTES": 96,
        "MAX_GAP_NBYTES": 24,
        "MIN_RUN_NBYTES": 16,
        "_MAX_PARTS": 6,
    }.items():
        monkeypatch.setattr(read_plan, name, value)


@st.composite
def fetches(draw: st.DrawFn) -> tuple[list[Fetch], list[torch.Tensor]]:
    """Draw boxes of stored tensors, and targets with strides of their own."""
    found: list[Fetch] = []
    targets: list[torch.Tensor] = []
    for number in range(draw(st.integers(1, 4))):
        ndim = draw(st.integers(0, 3))
        stored = [draw(st.integers(1, 6)) for _ in range(ndim)]
        dtype = draw(st.sampled_from(DTYPES))
        order = draw(st.permutations(range(ndim)))
        strides = _strides(stored, order)
        offsets = [draw(st.integers(0, n - 1)) for n in stored]
        lengths = [draw(st.integers(0, n - o)) for n, o in zip(stored, offsets, strict=True)]
        numel = torch.Size(stored).numel()
        start = draw(st.integers(0, FILE_NBYTES - numel * dtype.itemsize))
        wanted = dtype if draw(st.booleans()) else torch.float64
        target = _target(draw, lengths, wanted)
        first = sum(o * s for o, s in zip(offsets, strides, strict=True))
        found.append(
            Fetch(
                file="stored",
                start=start + first * dtype.itemsize,
                dtype=dtype,
                target=number,
                target_start=0,
                loops=tuple(zip(lengths, strides, target.stride(), strict=True)),
                is_direct=is_direct(target, dtype),
            )
        )
        targets.append(target)
    return found, targets


def _strides(shape: list[int], order: Any) -> list[int]:
    """Return the strides of a dense tensor whose dimensions lie in an order."""
    strides, stride = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = stride
        stride *= shape[d]
    return strides


def _target(draw: st.DrawFn, lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Draw a view of a larger tensor, its dimensions in any order."""
    order = draw(st.permutations(range(len(lengths))))
    step = draw(st.integers(1, 2))
    base = torch.full([lengths[d] * step + 1 for d in order], -1, dtype=torch.int16).to(dtype)
    for i, d in enumerate(order):
        base = base.narrow(i, 1 if lengths[d] else 0, lengths[d] * step)[
            (slice(None),) * i + (slice(None, None, step),)
        ]
    return base.permute([order.index(d) for d in range(len(lengths))])


def expected(fetch: Fetch, target: torch.Tensor) -> torch.Tensor:
    """Read element by element."""
    wanted = torch.empty(target.shape, dtype=target.dtype)
    for index in itertools.product(*(range(n) for n in target.shape)):
        start = fetch.start + fetch.dtype.itemsize * sum(
            i * loop[1] for i, loop in zip(index, fetch.loops, strict=True)
        )
        raw = bytearray(CONTENT[start : start + fetch.dtype.itemsize])
        wanted[index] = torch.frombuffer(raw, dtype=fetch.dtype)[0]
    return wanted


@pytest.mark.usefixtures("_small_limits")
@settings(max_examples=400, deadline=None)
@given(drawn=fetches())
def test_reads_fill_targets_with_what_is_stored(
    drawn: tuple[list[Fetch], list[torch.Tensor]], stored_dir: Path
) -> None:
    wanted, targets = drawn
    with OpenInputs(open_directory(stored_dir)) as inputs:
        run_reads(inputs, plan_reads(wanted), targets)
    for fetch, target in zip(wanted, targets, strict=True):
        assert torch.equal(target.nan_to_num(), expected(fetch, target).nan_to_num())


@pytest.fixture(scope="module")
def stored_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    (directory / "stored").write_bytes(CONTENT)
    return directory


@pytest.mark.usefixtures("_small_limits")
@settings(max_examples=200, deadline=None)
@given(drawn=fetches())
def test_reads_are_bounded_and_ascending(drawn: tuple[list[Fetch], list[torch.Tensor]]) -> None:
    reads = plan_reads(drawn[0])
    assert [read.start for read in reads] == sorted(read.start for read in reads)
    for read in reads:
        assert 0 < read.nbytes <= read_plan.PIECE_NBYTES
        assert len(read.parts) <= read_plan._MAX_PARTS
        bounced = [part.nbytes for part in read.parts if isinstance(part, Bounce)]
        assert sum(bounced) <= read_plan.BOUNCE_NBYTES
        assert all(part.nbytes > 0 for part in read.parts)


def fetch_of(start: int, count: int, *, is_direct: bool = True, target: int = 0) -> Fetch:
    return Fetch("f", start, torch.uint8, target, 0, ((count, 1, 1),), is_direct)


def test_neighbours_become_one_read_and_what_is_far_another() -> None:
    mib = 1 << 20
    wanted = [fetch_of(0, mib), fetch_of(mib + 1000, mib, target=1), fetch_of(3 * mib, 9, target=2)]
    assert plan_reads(reversed(wanted)) == [
        Read("f", 0, (Direct(mib, 0, 0), Bounce(1000), Direct(mib, 1, 0))),
        Read("f", 3 * mib, (Direct(9, 2, 0),)),
    ]


def test_large_tensor_is_cut_so_that_threads_share_it() -> None:
    reads = plan_reads([fetch_of(5, 20 << 20)])
    assert [read.nbytes for read in reads] == [8 << 20, 8 << 20, 4 << 20]


def test_same_bytes_for_two_casts_are_read_once() -> None:
    wanted = [fetch_of(0, 4096, is_direct=False, target=number) for number in range(2)]
    (read,) = plan_reads(wanted)
    (part,) = read.parts
    assert isinstance(part, Bounce)
    assert (part.nbytes, [scatter.target for scatter in part.scatters]) == (4096, [0, 1])


def test_equal_fetches_are_one() -> None:
    assert len(plan_reads([fetch_of(0, 9)] * 3)) == 1


def column_shard(run: int, stride: int, *, rows: int = 64, start: int = 0) -> list[Read]:
    loops = ((rows, stride, run), (run, 1, 1))
    return plan_reads([Fetch("f", start, torch.uint8, 0, 0, loops, is_direct=True)])


def test_short_runs_are_read_in_one_span_and_long_ones_straight() -> None:
    (short,) = column_shard(1000, 2000)
    assert [type(part) for part in short.parts] == [Bounce]
    long = column_shard(1 << 20, 2 << 20)
    assert [type(part) for read in long for part in read.parts] == [Direct] * 64


def test_runs_far_apart_are_read_one_by_one() -> None:
    reads = column_shard(1000, 1 << 20)
    assert len(reads) == 64
    assert sum(read.nbytes for read in reads) == 64 * 1000


@pytest.mark.parametrize("left", [2_000_000, 5_999_000])
def test_file_cut_off_while_it_is_read_is_an_error(tmp_path: Path, left: int) -> None:
    (tmp_path / "f").write_bytes(bytes(6_000_000))
    target = torch.zeros(3000, 1000, dtype=torch.uint8)
    first, *others = column_shard(1000, 2000, rows=3000, start=1000)
    with OpenInputs(open_directory(tmp_path)) as inputs:
        run_reads(inputs, [first], [target])
        os.truncate(tmp_path / "f", left)
        with pytest.raises(ReadError, match="ends too early"):
            run_reads(inputs, others, [target])


def test_error_of_one_thread_ends_the_load_and_is_raised(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10 << 20))
    targets = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(20)]
    wanted = [
        Fetch("f", number << 20, torch.uint8, number, 0, ((1 << 20, 1, 1),), is_direct=True)
        for number in range(20)
    ]
    with OpenInputs(open_directory(tmp_path)) as inputs, pytest.raises(ReadError) as caught:
        run_reads(inputs, plan_reads(wanted), targets)
    assert caught.value.path == str(tmp_path / "f")
    assert "ends too early" in str(caught.value)


def test_buffers_are_kept_for_the_next_load(stored_dir: Path) -> None:
    wanted = [fetch_of(0, 4000, is_direct=False)]
    target = torch.zeros(4000)
    read_phase.Buffer._spare.clear()
    for _ in range(3):
        with OpenInputs(open_directory(stored_dir)) as inputs:
            reads = [Read("stored", 0, read.parts) for read in plan_reads(wanted)]
            run_reads(inputs, reads, [target])
        assert len(read_phase.Buffer._spare) == 1
