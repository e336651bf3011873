"""The descriptors of weights stored once: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.weights_once_places import (
    FORMAT,
    NOTICE,
    StoredOnce,
    StoredOnceDecoder,
    StoredPart,
    encode_stored_once,
)
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE
from dcp_hf_writer.tensors.strided_copies import Copy, Loop

SHAPE = (4, 6)
COPY = Copy((1, 0), (0, 2), (Loop(3, 0, 1, 0, 1), Loop(3, 1, 2, 1, 1)))
PART = StoredPart("hf/model-00001-of-00002.safetensors", "layers.0.w", 80, "BF16", SHAPE, (COPY,))
GEOMETRY = ["BF16", [4, 6], [[[1, 0], [0, 2], [[3, 0, 1, 0, 1], [3, 1, 2, 1, 1]]]]]
LARGE = (1 << 63) - 1


def decode(descriptors: Any) -> StoredOnce | None:
    return StoredOnceDecoder("/ckpt/.metadata").decode(descriptors)


def texts(
    path: Any = "f", key: Any = "w", start: Any = "0", geometry: Any = GEOMETRY
) -> tuple[Any, ...]:
    text = geometry if isinstance(geometry, (str, int)) else json.dumps(geometry)
    return (FORMAT, path, key, start, text)


def test_form_on_storage_is_as_documented() -> None:
    path, key, start, geometry = encode_stored_once(StoredOnce((PART,)))[1:]
    assert (path, key, start) == (PART.path, PART.key, "80")
    assert json.loads(geometry) == GEOMETRY
    assert NOTICE == (
        "weights stored once - load with HFDualReader, or convert with dcp_hf_writer.materialize"
    )
    assert FORMAT == "stored-once@dcp_hf_writer/1"


def test_notice_is_a_file_name_that_no_reader_takes_for_a_pattern_or_a_path() -> None:
    assert len(NOTICE.encode()) < 200
    assert not set(NOTICE) & set("/\\*?[]{}#:%\0")


def test_bytes_of_a_chunk_are_those_of_its_elements() -> None:
    assert StoredOnce((PART, PART)).nbytes == 2 * 9 * 2


@st.composite
def parts(draw: st.DrawFn) -> StoredPart:
    ndim = draw(st.integers(0, 3))
    shape = tuple(draw(st.integers(1, 50)) for _ in range(ndim))
    copies = []
    for _ in range(draw(st.integers(0, 3))):
        first = [draw(st.integers(0, n - 1)) for n in shape]
        loops = []
        for dim in draw(st.lists(st.sampled_from(range(ndim)), unique=True)) if ndim else ():
            step = draw(st.integers(1, 5))
            most = (shape[dim] - 1 - first[dim]) // step + 1
            loops.append(Loop(draw(st.integers(1, most)), dim, step, 0, draw(st.integers(1, 9))))
        copies.append(Copy(tuple(first), (draw(st.integers(0, 9)),), tuple(loops)))
    dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
    start = draw(st.sampled_from([0, 1, LARGE]) | st.integers(0, LARGE))
    return StoredPart(draw(st.text()), draw(st.text()), start, dtype, shape, tuple(copies))


@settings(max_examples=200, deadline=None)
@given(st.lists(parts(), max_size=4), st.sampled_from([tuple, list]))
def test_what_is_written_is_read(wanted: list[StoredPart], kind: Any) -> None:
    once = StoredOnce(tuple(wanted))
    assert decode(kind(encode_stored_once(once))) == once


def test_extensions_of_torch_are_left_to_the_reader() -> None:
    for descriptors in ((), ("stream.zstd/1",), ["a", "b"]):
        assert decode(descriptors) is None


def changed(change: Any) -> Any:
    value = json.loads(json.dumps(GEOMETRY))
    change(value)
    return value


BAD = {
    "a number": (*texts(), 3),
    "another version": ("stored-once@dcp_hf_writer/2", "f", "w", "0", json.dumps(GEOMETRY)),
    "a text too few": texts()[:-1],
    "a text too many": (*texts(), "x"),
    "a negative start": texts(start="-1"),
    "a start with a sign": texts(start="+1"),
    "a start with spaces": texts(start=" 1"),
    "a start with underscores": texts(start="1_0"),
    "a start in other digits": texts(start="\u0661"),
    "a start with zeros": texts(start="007"),
    "a start of 2^63": texts(start=str(1 << 63)),
    "a start of many digits": texts(start="9" * 5000),
    "an empty start": texts(start=""),
    "no JSON": texts(geometry="["),
    "JSON nested without end": texts(geometry="[" * 100_000),
    "an object": texts(geometry={}),
    "a dtype alone": texts(geometry=["BF16"]),
    "an unknown dtype": texts(geometry=["F33", [], []]),
    "a dtype that is a list": texts(geometry=[["BF16"], [], []]),
    "a shape that is no list": texts(geometry=["BF16", 4, []]),
    "a shape that is text": texts(geometry=["BF16", "46", []]),
    "a negative shape": texts(geometry=["BF16", [-4, -6], []]),
    "a shape of true": texts(geometry=["BF16", [True], []]),
    "a shape of floats": texts(geometry=["BF16", [4.0], []]),
    "2^63 bytes": texts(geometry=["BF16", [1 << 31, 1 << 31], []]),
    "a number of 2^63": texts(geometry=["BF16", [1 << 63], []]),
    "a number of thousands of digits": texts(geometry='["BF16",[' + "9" * 5000 + "],[]]"),
    "copies that are none": texts(geometry=["BF16", [4, 6], [[]]]),
    "copies that are text": texts(geometry=["BF16", [4, 6], "abc"]),
    "elements of other dimensions": texts(geometry=changed(lambda v: v[1].pop())),
    "elements beyond the tensor": texts(geometry=changed(lambda v: v[1].__setitem__(0, 3))),
    "a loop of six numbers": texts(geometry=changed(lambda v: v[2][0][2][0].append(1))),
    "a loop that is text": texts(geometry=changed(lambda v: v[2][0][2].__setitem__(0, "12345"))),
    "a loop without steps": texts(geometry=changed(lambda v: v[2][0][2][0].__setitem__(0, 0))),
    "a loop that stands still": texts(geometry=changed(lambda v: v[2][0][2][0].__setitem__(2, 0))),
    "a loop that goes back": texts(geometry=changed(lambda v: v[2][0][2][0].__setitem__(4, -1))),
    "a loop of true": texts(geometry=changed(lambda v: v[2][0][2][0].__setitem__(0, bool(1)))),
    "a dimension beyond the shape": texts(
        geometry=changed(lambda v: v[2][0][2][0].__setitem__(1, 2))
    ),
    "a dimension beyond the chunk": texts(
        geometry=changed(lambda v: v[2][0][2][0].__setitem__(3, 2))
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_descriptors_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(CorruptCheckpointError) as caught:
        decode(BAD[name])
    assert "/ckpt/.metadata" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_newer_form_is_named() -> None:
    with pytest.raises(CorruptCheckpointError, match="a newer dcp_hf_writer can read it"):
        decode(BAD["another version"])


def test_descriptors_that_stand_in_many_places_are_decoded_once() -> None:
    decoder = StoredOnceDecoder("x")
    texts_of_many = (FORMAT, *(texts()[1:] * 10_000))
    tracemalloc.start()
    try:
        began = time.monotonic()
        found = [decoder.decode(texts_of_many) for _ in range(10_000)]
        seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(one is found[0] for one in found)
    assert peak < 10_000_000
    assert seconds < 20


def test_fuzzed_text_is_read_or_refused() -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    refused = 0
    for n in range(3000):
        descriptors = list(texts(start="80"))
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(descriptors))
            text = list(str(descriptors[at]))
            for _ in range(rng.randint(1, 3)):
                where = rng.randrange(len(text) + 1)
                text[where : where + rng.randint(0, 2)] = rng.choice('0129-.[]{},"eEa \ud800\0')
            descriptors[at] = "".join(text)
        try:
            decode(tuple(descriptors))
        except CorruptCheckpointError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, n {n}: {descriptors!r}") from error
    assert 300 < refused < 3000
