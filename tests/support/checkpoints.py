"""Small checkpoints of every kind, saved by two ranks, and ways to tamper with them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.mapping.load_spec import Piece
from support.audit import MANIFEST_NAME, read_manifest, write_manifest
from support.small_states import MODEL, state_of

if TYPE_CHECKING:
    from pathlib import Path

ASSETS = {"config.json": b"{}", "nested/tokenizer.json": b"[1, 2]"}

# Two tensors whose elements alternate on disk, so that blocks of it have gaps.
ALTERNATING = [
    LoadSpec(name, global_shape=(7, 4), pieces=[Piece("pair", (7, 8), ((7, 8, 4), (4, 2, 1)), at)])
    for at, name in enumerate(("embed", "head"))
]


def save_kinds(rank: int, world_size: int, root: Path) -> None:
    """Save one checkpoint of each kind below `root`."""
    mesh = init_device_mesh("cpu", (world_size,))
    state = state_of(100, mesh)
    state["model"]["tied"] = state["model"]["layers.0.b"]
    state["model"]["none"] = torch.zeros(0, 3)
    split = LoadSpec("layers.0.w", ["q", "k"], MODEL["layers.0.w"][0], 0)
    many = {"specs": [split, *ALTERNATING], "max_shard_size": 100, "assets": ASSETS}
    kinds: dict[str, dict[str, Any]] = {
        "many": {"export": HFExport(**many, dtype=torch.bfloat16, keep_dtype=("^k$", "norm"))},
        "one": {"export": HFExport()},
        "once": {"export": HFExport(**many), "weights": "once"},
        "dcp-only": {"export": None},
    }
    for name, options in kinds.items():
        writer = HFDualWriter(root / name / "step-100", **options)
        dcp.async_save(state, storage_writer=writer).result()


KINDS = ("many", "one", "once", "dcp-only")


def copied(directory: Path, to: Path) -> Path:
    """Copy a checkpoint, to be tampered with."""
    return shutil.copytree(directory, to, symlinks=True)


def manifest_of(directory: Path) -> dict[str, Any]:
    """Return the fields of a manifest, with the digests, as `read_manifest` does."""
    return read_manifest(directory)


def encoded(fields: dict[str, Any]) -> bytes:
    """Encode a manifest as the writer does, with the digest of what it says."""
    lines = (
        f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}"
        for name, value in fields.items()
        if name != "digest_above"
    )
    above = ("{\n" + ",\n".join(lines) + ",\n").encode()
    return above + f'"digest_above": "{xxhash.xxh3_64_hexdigest(above)}"\n}}\n'.encode()


def put_manifest(directory: Path, fields: dict[str, Any]) -> None:
    """Replace the manifest of a checkpoint, as one could who knows how it is made."""
    write_manifest(directory, fields)


def sign(directory: Path, name: str) -> None:
    """Put size and digest of a whole file into the manifest, as one could who tampers with it."""
    fields = json.loads((directory / MANIFEST_NAME).read_bytes())
    content = (directory / name).read_bytes()
    fields["files"][name] = [len(content), xxhash.xxh3_64_hexdigest(content)]
    (directory / MANIFEST_NAME).write_bytes(encoded(fields))


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)
