"""Objects that only hold data are loaded; whatever would run code of its own is refused."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import decimal
import enum
import fractions
import http
import io
import os
import pickle
import random
import re
import signal
import socket
import types
import uuid
import zipfile
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch

from dcp_hf_writer.errors import CorruptCheckpointError, PickledObjectError
from dcp_hf_writer.formats.safe_objects import check_is_plain
from dcp_hf_writer.load.check_objects import check_object
from dcp_hf_writer.torch_seam.object_archives import pickle_of_archive

ZONE = dt.timezone(dt.timedelta(hours=2), "X")


def numpy_states() -> dict[str, Any]:
    np.random.seed(3)  # noqa: NPY002 - the state that trainers keep
    generators = (np.random.PCG64(1), np.random.Philox(1), np.random.SFC64(1), np.random.MT19937(1))
    states = {type(one).__name__: one.state for one in generators}
    return {"legacy": np.random.get_state(), **states}  # noqa: NPY002


DATA: dict[str, Any] = {
    "bytes io": io.BytesIO(b"abc\xff"),
    "string io": io.StringIO("x"),
    "array": np.arange(6).reshape(2, 3),
    "array by columns": np.asfortranarray(np.ones((2, 3))),
    "array of no dimension": np.array(3.0),
    "empty array": np.zeros((0, 3)),
    "big-endian array": np.array([1, 2], dtype=">i4"),
    "text array": np.array(["ab", "c"]),
    "bytes array": np.array([b"ab"]),
    "object array": np.array([1, "a", None], dtype=object),
    "days": np.array(["2020-01-01"], dtype="M8[D]"),
    "scalar": np.float32(3),
    "bool scalar": np.bool_(True),  # noqa: FBT003
    "time scalar": np.datetime64("2020-01-01T00:00:00", "ns"),
    "duration scalar": np.timedelta64(3, "s"),
    "dtype": np.dtype(">u2"),
    "scalar type": np.float16,
    "numpy states": numpy_states(),
    "states of all generators": (torch.get_rng_state(), numpy_states(), random.getstate()),
    "datetime": dt.datetime(2026, 1, 2, 3, 4, 5, 6, ZONE),
    "date": dt.date(2026, 1, 2),
    "time": dt.time(3, tzinfo=dt.timezone.utc),
    "timedelta": dt.timedelta(3, 4, 5),
    "path": Path("/a/b"),
    "windows path": PureWindowsPath("c:/x"),
    "http status": http.HTTPStatus.OK,
    "signal": signal.SIGTERM,
    "flags": re.IGNORECASE | re.MULTILINE,
    "address family": socket.AF_INET,
    "uuid": uuid.UUID(int=2**127 + 5),
    "decimal": decimal.Decimal("1.5e3"),
    "fraction": fractions.Fraction(3, 7),
    "namespace": argparse.Namespace(a=1, b=[np.float64(2)]),
    "simple namespace": types.SimpleNamespace(x=Path("y")),
    "deque": collections.deque([np.int64(1)], maxlen=3),
    "defaultdict": collections.defaultdict(list, a=[dt.date(2026, 1, 2)]),
    "set values": collections.defaultdict(set, a={1, "b", (2, 3)}),
    "counter": (collections.Counter("aab"), dt.date(2026, 1, 2)),
    "ordered dict": collections.OrderedDict(a=np.ones(2)),
    "keys of other types": {1.5: np.ones(1), None: 3, True: 1, b"x": 2},
    "numbers": (complex(1, 2), range(5), slice(1, 2), bytearray(b"x"), 2**130, np.uint64(2**63)),
    "tensors": (torch.ones(3), torch.nn.Parameter(torch.ones(2)), torch.ones(2).t(), np.ones(2)),
    "torch values": (torch.device("cpu"), torch.Size([2]), torch.bfloat16, Path("x")),
}


def saved(value: Any, **options: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data, **options)
    return data.getvalue()


def check(data: bytes) -> None:
    check_object(data, fqn="x", path="/ckpt/__0_0.distcp")


def as_text(value: Any) -> str:
    if isinstance(value, (io.BytesIO, io.StringIO)):
        return f"{type(value).__name__} {value.getvalue()!r}"
    if isinstance(value, np.ndarray):
        # numpy brings the elements into the order of the machine.
        return f"{value.tolist()} {value.dtype.name} {value.flags.f_contiguous}"
    return f"{type(value).__name__} {value!r}"


@pytest.mark.parametrize("name", DATA)
def test_data_is_loaded_as_it_was_saved(name: str) -> None:
    data = saved(DATA[name])
    check(data)
    assert as_text(torch.load(io.BytesIO(data), weights_only=False)) == as_text(DATA[name])


class Own(enum.Enum):
    A = 1


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Own.A, "Own"),
        (torch.nn.Linear(1, 1), "Linear"),
        (print, "print"),
        (np.array([(1, 2)], dtype="i4,i4"), "dtype"),
        (np.random.default_rng(1), "Generator|generator"),
        ((np.ones(1), Own.A), "Own"),
    ],
    ids=["enum of a program", "module", "function", "structured", "generator", "within"],
)
def test_object_that_may_run_code_is_refused(value: Any, name: str) -> None:
    with pytest.raises(PickledObjectError, match=name) as caught:
        check(saved(value))
    assert "allow_pickled_objects" in str(caught.value)


def test_code_beside_data_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    for value in ((np.ones(1), Runs(str(marker))), {"a": [Path("x"), {3: Runs(str(marker))}]}):
        with pytest.raises(PickledObjectError, match="mkdir"):
            check(saved(value))
    assert not marker.exists()


# Pickles of protocol 2, written by hand: a global is `c<module>\n<name>\n`.
HOSTILE = {
    "bytes of any length": b"c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.",
    "bytearray of any length": b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "getattr of a module": b"c__builtin__\ngetattr\ncos\nsystem\nX\x01\x00\x00\x00x\x86R.",
    "getattr of a type": b"c__builtin__\ngetattr\ncuuid\nUUID\nX\x05\x00\x00\x00bytes\x86R.",
    "dunder": b"c__builtin__\ngetattr\nchttp\nHTTPStatus\nX\x07\x00\x00\x00__new__\x86R.",
    "function of an enum's module": b"csocket\ncreate_connection\n)R.",
    "module that acts when imported": b"cantigravity\nx\n)R.",
    "array without its data": (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01J\xff\xff\xff\x7f\x85cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R\x89X\x00\x00\x00\x00tb."
    ),
    "array of pointers": (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85X\x01\x00\x00\x00b\x87R"
        b"(K\x01K\x01\x85cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R\x89c_codecs\nencode\n"
        b"X\x08\x00\x00\x0012345678X\x06\x00\x00\x00latin1\x86Rtb."
    ),
    "dtype of another size": (
        b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"
        b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\x7fK\x01K\x00tb."
    ),
    "structured dtype": b"cnumpy\ndtype\nX\x05\x00\x00\x00i4,i4\x89\x88\x87R.",
    "namespace with a state of slots": (
        b"cargparse\nNamespace\n)\x81N}X\x09\x00\x00\x00__class__cuuid\nUUID\ns\x86b."
    ),
    "fraction with an exponent": b"cfractions\nFraction\nX\x0b\x00\x00\x001e999999999\x85R.",
    "set of nested tuples": b"c__builtin__\nset\n]((K\x01tta\x85R.",
    "other codec": b"c_codecs\nencode\nX\x01\x00\x00\x00xX\x03\x00\x00\x00bz2\x86R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused(name: str) -> None:
    with pytest.raises(CorruptCheckpointError):
        check_is_plain(b"\x80\x02" + HOSTILE[name], path="x")


def test_member_that_is_pickled_by_its_name_is_admitted() -> None:
    # As the first releases of Python 3.11 pickle it.
    name = b"X\x02\x00\x00\x00OK"
    pickled = b"\x80\x02c__builtin__\ngetattr\nchttp\nHTTPStatus\n" + name + b"\x86R."
    check_is_plain(pickled, path="x")
    assert pickle.loads(pickled) is http.HTTPStatus.OK


def rewritten(data: bytes, records: dict[str, bytes]) -> bytes:
    """Return an archive with other records; torch aligns records, but reads any."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(found, "w") as new:
        kept = {name: old.read(name) for name in old.namelist()}
        for name, content in {**kept, **records}.items():
            new.writestr(name, content)
    return found.getvalue()


def test_pickle_that_is_checked_is_the_one_that_torch_unpickles(tmp_path: Path) -> None:
    marker = tmp_path / "was-here"
    evil = pickle.dumps(Runs(str(marker)), 2)
    good = saved(np.ones(2))
    check(good)
    archives = {
        "other case first": rewritten(good, {"archive/DATA.PKL": evil}),
        "program": rewritten(good, {"archive/constants.pkl": evil}),
        "replaced": rewritten(good, {"archive/data.pkl": evil}),
        "before the archive": evil + good,
        "old format": saved(np.ones(2), _use_new_zipfile_serialization=False),
    }
    for name, data in archives.items():
        try:
            check(data)
        except PickledObjectError:
            continue
        # What passes the check must be harmless for torch.
        torch.load(io.BytesIO(data), weights_only=False)
        assert not marker.exists(), name
    with pytest.raises(PickledObjectError):
        check(archives["replaced"])
    with pytest.raises(PickledObjectError):
        check(archives["before the archive"])
    assert not marker.exists()


def mutated(data: bytes, others: list[bytes], source: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(source.randint(1, 3)):
        at = source.randrange(len(found))
        match source.randrange(3):
            case 0:
                found[at] = source.randrange(256)
            case 1:
                del found[at : at + source.randint(1, 8)]
            case _:
                other = source.choice(others)
                start = source.randrange(len(other))
                found[at:at] = other[start : start + source.randint(1, 30)]
    return bytes(found)


class Recording(pickle.Unpickler):
    """Notes the globals that a pickle names."""

    def __init__(self, data: bytes, names: set[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(data))
        self.names = names

    def find_class(self, module: str, name: str) -> Any:
        self.names.add((module, name))
        return super().find_class(module, name)

    def persistent_load(self, _: Any) -> Any:
        raise pickle.UnpicklingError("a storage")


def test_damaged_pickle_is_refused_or_names_only_modules_that_whole_ones_name() -> None:
    names: set[tuple[str, str]] = set()
    whole = [pickle_of_archive(saved(value)) for value in DATA.values()]
    for data in whole:
        with contextlib.suppress(pickle.UnpicklingError):
            Recording(data, names).load()
    # Damage may turn one name of a renamed module into the other.
    modules = {module for module, _ in names} | {"numpy.core.multiarray", "pathlib._local"}
    source, accepted = random.Random(7), 0
    small = [data for data in whole if len(data) < 2000]
    for _ in range(2500):
        damaged = mutated(source.choice(small), small, source)
        try:
            check_is_plain(damaged, path="x")
        except CorruptCheckpointError:
            continue
        accepted += 1
        found: set[tuple[str, str]] = set()
        with contextlib.suppress(Exception):
            Recording(damaged, found).load()
        assert {module for module, _ in found} <= modules
    assert accepted > 10
