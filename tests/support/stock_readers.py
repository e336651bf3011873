"""Reading of checkpoints with torch and safetensors alone, as anybody would read them.

Nothing here may import the package under test: `stock_only` proves it for ranks that load.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from support.compare import INDEX_NAME, bits
from support.sharded_models import build_model, fsdp

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

Digests = dict[str, tuple[str, tuple[int, ...], str]]
"""Dtype, global shape and hash of each tensor, and the text of each other value, by FQN."""

# What a tensor holds before it is loaded: a load that skips it must not go unseen.
_FILLER = 0xA5


def stock_only() -> None:
    """Fail if this process has imported the package under test."""
    if "dcp_hf_writer" in sys.modules:
        msg = "this process imported the package under test, so it proves nothing about torch alone"
        raise AssertionError(msg)


def load_hf(directory: Path) -> dict[str, torch.Tensor]:
    """Load all safetensors files of a directory; the index, where there is one, must agree."""
    tensors: dict[str, torch.Tensor] = {}
    file_of_key: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        loaded = load_file(path)
        twice = tensors.keys() & loaded.keys()
        if twice:
            msg = f"{path} repeats {sorted(twice)}"
            raise AssertionError(msg)
        tensors.update(loaded)
        file_of_key.update(dict.fromkeys(loaded, path.name))
    index = directory / INDEX_NAME
    if index.exists() != (len(set(file_of_key.values())) > 1):
        msg = f"{directory}: an index belongs to several files, and only to several"
        raise AssertionError(msg)
    if index.exists() and json.loads(index.read_text())["weight_map"] != file_of_key:
        msg = f"{index} does not say where the tensors are"
        raise AssertionError(msg)
    return tensors


def load_dcp(directory: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Load a nested state dict of plain tensors and values with stock `dcp.load`, in one process.

    Args:
        directory: The checkpoint.
        like: State dict that tells names, shapes and dtypes; left as it is.
    """
    target = {key: _blank(value) for key, value in like.items()}
    dcp.load(target, checkpoint_id=directory, no_dist=True)
    return target


def _blank(value: object) -> Any:
    if isinstance(value, dict):
        return {key: _blank(inner) for key, inner in value.items()}
    if not isinstance(value, torch.Tensor):
        return None
    filler = torch.full((value.numel() * value.itemsize,), _FILLER, dtype=torch.uint8)
    if value.dtype is torch.bool:
        # Any other byte than 0 and 1 is no bool; the complement shows a skipped load as well.
        return ~value.contiguous()
    return filler.view(value.dtype).reshape(value.shape)


def train_two_steps(model: PreTrainedModel) -> torch.optim.Optimizer:
    """Take two AdamW steps, so that the optimizer has moments that differ from zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    for _ in range(2):
        tokens = torch.randint(0, vocabulary, (2, 8), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def resume_all(rank: int, world_size: int, names: Sequence[str], root: Path) -> dict[str, Digests]:
    """Resume each model and its optimizer from `root / name`; digests of what they then hold."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = {name: _resume(name, root / name, mesh) for name in names}
    stock_only()
    return found


def _resume(name: str, directory: Path, mesh: DeviceMesh) -> Digests:
    """Resume as a trainer does.

    The model starts with other weights and the optimizer with none, so all must come from the
    checkpoint.
    """
    model = fsdp(build_model(name, seed=99), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optim": optimizer_state}
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
    )
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return digests({"model": model_state, "optim": optimizer_state})


def digests(state: Mapping[str, Any], prefix: str = "") -> Digests:
    """Hash every tensor of a nested state dict in full; all ranks of its meshes call this."""
    found: Digests = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= digests(value, f"{name}.")
        elif isinstance(value, torch.Tensor):
            full = value.full_tensor() if isinstance(value, DTensor) else value
            text = hashlib.sha256(bits(full).numpy().tobytes()).hexdigest()
            found[name] = (str(full.dtype), tuple(full.shape), text)
        else:
            found[name] = ("value", (), repr(value))
    return found
