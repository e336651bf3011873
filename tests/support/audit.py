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
from safetensors.numpy import load_file, save

if TYPE_CHECKING:
    from pathlib import Path

MANIFEST_NAME = "dcp-hf.json"

_NBYTES = {"4": 1, "8": 1, "16": 2, "32": 4, "64": 8}


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint, with the digests that version 2 keeps in other files.

    Each DCP file gets its `ranges` as `[start, nbytes, digest]`, and each output file its `tensors`
    as `[start, dtype, shape, blocks]` by key. A block is `[rank, start, nbytes, loops, digest]`,
    with a `[count, stride]` for each loop over its runs.
    """
    manifest = dict(json.loads((directory / MANIFEST_NAME).read_bytes()))
    assert manifest["format"] == "dcp-hf"
    assert manifest["version"] in (1, 2)
    assert manifest["digest"] == "xxh3_64"
    if manifest["version"] == 2:
        _add_digests(directory, manifest)
    return manifest


def _add_digests(directory: Path, manifest: dict[str, Any]) -> None:
    exports = list(_export_files(manifest).items())
    for name, file in exports:
        file["tensors"] = _tensors_in(directory / name)
    for file in manifest["dcp"].values():
        file["ranges"] = []
    for name, entry in manifest["digests"].items():
        columns = {k: c.tolist() for k, c in load_file(directory / name).items()}
        files = [one for one in manifest["dcp"].values() if one["rank"] == entry["rank"]]
        for number, *one, digest in _rows(columns, "dcp", "file", "start", "nbytes", "digest"):
            files[number]["ranges"].append([*one, f"{digest:016x}"])
        loops = iter(columns["hf.loops"])
        names = ("file", "start", "nbytes", "loop_count", "digest")
        for number, start, nbytes, count, digest in _rows(columns, "hf", *names):
            own = [next(loops) for _ in range(count)]
            if exports:
                block = [entry["rank"], start, nbytes, own, f"{digest:016x}"]
                tensors = exports[number][1]["tensors"].values()
                before = [one for one in tensors if one[0] <= start and math.prod(one[2])]
                max(before, key=lambda one: one[0])[3].append(block)


def _rows(columns: dict[str, list[int]], half: str, *names: str) -> Any:
    return zip(*(columns[f"{half}.{name}"] for name in names), strict=True)


def _tensors_in(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        nbytes = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(nbytes - 8))
    header.pop("__metadata__", None)
    found = sorted(header.items(), key=lambda one: one[1]["data_offsets"])
    places = {key: one["data_offsets"] for key, one in found}
    return {key: [nbytes + places[key][0], one["dtype"], one["shape"], []] for key, one in found}


def write_manifest(directory: Path, fields: dict[str, Any]) -> None:
    """Write a manifest that `read_manifest` returned, perhaps changed, and its digests files."""
    fields = json.loads(json.dumps(fields))
    if fields.get("version") == 2:
        _write_digests(directory, fields)
    fields.pop("digest_above", None)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    above = ("{\n" + ",\n".join(lines) + ",\n").encode()
    last = f'"digest_above": "{xxhash.xxh3_64_hexdigest(above)}"\n}}\n'
    (directory / MANIFEST_NAME).write_bytes(above + last.encode())


def _write_digests(directory: Path, fields: dict[str, Any]) -> None:
    exports = [] if fields["hf"] is None else list(fields["hf"]["files"].values())
    blocks = [
        (number, *block)
        for number, file in enumerate(exports)
        for tensor in file.pop("tensors", {}).values()
        for block in tensor[3]
    ]
    ranges = [(file["rank"], file.pop("ranges", [])) for file in fields["dcp"].values()]
    for name, entry in fields["digests"].items():
        rank = entry["rank"]
        own = [block for block in blocks if block[1] == rank]
        files = [found for writer, found in ranges if writer == rank]
        dcp = [(number, *one) for number, found in enumerate(files) for one in found]
        loops = [loop for block in own for loop in block[4]]
        columns = {
            "hf.file": np.array([block[0] for block in own], np.uint32),
            "hf.start": np.array([block[2] for block in own], np.int64),
            "hf.nbytes": np.array([block[3] for block in own], np.int64),
            "hf.loop_count": np.array([len(block[4]) for block in own], np.uint32),
            "hf.loops": np.array(loops, np.int64).reshape(len(loops), 2),
            "hf.digest": np.array([int(block[5], 16) for block in own], np.uint64),
            "dcp.file": np.array([one[0] for one in dcp], np.uint32),
            "dcp.start": np.array([one[1] for one in dcp], np.int64),
            "dcp.nbytes": np.array([one[2] for one in dcp], np.int64),
            "dcp.digest": np.array([int(one[3], 16) for one in dcp], np.uint64),
        }
        data = save(columns)
        (directory / name).write_bytes(data)
        entry |= {"nbytes": len(data), "digest": xxhash.xxh3_64_hexdigest(data)}
        numbers = [block[0] for block in own]
        entry["hf_files"] = [min(numbers), max(numbers)] if numbers else None


def faults(directory: Path) -> list[str]:
    """Say what is wrong with a checkpoint: files too many or too few, and bytes that differ."""
    manifest = read_manifest(directory)
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    listed = [*manifest["files"], *manifest["dcp"], *_export_files(manifest)]
    listed += manifest.get("digests", {})
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
    if name in manifest.get("digests", {}):
        entry = manifest["digests"][name]
        size = _size_fault(content, entry["nbytes"])
        return size or _digest_fault("content", content, entry["digest"])
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
        if all(len(piece) == 5 for piece in pieces):
            fault = fault or _runs_fault(key, content, start, reached, pieces)
        else:
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


def _runs_fault(key: str, content: bytes, start: int, stop: int, blocks: list[Any]) -> str | None:
    """Say what is wrong with blocks of version 2, which are runs of bytes of the file."""
    count = np.zeros(len(content) + 1, dtype=int)
    for rank, begin, nbytes, loops, digest in blocks:
        where = np.array(begin)
        for number, stride in (*loops, (nbytes, 1)):
            where = where[..., None] + np.arange(number) * stride
        where = where.reshape(-1)
        if where.max() >= len(content):
            return f"{key} reaches beyond its file"
        np.add.at(count, where, 1)
        data = np.frombuffer(content, np.uint8)[where].tobytes()
        fault = _digest_fault(f"{key} of rank {rank}", data, digest)
        if fault is not None:
            return fault
    return None if (count[start:stop] == 1).all() else f"{key} is not covered once"


def _indices(offsets: list[int], extent: list[Any], shape: list[int]) -> Any:
    """Return the flat indices of a block, in order: of a box, or of loops `[count, dim, step]`."""
    is_box = not (extent and isinstance(extent[0], list))
    loops = [[n, d, 1] for d, n in enumerate(extent)] if is_box else extent
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    found = np.array(sum(o * s for o, s in zip(offsets, strides, strict=True)))
    for count, dim, step in loops:
        found = found[..., None] + np.arange(count) * (step * strides[dim])
    return found.reshape(-1)
