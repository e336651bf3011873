"""Tensors whose every element names the save that wrote it, and what a checkpoint says of itself.

A checkpoint that mixes two saves is found by any of its elements, not only one that lost some. What
is expected follows from numbers and names, so it needs no place on the disk under test.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_hf_writer import HFExport
from support.audit import read_manifest
from support.compare import tensor_difference
from support.stock_readers import load_dcp, load_hf

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

MANIFEST = "dcp-hf.json"

# Name in the model's entry: shape, dtype, dimension that is sharded.
_MODEL: dict[str, tuple[tuple[int, ...], torch.dtype, int | None]] = {
    "embed": ((97, 16), torch.float32, 0),
    "proj": ((24, 40), torch.float32, 1),
    "norm": ((16,), torch.float32, None),
    "experts": ((6, 8, 5), torch.bfloat16, 0),
    "count": ((), torch.int64, None),
}
_MOMENTS = ("embed", "proj")
# Rows of one MiB, for tests that fill a device.
_ROW_SHAPE = (1024, 256)

# Several files for the tensors above, and one for each that is larger.
EXPORT = HFExport(max_shard_size=4000, assets={"config.json": b'{"model_type": "none"}'})

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAVE_BITS = 4


def filled(save: int, fqn: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor whose elements hold the number of a save (1 to 7), and a hash of place and FQN.

    The number is in the highest bits of each element.
    """
    bits = 8 * dtype.itemsize
    place = torch.arange(math.prod(shape), dtype=torch.int64) * 2654435761 + zlib.crc32(
        fqn.encode()
    )
    low = place % (1 << min(bits - _SAVE_BITS, 32))
    high = torch.tensor(save << (bits - _SAVE_BITS), dtype=torch.int64)
    return (low | high).to(_INTEGERS[dtype.itemsize]).view(dtype).reshape(shape)


def saves_named_by(tensor: torch.Tensor) -> set[int]:
    """Return the numbers of the saves that the elements of a tensor name."""
    whole = tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.dtype.itemsize])
    return {int(n) for n in (whole.long() >> (8 * tensor.itemsize - _SAVE_BITS)).unique()}


def whole_state(save: int, *, mib: int = 0) -> dict[str, Any]:
    """Return the state of a save as plain tensors; `mib` rows of one MiB more in the model."""
    model = {
        name: filled(save, f"model.{name}", shape, dtype)
        for name, (shape, dtype, _) in _MODEL.items()
    }
    for i in range(mib):
        model[f"row{i}"] = filled(save, f"model.row{i}", _ROW_SHAPE, torch.float32)
    moments = {
        name: filled(save, f"optim.{name}", _MODEL[name][0], torch.float32) for name in _MOMENTS
    }
    return {"model": model, "optim": moments, "save": save}


def sharded_state(save: int, *, mib: int = 0) -> dict[str, Any]:
    """Return the state of a save as the ranks of the default group hold it."""
    state = whole_state(save, mib=mib)
    if not torch.distributed.is_initialized():
        return state
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for entry in (state["model"], state["optim"]):
        for name, full in entry.items():
            dim = _MODEL[name][2] if name in _MODEL else 0
            if dim is not None:
                # Every rank has it whole, so nothing need be sent.
                entry[name] = distribute_tensor(full, mesh, [Shard(dim)], src_data_rank=None)
    return state


def is_sharded(state: Mapping[str, Any]) -> bool:
    """Whether a state is one of several ranks."""
    return isinstance(state["model"]["embed"], DTensor)


def save_held_by(
    checkpoint: Path, *, has_export: bool = True, mib: int = 0, others: Collection[str] = ()
) -> int:
    """Return the number of the save that every byte of a checkpoint comes from.

    Read with stock torch and safetensors; the manifest's digests are checked against the bytes.

    Args:
        checkpoint: The directory.
        has_export: Whether it must have a HuggingFace half.
        mib: As in `whole_state`.
        others: Files that may be there although no save made them.

    Raises:
        AssertionError: If the halves, or parts of them, come from different saves, or are damaged.
    """
    loaded = load_dcp(checkpoint, whole_state(1, mib=mib))
    save = int(loaded["save"])
    expected = whole_state(save, mib=mib)
    halves = {"dcp model": loaded["model"], "dcp optim": loaded["optim"]}
    wanted = {"dcp model": expected["model"], "dcp optim": expected["optim"]}
    if has_export:
        halves["hf"], wanted["hf"] = load_hf(checkpoint / "hf"), expected["model"]
        config = checkpoint / "hf" / "config.json"
        assert config.read_bytes() == b'{"model_type": "none"}', config
    for half, tensors in halves.items():
        difference = tensor_difference(tensors, wanted[half])
        named = {name: sorted(saves_named_by(one)) for name, one in tensors.items()}
        assert difference is None, f"{checkpoint} {half}, save {save}: {difference}; {named}"
    assert (checkpoint / "hf").exists() == has_export, f"{checkpoint}: hf/ is there by mistake"
    fault = manifest_fault(checkpoint, others=others)
    assert fault is None, f"{checkpoint}: {fault}"
    return save


def manifest_fault(checkpoint: Path, *, others: Collection[str] = ()) -> str | None:
    """Say where the bytes of a checkpoint differ from its manifest; `None` if they do not."""
    try:
        manifest = read_manifest(checkpoint)
    except (OSError, ValueError, SafetensorError) as error:
        return f"digests cannot be read: {error}"
    contents = {
        path.relative_to(checkpoint).as_posix(): path.read_bytes()
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    export = manifest["hf"] or {"subdir": "hf", "files": {}}
    in_export = {f"{export['subdir']}/{name}": one for name, one in export["files"].items()}
    listed = manifest["files"].keys() | manifest["dcp"].keys() | in_export.keys()
    listed |= manifest["digests"].keys()
    if not listed <= contents.keys() <= listed | set(others):
        return f"lists {sorted(listed)}, there are {sorted(contents)}"
    whole = manifest["files"] | {
        name: [one["nbytes"], one["digest"]] for name, one in manifest["digests"].items()
    }
    faults = [
        "is not what was written"
        for name, (nbytes, digest) in whole.items()
        if (nbytes, digest) != (len(contents[name]), _digest(contents[name]))
    ]
    faults += [_dcp_fault(contents[name], one) for name, one in manifest["dcp"].items()]
    faults += [_export_fault(contents[name], one) for name, one in in_export.items()]
    return next((fault for fault in faults if fault is not None), None)


def _digest(data: bytes) -> str:
    return str(xxhash.xxh3_64_hexdigest(data))


def _dcp_fault(content: bytes, listed: Mapping[str, Any]) -> str | None:
    rest, position = [], 0
    for start, nbytes, digest in listed["ranges"]:
        if _digest(content[start : start + nbytes]) != digest:
            return f"bytes {start} to {start + nbytes} differ from their digest"
        rest.append(content[position:start])
        position = start + nbytes
    rest.append(content[position:])
    if len(content) != listed["nbytes"] or _digest(b"".join(rest)) != listed["rest"]:
        return f"{len(content)} bytes differ from the {listed['nbytes']} that were written"
    return None


def _export_fault(content: bytes, listed: Mapping[str, Any]) -> str | None:
    if len(content) != listed["nbytes"]:
        return f"has {len(content)} of {listed['nbytes']} bytes"
    if _digest(content[: listed["header_nbytes"]]) != listed["header"]:
        return "the header differs from its digest"
    for key, (start, _, _, pieces) in listed["tensors"].items():
        nbytes = _nbytes(content, key)
        covered = torch.zeros(nbytes, dtype=torch.int64)
        for _, begin, size, loops, digest in pieces:
            where = torch.tensor([begin])
            for count, stride in (*loops, (size, 1)):
                where = (where[:, None] + torch.arange(count) * stride).reshape(-1)
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8)[where]
            if _digest(data.numpy().tobytes()) != digest:
                return f"{key!r} at {begin} differs from its digest"
            covered[where - start] += 1
        if not covered.eq(1).all():
            return f"{key!r}: the digests do not cover each of {nbytes} bytes once"
    return None


def _nbytes(content: bytes, key: str) -> int:
    length = int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8 : 8 + length])[key]["data_offsets"]
    return int(stop - start)
