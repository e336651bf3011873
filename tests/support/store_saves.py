"""Saves of a small model to a store and to a local path, by real ranks, and how they compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fsspec
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dcp_hf_writer import HFDualWriter, HFExport
from support import shared_store
from support.rank_tensors import tensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from support.s3_servers import S3Bucket

CONFIG = b'{"model_type": "none"}'

# Rows, columns, uneven rows, replicated, plain, scalar. Their files have several parts of 256 KiB.
MODEL = {
    "embed": ((511, 300), Shard(0)),
    "layers.0.w": ((256, 400), Shard(1)),
    "layers.1.w": ((400, 256), Shard(1)),
    "layers.0.b": ((5,), Replicate()),
    "norm": ((3,), None),
    "scale": ((), None),
}


@dataclass(frozen=True)
class Store:
    """A store as ranks get it: plain values that pickle."""

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def shared(cls, path: Path) -> Store:
        """Return the generic store over a local directory."""
        shared_store.register()
        return cls(shared_store.url_of(path))

    @classmethod
    def of_bucket(cls, bucket: S3Bucket) -> Store:
        """Return the store of an S3 bucket."""
        return cls(f"{bucket.url}/run", bucket.storage_options)

    def at(self, name: str) -> str:
        """Return the URL of a checkpoint."""
        return f"{self.url}/{name}"

    def files(self, name: str) -> dict[str, bytes]:
        """Return what is below a checkpoint's URL, past the code under test."""
        shared_store.register()
        fs, root = fsspec.core.url_to_fs(
            self.at(name), **self.storage_options, skip_instance_cache=True
        )
        fs.invalidate_cache()
        return {path[len(root) :].lstrip("/"): fs.cat_file(path) for path in fs.find(root)}


def state_of(step: int, *, is_sharded: bool) -> dict[str, Any]:
    """Return a state dict with a tied tensor and an optimizer; the values tell the step."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),)) if is_sharded else None
    model: dict[str, torch.Tensor] = {}
    for name, (shape, placement) in MODEL.items():
        value = tensor(f"{name}@{step}", *shape)
        if mesh is not None and placement is not None:
            value = distribute_tensor(value, mesh, [placement], src_data_rank=None)
        model[name] = value
    model["head"] = model["embed"]
    return {"model": model, "optim": {"embed": moments(model["embed"])}, "step": step}


def moments(like: torch.Tensor) -> torch.Tensor:
    """Return a new tensor of the same placement."""
    if isinstance(like, DTensor):
        local = like.to_local() * 2
        return DTensor.from_local(
            local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
    return like * 2


EXPORTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "cast": {"dtype": torch.bfloat16},
    "split": {"max_shard_size": 500_000},
}


def save_kinds(
    rank: int, world_size: int, store: Store, root: Path, kinds: tuple[str, ...]
) -> list[str]:
    """Save each kind to the store and to a local path; return the errors."""
    shared_store.register()
    errors = []
    state = state_of(1, is_sharded=world_size > 1)
    for kind in kinds:
        options: dict[str, Any] = {
            "export": HFExport(assets={"config.json": CONFIG}, **EXPORTS[kind.split("-")[0]]),
            "weights": "once" if kind.endswith("once") else "both",
            "host_budget_bytes": 1 << 20,
        }
        # Each rank writes its own bytes, as on a store: the digests files tell who wrote which.
        local = {"strategy": "direct", "share": "off"}
        targets: tuple[tuple[str, dict[str, Any]], ...] = (
            (store.at(kind), {"storage_options": dict(store.storage_options)}),
            (str(root / kind), local),
        )
        for target, of_target in targets:
            writer = HFDualWriter(target, **options, **of_target)
            try:
                if rank_is_async(kind):
                    dcp.async_save(state, storage_writer=writer).result()
                else:
                    dcp.save(state, storage_writer=writer)
            except BaseException as error:  # noqa: BLE001 - torch's exception is no Exception
                errors.append(f"{kind} to {target} on rank {rank}: {error}")
    return errors


def rank_is_async(kind: str) -> bool:
    """Whether a kind is saved in the background."""
    return kind != "plain"


def save_step(store: Store, name: str, step: int, **options: Any) -> str | None:
    """Save a step to a store in the background; all ranks call it.

    Returns:
        The type and text of the error; `None` if the save went well.
    """
    shared_store.register()
    is_sharded = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    state = state_of(step, is_sharded=is_sharded)
    options = {"timeout_s": 30, "export": HFExport(assets={"config.json": CONFIG}), **options}
    writer = HFDualWriter(
        store.at(name),
        storage_options=dict(store.storage_options) or None,
        host_budget_bytes=1 << 20,
        **options,
    )
    try:
        dcp.async_save(state, storage_writer=writer).result(timeout=60)
    except BaseException as error:  # noqa: BLE001 - torch's exception is no Exception
        return f"{type(error).__name__}: {error}"
    return None
