"""The planners: what ranks hold in blocks is saved whole, and loaded by any number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport
from dcp_hf_writer.torch_seam.planners import HFLoadPlanner, HFSavePlanner
from support.audit import faults
from support.compare import tensor_difference
from support.expert_layouts import LAYOUTS, W2, W13, exported_of, model_of, specs_of, state_of
from support.ranks import run_ranks
from support.small_states import dcp_difference, spoil
from support.stock_readers import load_hf

if TYPE_CHECKING:
    from pathlib import Path

CACHED = "by expert and row"
CACHED_STEPS = (10, 11, 12)


def save_each(rank: int, world_size: int, root: Path) -> None:
    """Save every layout: with torch's writer, and asynchronously with ours."""
    for step, (name, layout) in enumerate(LAYOUTS.items()):
        specs = specs_of(layout, rank, world_size)
        held = {"rank": rank, "world_size": world_size}
        dcp.save(
            state_of(step, layout, **held),
            checkpoint_id=root / f"torch {name}",
            planner=HFSavePlanner(specs),
        )
        state = state_of(step, layout, **held)
        future = dcp.async_save(
            state,
            storage_writer=HFDualWriter(root / name, export=HFExport(specs=specs)),
            planner=HFSavePlanner(specs, dedup_save_to_lowest_rank=step % 2 == 1),
        )
        spoil(state)
        future.result()
        future = dcp.async_save(
            state_of(step, layout, **held),
            storage_writer=HFDualWriter(
                root / f"once {name}", export=HFExport(specs=specs), weights="once"
            ),
            planner=HFSavePlanner(specs),
        )
        future.result()
    layout = LAYOUTS[CACHED]
    specs = specs_of(layout, rank, world_size)
    for step in CACHED_STEPS:
        dcp.async_save(
            state_of(step, layout, rank=rank, world_size=world_size),
            storage_writer=HFDualWriter(root / f"cached {step}", export=HFExport(specs=specs)),
            planner=HFSavePlanner(specs, enable_plan_caching=True),
        ).result()


@pytest.fixture(scope="module", params=[2, 4], ids=lambda count: f"saved-by-{count}")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(f"saved-by-{request.param}")
    run_ranks(save_each, request.param, root)
    return root


@pytest.mark.parametrize("writer", ["torch ", ""], ids=["torch's writer", "ours"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_torch_loads_whole_tensors(saved: Path, layout: str, writer: str) -> None:
    step = list(LAYOUTS).index(layout)
    assert dcp_difference(saved / f"{writer}{layout}", state_of(step)) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_holds_every_expert(saved: Path, layout: str) -> None:
    step = list(LAYOUTS).index(layout)
    assert tensor_difference(load_hf(saved / layout / "hf"), exported_of(step)) is None
    assert not faults(saved / layout)


@pytest.mark.parametrize("step", CACHED_STEPS)
def test_checkpoint_is_right_when_plans_are_cached(saved: Path, step: int) -> None:
    path = saved / f"cached {step}"
    assert dcp_difference(path, state_of(step)) is None
    assert tensor_difference(load_hf(path / "hf"), exported_of(step)) is None


def test_blocks_that_several_ranks_hold_are_written_once(saved: Path) -> None:
    metadata = FileSystemReader(saved / "replicated").read_metadata()
    chunks = metadata.state_dict_metadata[f"model.{W13}"].chunks
    assert sorted(tuple(chunk.offsets) for chunk in chunks) == [(0, 0, 0), (3, 0, 0)]


def load_each(rank: int, world_size: int, root: Path) -> list[str]:
    """Load every checkpoint in every layout, into tensors that hold nothing of it."""
    wrong = []
    for step, saved_as in enumerate(LAYOUTS):
        for name, layout in LAYOUTS.items():
            # Each layout is also read where the weights are stored once, in one of the others.
            is_once = list(LAYOUTS).index(name) == (step + 1) % len(LAYOUTS)
            held = {"layout": layout, "rank": rank, "world_size": world_size}
            target, expected = state_of(99, **held), state_of(step, **held)
            specs = specs_of(layout, rank, world_size)
            path = root / (f"once {saved_as}" if is_once else saved_as)
            reader = HFDualReader(path) if is_once else FileSystemReader(path)
            dcp.load(target, storage_reader=reader, planner=HFLoadPlanner(specs))
            different = [fqn for fqn, one in flat(target).items() if one != flat(expected)[fqn]]
            if different or target["step"] != step:
                wrong.append(f"{saved_as} as {name}: {different}")
    return wrong


def flat(state: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the local tensors of a state dict as lists, which compare."""
    found: dict[str, list[Any]] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        elif isinstance(value, torch.Tensor):
            local = getattr(value, "_local_tensor", value)
            found[key] = [list(local.shape), local.tolist()]
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4], ids=lambda count: f"loaded-by-{count}")
def test_any_number_of_ranks_loads_it_in_any_layout(saved: Path, world_size: int) -> None:
    assert run_ranks(load_each, world_size, saved) == [[]] * world_size


BY_HAND = [name for name in LAYOUTS if name != "fused DTensors"]


def save_with_torch_alone(rank: int, world_size: int, root: Path) -> str:
    """Save with torch's planner; returns what it says of fused DTensors."""
    held = {"rank": rank, "world_size": world_size}
    for name in BY_HAND:
        model = state_of(1, LAYOUTS[name], **held)["model"]
        dcp.save({"model": model}, checkpoint_id=root / name)
    model = state_of(1, LAYOUTS["fused DTensors"], **held)["model"]
    try:
        dcp.save({"model": model}, checkpoint_id=root / "fused DTensors")
    except CheckpointException as error:
        return str(error)
    return ""


@pytest.mark.parametrize("world_size", [2, 4])
def test_torch_alone_loses_experts_without_a_word(tmp_path: Path, world_size: int) -> None:
    """Why the planners are needed; if this fails, torch has learnt to refuse or to do it right."""
    said = run_ranks(save_with_torch_alone, world_size, tmp_path)
    experts = torch.cat([value.flatten() for value in (model_of(1)[W13], model_of(1)[W2])])
    for name in BY_HAND:
        known = FileSystemReader(tmp_path / name).read_metadata().state_dict_metadata
        kept = {key: torch.zeros(known[f"model.{key}"].size) for key in (W13, W2)}
        dcp.load({"model": kept}, checkpoint_id=tmp_path / name, no_dist=True)
        found = set(torch.cat([value.flatten() for value in kept.values()]).tolist())
        lost = sum(value not in found for value in experts.tolist())
        assert lost >= len(experts) // 2, name
    # Blocks that it takes for one overlap those of other ranks, which its validation sees.
    assert all("Failed to validate global plan" in text for text in said)


def save_by_process(rank: int, world_size: int, root: Path) -> None:
    layout = LAYOUTS["by expert and row"]
    specs = specs_of(layout, rank, world_size)
    state = state_of(1, layout, rank=rank, world_size=world_size)
    dcp.async_save(
        state,
        storage_writer=HFDualWriter(root / "step-1", export=HFExport(specs=specs)),
        planner=HFSavePlanner(specs),
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
    ).result()


@pytest.mark.slow
def test_checkpoint_is_right_when_a_process_saves_it(tmp_path: Path) -> None:
    run_ranks(save_by_process, 2, tmp_path)
    assert dcp_difference(tmp_path / "step-1", state_of(1)) is None
    assert tensor_difference(load_hf(tmp_path / "step-1/hf"), exported_of(1)) is None
