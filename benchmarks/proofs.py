"""What the demo's checkpoint must show in fresh processes that know nothing of the training."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from training import SENTENCES, build, embed, fingerprints

if TYPE_CHECKING:
    from ranks import Rank


@dataclass(frozen=True, slots=True)
class Proof:
    """How one check turned out."""

    subject: str
    """What was done with the checkpoint."""
    passed: bool
    finding: str
    """What was compared; or what differed."""


def resume(rank: Rank, checkpoint: str, expected: str) -> Proof:
    """Resume by stock `dcp.load` on this many ranks; hold parameters and optimizer to digests."""
    mesh = init_device_mesh("cpu", (rank.world_size,))
    # Random weights and a fresh optimizer, so that nothing is right before it is loaded.
    model, optimizer, _ = build(os.path.join(checkpoint, "hf"), mesh, trained=False)
    model_state, optim_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optim_state}
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    model_state, optim_state = get_state_dict(model, optimizer)
    found = fingerprints({"model": model_state, "optim": optim_state})
    with open(os.path.join(expected, "digests.json"), encoding="utf-8") as file:
        wanted = json.load(file)
    wrong = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    ranks = "1 rank" if rank.world_size == 1 else f"{rank.world_size} ranks"
    equal = f"{len(wanted)} values of model and optimizer equal, bit for bit"
    return Proof(f"dcp.load on {ranks}", not wrong, _differs(wrong) if wrong else equal)


def serve(rank: Rank, checkpoint: str, expected: str) -> list[Proof]:
    """Load the export by transformers; compare embeddings, then files with `save_pretrained`'s."""
    del rank
    export = os.path.join(checkpoint, "hf")
    return [_same_embeddings(export, expected), _same_files(export, os.path.join(expected, "hf"))]


def _same_embeddings(export: str, expected: str) -> Proof:
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    model, tokenizer = AutoModel.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    found = embed(model, tokenizer, SENTENCES)
    wanted = torch.load(os.path.join(expected, "embeddings.pt"), weights_only=True)
    equal = found.dtype == wanted.dtype and torch.equal(found, wanted)
    shape = " x ".join(map(str, wanted.shape))
    finding = f"{shape} embeddings equal those of the trained model, bit for bit"
    if not equal:
        finding = f"embeddings differ by up to {(found - wanted).abs().max():.3g}"
    return Proof("from_pretrained", equal, finding)


def _same_files(export: str, reference: str) -> Proof:
    subject = "save_pretrained"
    # All that it wrote, and no weight file beside it; the export has a tokenizer more.
    names = sorted({*os.listdir(reference), *_weight_files(export)})
    for name in names:
        ours, theirs = (os.path.join(d, name) for d in (export, reference))
        if not (os.path.exists(ours) and os.path.exists(theirs)):
            return Proof(subject, passed=False, finding=f"only one of the two wrote {name}")
        if _bytes(ours) != _bytes(theirs):
            finding = f"{name}: {_first_difference(ours, theirs)}"
            return Proof(subject, passed=False, finding=finding)
    keys = sum(len(_tensors(os.path.join(export, n))) for n in names if n.endswith(".safetensors"))
    size = sum(os.stat(os.path.join(export, name)).st_size for name in names)
    finding = f"its {len(names)} files, {keys} tensors, {size / 1e6:.1f} MB equal ours, bit for bit"
    return Proof(subject, passed=bool(keys), finding=finding)


def _weight_files(directory: str) -> list[str]:
    ends = (".safetensors", ".safetensors.index.json")
    return [name for name in os.listdir(directory) if name.endswith(ends)]


def _first_difference(ours: str, theirs: str) -> str:
    if not ours.endswith(".safetensors"):
        return "other content"
    mine, wanted = _tensors(ours), _tensors(theirs)
    if mine.keys() != wanted.keys():
        return _differs(sorted(mine.keys() ^ wanted.keys()))
    wrong = sorted(
        key
        for key, tensor in wanted.items()
        if mine[key].dtype != tensor.dtype or not torch.equal(mine[key], tensor)
    )
    return _differs(wrong) if wrong else "same tensors, other header"


def _tensors(path: str) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _differs(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} differ"
