"""Ranks that write cells of a file for each other leave the same files as ranks that do not."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport, WriteSlots, verify
from dcp_hf_writer.save import write_strategy
from support.ranks import run_ranks
from support.sharded_models import SHARDINGS, build_model, shard

if TYPE_CHECKING:
    from pathlib import Path

# These hold the id of the save, and times.
_DIFFER = {".metadata", "dcp-hf.json"}

# Cells that end between elements, and cells that end within them; large and small budgets.
CELLS = {4096: 256 << 20, 999: 1 << 20}

EXPORTS: dict[str, dict[str, Any]] = {
    "one file": {},
    "files": {"max_shard_size": 20_000},
    "cast": {"dtype": torch.bfloat16, "max_shard_size": "30KB"},
    "once": {},
}


def tree(root: Path) -> dict[str, str]:
    """Return the digest of each file that must not differ between two saves of one state."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in _DIFFER
    }


def manifest(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "dcp-hf.json").read_text())
    return found


def save_both_ways(rank: int, world_size: int, model: str, sharding: str, root: Path) -> None:
    """Save a model directly and by exchange, with each export; each rank calls it."""
    built = build_model(model)
    state = {"model": (shard(built, sharding) if world_size > 1 else built).state_dict()}
    with pytest.MonkeyPatch.context() as patch:
        for name, options in EXPORTS.items():
            weights = "once" if name == "once" else "both"
            export = HFExport(assets=(built.config,), **options)
            for cell, budget in {0: 256 << 20, **CELLS}.items():
                patch.setattr(write_strategy, "cell_nbytes_for", lambda *_, cell=cell: cell)
                writer = HFDualWriter(
                    root / name / str(cell),
                    export=export,
                    weights=weights,
                    strategy="exchange" if cell else "direct",
                    host_budget_bytes=budget,
                    slots=WriteSlots(1, directory=root / "slots"),
                )
                dcp.async_save(state, storage_writer=writer).result()


@pytest.mark.parametrize(
    ("model", "sharding"),
    [
        ("llama_tied", "fsdp2"),
        ("llama_bf16", "fsdp2_tp2"),
        ("gpt_oss", "fsdp4"),
        ("gemma3", "tp2"),
        ("llama", "one"),
    ],
)
def test_exchange_writes_the_same_files_as_direct_writes(
    model: str, sharding: str, tmp_path: Path
) -> None:
    world_size = SHARDINGS.get(sharding, 1)
    run_ranks(save_both_ways, world_size, model, sharding, tmp_path)
    for name in EXPORTS:
        expected = manifest(tmp_path / name / "0")
        for cell in map(str, CELLS):
            found = tmp_path / name / cell
            assert tree(found) == tree(tmp_path / name / "0")
            told = manifest(found)
            assert told["hf"] == expected["hf"]
            sent = told["nbytes"].pop("hf sent")
            assert (sent > 0) == (world_size > 1)
            assert sent < told["nbytes"]["hf"]
            assert told["nbytes"]["hf"] == expected["nbytes"]["hf"]
            assert verify(found).ok
