"""One pass over a file: each digest gets its bytes in order, and gaps and overlaps are seen."""

from __future__ import annotations

import random

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer.digests.digest_sweep import Digest, Span, Sweep, clip, contiguous, extent_of
from dcp_hf_writer.plan.parse_manifest_blocks import Places
from dcp_hf_writer.tensors.boxes import Box, ByteRuns, whole
from support.partitions import partitions_of

CONTENT = random.Random(0).randbytes(40_000)


def bytes_of(runs: ByteRuns) -> list[int]:
    return [start + i for start in runs.starts() for i in range(runs.nbytes)]


@st.composite
def ascending_runs(draw: st.DrawFn) -> ByteRuns:
    runs = ByteRuns(draw(st.integers(0, 20)), draw(st.integers(1, 6)), ())
    for _ in range(draw(st.integers(0, 3))):
        stride = extent_of(runs) + draw(st.integers(0, 5))
        runs = ByteRuns(runs.start, runs.nbytes, ((draw(st.integers(1, 4)), stride), *runs.loops))
    return runs


@settings(deadline=None)
@given(ascending_runs(), st.integers(0, 400), st.integers(0, 400))
def test_clip_keeps_the_bytes_within_in_order(runs: ByteRuns, low: int, length: int) -> None:
    found = [at for piece in clip(runs, low, low + length) for at in bytes_of(piece)]
    assert found == [at for at in bytes_of(runs) if low <= at < low + length]


def test_clip_of_a_long_loop_takes_no_step_of_it() -> None:
    runs = ByteRuns(0, 2, ((1 << 60, 4),))
    assert list(clip(runs, 1 << 40, (1 << 40) + 10)) == [
        ByteRuns(1 << 40, 2, ((3, 4),)),
    ]
    assert list(clip(runs, (1 << 40) + 1, (1 << 40) + 9)) == [
        contiguous((1 << 40) + 1, (1 << 40) + 2),
        ByteRuns((1 << 40) + 4, 2, ((1, 4),)),
        contiguous((1 << 40) + 8, (1 << 40) + 9),
    ]


def runs_of(box: Box, shape: tuple[int, ...], *, itemsize: int, start: int) -> ByteRuns:
    """Return the bytes of a box of a tensor that begins at a byte of the file."""
    found = Places().find(list(box.offsets), list(box.sizes), shape, itemsize).runs
    assert found is not None
    return ByteRuns(start + found.start, found.nbytes, found.loops)


def digest_of(data: bytes) -> str:
    return str(xxhash.xxh3_64_hexdigest(data))


def read_from(content: bytes):  # noqa: ANN201 - a closure
    def read(buffer: memoryview, offset: int) -> int:
        data = content[offset : offset + buffer.nbytes]
        buffer[: len(data)] = data
        return len(data)

    return read


def sweep(
    spans: list[Span], content: bytes = CONTENT, window: int = 1000
) -> list[tuple[Span, str]]:
    done = []
    found = Sweep(window).run(spans, read_from(content), done.append)
    if not found:
        assert sum(done) == sum(span.stop - span.start for span in spans)
    return found


@settings(deadline=None)
@given(st.data())
def test_blocks_of_any_partition_get_their_digest(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    itemsize = data.draw(st.sampled_from([1, 2, 3, 8]))
    start = data.draw(st.integers(0, 100))
    elements = np.frombuffer(CONTENT, np.uint8, whole(shape).numel * itemsize, start)
    elements = elements.reshape(*shape, itemsize)
    parts = []
    for box in data.draw(st.permutations(list(data.draw(partitions_of(whole(shape)))))):
        if box.numel:
            where = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
            runs = runs_of(box, shape, itemsize=itemsize, start=start)
            parts.append((Digest(digest_of(elements[where].tobytes()), "block"), runs))
    span = Span(start, start + elements.nbytes, tuple(parts))
    window = data.draw(st.sampled_from([1, 7, 64, 1000]))
    assert sweep([span], window=window) == []
    assert [d.found for d, _ in parts] == [d.expected for d, _ in parts]


def test_one_digest_is_fed_from_spans_that_lie_apart() -> None:
    ends = [(0, 10), (20, 25), (3000, 3010), (39_000, 40_000)]
    whole_text = b"".join(CONTENT[a:b] for a, b in ends)
    digest = Digest(digest_of(whole_text), "rest", is_of_many=True)
    assert sweep([Span(a, b, ((digest, contiguous(a, b)),)) for a, b in ends]) == []
    assert digest.found is None
    digest.finish()
    assert digest.found == digest.expected


@pytest.mark.parametrize("window", [64, 1000])
@pytest.mark.parametrize(
    ("boxes", "fault"),
    [
        ([Box((0, 0), (9, 10))], "hold 180 of 200 bytes"),
        ([Box((0, 0), (10, 10)), Box((3, 3), (1, 1))], "hold 202 of 200 bytes"),
        ([Box((0, 0), (10, 9)), Box((0, 0), (10, 1))], "overlap at byte 50"),
        (
            [Box((0, 0), (5, 10)), Box((6, 0), (4, 10)), Box((8, 0), (1, 10))],
            "gap at byte 150",
        ),
        ([Box((0, 0), (5, 10)), Box((4, 0), (5, 10))], "overlap at byte 130"),
        ([Box((0, 0), (10, 5)), Box((0, 4), (10, 5))], "overlap at byte 58"),
        ([Box((0, 1), (10, 9)), *[Box((9, 1), (1, 2))] * 5], "gap at byte 50"),
        ([], "hold 0 of 200 bytes"),
    ],
)  # fmt: skip
def test_gap_or_overlap_is_seen(window: int, boxes: list[Box], fault: str) -> None:
    parts = tuple(
        (Digest("", "block"), runs_of(box, (10, 10), itemsize=2, start=50)) for box in boxes
    )
    found = sweep([Span(50, 250, parts)], window=window)
    assert [text for _, text in found] == [found[0][1]]
    assert fault in found[0][1]


def test_byte_covered_257_times_is_seen() -> None:
    runs = [contiguous(0, 1)] * 257 + [contiguous(257, 1000)]
    parts = tuple((Digest("", "block"), one) for one in runs)
    assert "gap at byte 1" in sweep([Span(0, 1000, parts)])[0][1]


@pytest.mark.parametrize("window", [64, 1000])
def test_span_beyond_the_end_is_named(window: int) -> None:
    whole_span = Span(0, 100, ((Digest(digest_of(CONTENT[:100]), "a"), contiguous(0, 100)),))
    cut = Span(100, 300, ((Digest("", "b"), contiguous(100, 300)),))
    found = sweep([whole_span, cut], content=CONTENT[:299], window=window)
    assert found == [(cut, "the bytes reach beyond the end of the file")]
    assert whole_span.parts[0][0].found == whole_span.parts[0][0].expected


def test_sweep_stops_when_it_is_told_to() -> None:
    def check(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sweep(64).run(
            [Span(0, 500, ((Digest("", "a"), contiguous(0, 500)),))], read_from(CONTENT), check
        )
