"""Recompute from the bytes of a checkpoint what its manifest says of them, without the package.

The manifest itself is what the rest is compared with.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST_NAME = "dcp-hf.json"

_NBYTES = {"4": 1, "8": 1, "16": 2, "32": 4, "64": 8}


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint."""
    manifest = json.loads((directory / MANIFEST_NAME).read_bytes())
    assert (manifest["format"], manifest["version"]) == ("dcp-hf", 1)
    assert manifest["digest"] == "xxh3_64"
    return dict(manifest)


def faults(directory: Path) -> list[str]:
    """Say what is wrong with a checkpoint: files too many or too few, and bytes that differ."""
    manifest = read_manifest(directory)
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    listed = [*manifest["files"], *manifest["dcp"], *_export_files(manifest)]
    problems = [f"{name} is listed twice" for name in set(listed) if listed.count(name) > 1]
    problems += [f"{name} is missing" for name in sorted(set(listed) - found)]
    problems += [
        f"{name} is not accounted for" for name in sorted(found - {*listed, MANIFEST_NAME})
    ]
    for name in sorted(found & set(listed)):
        fault = file_fault(manifest, name, (directory / name).read_bytes())
        if fault is not None:
            problems.append(f"{name}: {fault}")
    return problems


def file_fault(manifest: dict[str, Any], name: str, content: bytes) -> str | None:
    """Say how the content of one file differs from what the manifest says of it."""
    if name in manifest["files"]:
        nbytes, digest = manifest["files"][name]
        return _size_fault(content, nbytes) or _digest_fault("content", content, digest)
    if name in manifest["dcp"]:
        return _dcp_fault(manifest["dcp"][name], content)
    return _export_fault(_export_files(manifest)[name], content)


def _export_files(manifest: dict[str, Any]) -> dict[str, Any]:
    hf = manifest["hf"]
    return {} if hf is None else {f"{hf['subdir']}/{name}": f for name, f in hf["files"].items()}


def _size_fault(content: bytes, nbytes: int) -> str | None:
    return None if len(content) == nbytes else f"{len(content)} bytes instead of {nbytes}"


def _digest_fault(what: str, data: bytes, digest: str) -> str | None:
    found = xxhash.xxh3_64_hexdigest(data)
    return None if found == digest else f"{what} has digest {found} instead of {digest}"


def _dcp_fault(file: dict[str, Any], content: bytes) -> str | None:
    reached, rest = 0, b""
    for start, nbytes, digest in file["ranges"]:
        if start < reached:
            return f"ranges overlap at {start}"
        rest += content[reached:start]
        reached = start + nbytes
        fault = _digest_fault(f"range at {start}", content[start:reached], digest)
        if fault is not None:
            return fault
    rest += content[reached:]
    return _size_fault(content, file["nbytes"]) or _digest_fault("rest", rest, file["rest"])


def _export_fault(file: dict[str, Any], content: bytes) -> str | None:
    fault = _size_fault(content, file["nbytes"]) or _digest_fault(
        "header", content[: file["header_nbytes"]], file["header"]
    )
    reached = file["header_nbytes"]
    for key, (start, dtype, shape, pieces) in file["tensors"].items():
        if start != reached:
            return fault or f"{key} starts at {start} instead of {reached}"
        reached = start + math.prod(shape) * _itemsize(dtype)
        fault = fault or _tensor_fault(key, content[start:reached], shape, pieces)
    return fault or _size_fault(content, reached)


def _itemsize(dtype: str) -> int:
    if dtype == "BOOL":
        return 1
    bits = "".join(itertools.takewhile(str.isdigit, dtype.lstrip("BFUIC")))
    return _NBYTES[bits]


def _tensor_fault(key: str, data: bytes, shape: list[int], blocks: list[Any]) -> str | None:
    if not math.prod(shape):
        return None
    elements = np.frombuffer(data, dtype=np.uint8).reshape(math.prod(shape), -1)
    count = np.zeros(math.prod(shape), dtype=int)
    for rank, offsets, extent, digest in blocks:
        where = _indices(offsets, extent, shape)
        np.add.at(count, where, 1)
        fault = _digest_fault(f"{key} of rank {rank}", elements[where].tobytes(), digest)
        if fault is not None:
            return fault
    return None if (count == 1).all() else f"{key} is not covered once"


def _indices(offsets: list[int], extent: list[Any], shape: list[int]) -> Any:
    """Return the flat indices of a block, in order: of a box, or of loops `[count, dim, step]`."""
    is_box = not (extent and isinstance(extent[0], list))
    loops = [[n, d, 1] for d, n in enumerate(extent)] if is_box else extent
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    found = np.array(sum(o * s for o, s in zip(offsets, strides, strict=True)))
    for count, dim, step in loops:
        found = found[..., None] + np.arange(count) * (step * strides[dim])
    return found.reshape(-1)
