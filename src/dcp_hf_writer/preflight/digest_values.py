"""Digest values that are no tensors, so that ranks can compare them.

The digests of equal values are equal in every process: they do not depend on the order of a dict or
a set, nor on which objects two places share. Pickled bytes depend on all of these.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable


_SIMPLE = frozenset({int, float, bool, str, bytes, type(None)})

# Longer lists are pickled, which is faster for them.
_FEW = 64


def digest_value(value: Any, tensors: list[torch.Tensor]) -> int | None:
    """Return a digest of a value; `None` if it cannot be pickled.

    Args:
        value: Any value.
        tensors: The tensors within the value are appended, in an order that does not depend on the
            process. The digest does not cover what they hold.
    """
    found: list[torch.Tensor] = []
    try:
        digest = _Digest(found).of(value)
    except Exception:  # noqa: BLE001 - `__reduce__` of any class may raise anything
        # Perhaps the value contains itself. Then its pickled bytes, with the tensors, must do.
        return _digest_pickled(value)
    tensors += found
    return int.from_bytes(digest, "big")


def _digest_pickled(value: Any) -> int | None:
    try:
        data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 - `__reduce__` of any class may raise anything
        # The write step pickles the value too, and says that it cannot be pickled.
        return None
    return int.from_bytes(_hash(b"pickled", [data]), "big")


class _Digest:
    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors
        self._within: set[int] = set()

    def of(self, value: Any) -> bytes:
        if _is_simple(value):
            return _hash(b"simple", [repr(value).encode()])
        known = self.of_container(value)
        if known is not None:
            return known
        buffer = io.BytesIO()
        _Pickler(buffer, self).dump(value)
        return _hash(b"value", [buffer.getvalue()])

    def of_container(self, value: Any) -> bytes | None:
        """Return the digest of a value whose pickled bytes may differ; `None` for other values."""
        if isinstance(value, torch.Tensor):
            self._tensors.append(value)
            return b"tensor"
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            kind = f"{value.dtype.str} {value.shape}".encode()
            return _hash(b"array", [kind, np.ascontiguousarray(value).tobytes()])
        if isinstance(value, io.BytesIO):
            return _hash(b"bytes", [value.getvalue()])
        if not isinstance(value, (Mapping, set, frozenset)):
            return None
        if id(value) in self._within:
            msg = "the value contains itself"
            raise ValueError(msg)
        self._within.add(id(value))
        if isinstance(value, Mapping):
            keys = sorted((self.of(key), i) for i, key in enumerate(value))
            values = list(value.values())
            found = _hash(b"mapping", [part for k, i in keys for part in (k, self.of(values[i]))])
        else:
            found = _hash(b"set", sorted(map(self.of, value)))
        self._within.discard(id(value))
        return found


def _is_simple(value: Any) -> bool:
    """Whether equal values have equal texts; such a digest takes a tenth of the time."""
    if type(value) in {list, tuple}:
        return len(value) <= _FEW and all(type(one) in _SIMPLE for one in value)
    return type(value) in _SIMPLE


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, digest: _Digest) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        # Without the memo, an object that occurs twice gives the same bytes as two equal objects.
        self.fast = True
        self._digest = digest

    def persistent_id(self, obj: Any) -> bytes | None:
        """Replace containers within the value by their digest."""
        return self._digest.of_container(obj)


def _hash(kind: bytes, parts: Iterable[bytes]) -> bytes:
    digest = xxhash.xxh3_64(kind)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
