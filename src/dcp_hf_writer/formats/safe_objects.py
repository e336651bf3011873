"""Decide whether unpickling an object would only build values, and run no code that it names.

torch's planners unpickle the objects of a checkpoint without any restriction. So before the reader
gives them the bytes of an object, it walks through the pickle here. The walk builds stand-ins
instead of most objects, and checks the arguments of every call that unpickling would make.

Admitted are the values that trainers keep beside the weights: plain values and containers, tensors,
`BytesIO`, numpy arrays and scalars, dates and times, paths, UUIDs, decimals, fractions, namespaces,
and the enums of the standard library.

Pure.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import fractions
import functools
import importlib
import math
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dcp_hf_writer.formats.parse_torch_archive import TENSOR_GLOBALS, described_storage
from dcp_hf_writer.formats.restricted_unpickle import (
    Admitted,
    Class,
    Constant,
    Function,
    unpickle,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def check_is_plain(pickled: bytes, *, path: str) -> None:
    """Check that unpickling an object would run no code that the object names.

    Args:
        pickled: The pickle within the archive that `torch.save` wrote.
        path: The file, for error messages.

    Raises:
        CorruptCheckpointError: If the pickle contains anything that is not admitted, or is damaged;
            the error names it.
    """
    unpickle(pickled, _ADMITTED, path=path, persistent=described_storage, keys=_SCALARS)


_SCALARS: frozenset[type] = frozenset({str, int, float, bool, bytes, complex, type(None)})

# The modules of the standard library that define enums. Importing them has no other effect.
_ENUM_MODULES = frozenset(
    {
        *("ast", "calendar", "enum", "http", "inspect", "plistlib", "pstats", "py_compile", "re"),
        *("signal", "socket", "ssl", "symtable", "uuid"),
    }
)


class _AdmittedNames(dict[tuple[str, str], Admitted]):
    """A table that also finds the enums of the standard library, and imports only their modules."""

    def get(self, name: tuple[str, str], default: Any = None) -> Any:
        found = super().get(name)
        if found is None and name[0] in _ENUM_MODULES:
            found = _enum(*name)
        return default if found is None else found


@functools.lru_cache(maxsize=256)
def _enum(module: str, name: str) -> Admitted | None:
    found = getattr(importlib.import_module(module), name, None)
    if isinstance(found, enum.Enum):
        # Before Python 3.11, members of `signal` and `socket` pickle as globals of their modules.
        return Constant(found)
    if isinstance(found, enum.EnumMeta) and len(found):
        return Function(_EnumClass(found))
    return None


class _EnumClass:
    """Finds the member of an enum that has a value."""

    def __init__(self, kind: enum.EnumMeta) -> None:
        self.kind = kind

    def __call__(self, *values: Any) -> Any:
        (value,) = values
        _require(type(value) in _SCALARS)
        return self.kind(value)


def _attribute(owner: Any, name: Any) -> Any:
    """Stand in for `getattr`: the first releases of Python 3.11 pickle members by their names."""
    found = owner.call if isinstance(owner, Function) else None
    if not isinstance(found, _EnumClass) or type(name) is not str:
        msg = "getattr of something other than an enum"
        raise ValueError(msg)
    return found.kind[name]


def _require(is_fit: bool) -> None:  # noqa: FBT001 - the one thing it is about
    if not is_fit:
        msg = "arguments or a state that this class does not have"
        raise ValueError(msg)


def _calling(function: Callable[..., Any], *kinds: type) -> Function:
    """Admit a function of the standard library that only computes; check its arguments' types."""
    allowed = {*kinds, type(None)}

    def call(*arguments: Any) -> Any:
        _require(all(type(one) in allowed for one in arguments))
        try:
            return function(*arguments)
        except ArithmeticError as error:
            raise ValueError(str(error)) from error

    return Function(call)


def _encoded(text: Any, encoding: Any) -> bytes:
    _require(type(text) is str and encoding in ("latin1", "latin-1"))
    return bytes(text, "latin-1")


def _byte_array(*arguments: Any) -> bytes:
    if len(arguments) == 1:
        _require(type(arguments[0]) is bytes)
        return bytes(arguments[0])
    return _encoded(*arguments) if arguments else b""


def _set(values: Any) -> frozenset[Any]:
    # Hashing nested tuples could take forever.
    _require(type(values) in (list, tuple) and all(map(_hashes_fast, values)))
    return frozenset(values)


def _hashes_fast(value: Any) -> bool:
    if type(value) is tuple:
        return all(type(one) in _SCALARS for one in value)
    return type(value) in _SCALARS or isinstance(value, enum.Enum)


def _list(*arguments: Any) -> list[Any]:
    """Stand in for a deque, which pickles with no arguments or with two: its items follow."""
    if arguments:
        values, length = arguments
        _require(type(values) in (list, tuple) and type(length) in (int, type(None)))
    return []


def _dict(*arguments: Any) -> dict[Any, Any]:
    """Stand in for an OrderedDict or a Counter; items may follow."""
    _require(not arguments or (len(arguments) == 1 and type(arguments[0]) in (dict, list)))
    return {}


def _dict_with_default(*arguments: Any) -> dict[Any, Any]:
    (factory,) = arguments or (None,)
    call = factory.call if isinstance(factory, Function) else None
    is_known = factory is None or any(factory is kind for kind in _FACTORIES)
    _require(is_known or call in (_set, _dict, _list))
    return {}


def _fraction(*arguments: Any) -> fractions.Fraction:
    if len(arguments) == 1:
        # An exponent could ask for a number of any length.
        _require(type(arguments[0]) is str and _RATIO.fullmatch(arguments[0]) is not None)
    else:
        _require(all(type(one) is int for one in arguments))
    return fractions.Fraction(*arguments)


_RATIO = re.compile(r"-?\d{1,4000}(/\d{1,4000})?", re.ASCII)


class _BytesIO:
    """Stands in for a `BytesIO` or `StringIO`."""


def _build_stream(_: Any, state: Any) -> None:
    _require(type(state) is tuple)
    *content, position, attributes = state
    _require(all(type(one) in (bytes, str, type(None)) for one in content))
    _require(type(position) is int and position >= 0 and attributes in (None, {}))


class _UUID:
    """Stands in for a `UUID`."""


def _build_uuid(_: Any, state: Any) -> None:
    _require(type(state) is dict and state.keys() <= {"int", "is_safe"})
    _require(all(type(one) is int for one in state.values()))


class _Namespace:
    """Stands in for an `argparse.Namespace` or a `SimpleNamespace`."""


def _build_namespace(_: Any, state: Any) -> None:
    _require(type(state) is dict and all(type(one) is str for one in state))


def _namespace(*arguments: Any) -> _Namespace:
    _require(not arguments)
    return _Namespace()


class _Dtype:
    """Stands in for a numpy dtype."""

    def __init__(self, found: np.dtype[Any]) -> None:
        self.found = found


# What numpy writes of dtypes that are not structured, such as f8, U12, M8.
_DTYPE = re.compile(r"b1|[iuf]\d{1,2}|c\d{1,2}|[SU]\d{1,9}|O8|[mM]8", re.ASCII)


def _dtype(name: Any, align: Any, copy: Any) -> _Dtype:
    _require(type(name) is str and _DTYPE.fullmatch(name) is not None)
    _require(type(align) in (bool, int) and type(copy) in (bool, int))
    return _Dtype(np.dtype(name))


def _build_dtype(target: Any, state: Any) -> None:
    """Set byte order and unit; refuse a state that numpy would not write for this dtype."""
    _require(type(state) is tuple and len(state) in (8, 9) and state[1] in ("<", ">", "|"))
    kind = target.found
    if len(state) == 9:  # noqa: PLR2004 - a time has a unit
        _require(kind.kind in "mM")
        kind = np.dtype(f"{kind.kind}8[{_unit(state[8])}]")
    kind = kind.newbyteorder(state[1])
    _require(state[1:8] == kind.__reduce__()[2][1:8])
    target.found = kind


def _unit(metadata: Any) -> str:
    """Return the unit of a time, such as `ns` or `25s`."""
    _, (name, count, denominator, event) = metadata
    _require(type(name) is bytes and (denominator, event) == (1, 1) and type(count) is int)
    return f"{count}{name.decode()}" if name != b"generic" else "generic"


class _Array:
    """Stands in for a numpy array."""


def _array(kind: Any, shape: Any, code: Any) -> _Array:
    _require(kind is np.ndarray and shape == (0,) and code in (b"b", "b"))
    return _Array()


def _build_array(_: Any, state: Any) -> None:
    """Check that the data has the size that shape and dtype imply: numpy would trust them."""
    _require(type(state) is tuple and len(state) == 5)  # noqa: PLR2004 - as numpy writes it
    _, shape, dtype, is_fortran, data = state
    _require(type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape))
    _require(isinstance(dtype, _Dtype) and type(is_fortran) in (bool, int))
    count = math.prod(shape)
    if dtype.found.hasobject:
        _require(type(data) is list and len(data) == count)
    else:
        _require(type(data) is bytes and len(data) == count * dtype.found.itemsize)


def _scalar(dtype: Any, data: Any) -> np.generic:
    _require(isinstance(dtype, _Dtype) and not dtype.found.hasobject)
    _require(type(data) is bytes and len(data) == dtype.found.itemsize)
    found: np.generic = np.frombuffer(data, dtype.found)[0]
    return found


def _device(*arguments: Any) -> torch.device:
    _require(all(type(one) in (str, int) for one in arguments))
    try:
        return torch.device(*arguments)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _named(modules: Iterable[str], entries: dict[str, Admitted]) -> dict[tuple[str, str], Admitted]:
    return {(module, name): one for module in modules for name, one in entries.items()}


_FACTORIES = (list, dict, int, float, str, bool, tuple)

_TIMES = (dt.timedelta, dt.timezone)

_ADMITTED = _AdmittedNames(
    {
        **TENSOR_GLOBALS,
        ("torch", "device"): Function(_device),
        ("torch", "Size"): Function(torch.Size),
        # The pickles of torch.save name builtins as Python 2 did.
        **_named(
            ("__builtin__", "builtins"),
            {
                **{kind.__name__: Constant(kind) for kind in _FACTORIES},
                "unicode": Constant(str),
                "long": Constant(int),
                "getattr": Function(_attribute),
                "bytes": Function(_byte_array),
                "bytearray": Function(_byte_array),
                "set": Function(_set),
                "frozenset": Function(_set),
                "complex": _calling(complex, float, int),
                "range": _calling(range, int),
                "xrange": _calling(range, int),
                "slice": _calling(slice, int),
            },
        ),
        ("_codecs", "encode"): Function(_encoded),
        ("_io", "BytesIO"): Class(_BytesIO, _build_stream, has_state=False),
        ("_io", "StringIO"): Class(_BytesIO, _build_stream, has_state=False),
        **_named(
            ("collections",),
            {
                "OrderedDict": Function(_dict),
                "Counter": Function(_dict),
                "defaultdict": Function(_dict_with_default),
                "deque": Function(_list),
            },
        ),
        **_named(
            ("datetime",),
            {
                "datetime": _calling(dt.datetime, int, bytes, str, *_TIMES),
                "date": _calling(dt.date, int, bytes, str),
                "time": _calling(dt.time, int, bytes, str, *_TIMES),
                "timedelta": _calling(dt.timedelta, int),
                "timezone": _calling(dt.timezone, str, *_TIMES),
            },
        ),
        ("decimal", "Decimal"): _calling(decimal.Decimal, str),
        ("fractions", "Fraction"): Function(_fraction),
        # Python 3.13 renamed the module of paths.
        **_named(
            ("pathlib", "pathlib._local"),
            {
                "PosixPath": _calling(PurePosixPath, str),
                "PurePosixPath": _calling(PurePosixPath, str),
                "WindowsPath": _calling(PurePosixPath, str),
                "PureWindowsPath": _calling(PurePosixPath, str),
            },
        ),
        ("uuid", "UUID"): Class(_UUID, _build_uuid),
        ("argparse", "Namespace"): Class(_Namespace, _build_namespace, has_state=False),
        ("types", "SimpleNamespace"): Function(
            _namespace, Class(_Namespace, _build_namespace, has_state=False)
        ),
        ("numpy", "dtype"): Function(_dtype, Class(_Dtype, _build_dtype)),
        ("numpy", "ndarray"): Constant(np.ndarray),
        # numpy 2 renamed the module.
        **_named(
            ("numpy.core.multiarray", "numpy._core.multiarray"),
            {
                "_reconstruct": Function(_array, Class(_Array, _build_array)),
                "scalar": Function(_scalar),
            },
        ),
        **_named(
            ("numpy",),
            {
                name: Constant(kind)
                for name, kind in vars(np).items()
                if isinstance(kind, type) and issubclass(kind, np.generic)
            },
        ),
    }
)
