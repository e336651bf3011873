"""A checkpointer process exports a transformers model: nothing of the model travels to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport, verify
from support.ranks import run_ranks
from support.sharded_models import build_model, fsdp

pytestmark = pytest.mark.timeout(400)

MODEL = "llama"
LIMIT_S = 200.0


class Tokenizer:
    """An asset that must not travel, as a model must not."""

    def save_pretrained(self, directory: str) -> None:
        (Path(directory) / "tokenizer_config.json").write_text("{}")

    def __reduce__(self) -> Any:
        msg = "the tokenizer was sent to another process"
        raise AssertionError(msg)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def save_by_process(rank: int, world_size: int, root: Path) -> list[str]:
    """Save without and with `warm_up`; return what differs from `save_pretrained`."""
    expected = root / "expected"
    if rank == 0:
        model = build_model(MODEL)
        model.save_pretrained(expected)
        Tokenizer().save_pretrained(str(expected))
    dist.barrier()
    model = fsdp(build_model(MODEL), init_device_mesh("cpu", (world_size,)))
    found = []
    for name, is_warm in (("cold", False), ("warm", True)):
        export = HFExport.from_transformers(model, Tokenizer())
        writer = HFDualWriter(root / name, export=export)
        state = {"model": model.state_dict(), "step": 1}
        if is_warm:
            writer.warm_up(state)
        future = dcp.async_save(
            state, storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType.PROCESS
        )
        if is_warm:
            # The checkpointer process has a group of its own.
            dist.destroy_process_group()
        future.result(LIMIT_S)
        if rank == 0:
            files, wanted = files_of(root / name / "hf"), files_of(expected)
            found += [
                f"{name} {key}" for key in files | wanted if files.get(key) != wanted.get(key)
            ]
            found += [] if verify(root / name).ok else [f"{name} does not verify"]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_export_equals_save_pretrained_when_a_process_saves(
    world_size: int, tmp_path: Path
) -> None:
    assert run_ranks(save_by_process, world_size, tmp_path, timeout_s=300) == [[]] * world_size
