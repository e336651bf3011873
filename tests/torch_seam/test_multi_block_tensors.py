"""Tensors of several blocks as DCP's planners see them, in one process."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, _version
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_hf_writer.errors import ConfigError, PlanningError
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.save.tensor_bytes import row_major_bytes
from dcp_hf_writer.tensors.shards import ShardSpec, blocks_of, local_shape, shards_of
from dcp_hf_writer.torch_seam.multi_block_tensors import blocked_tensors
from dcp_hf_writer.torch_seam.planners import HFLoadPlanner, HFSavePlanner
from support.expert_layouts import cut
from support.rank_tensors import tensor
from support.ranks import run_ranks
from support.small_states import dcp_difference

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dcp_hf_writer.tensors.boxes import Box

WHOLE = (6, 8, 3)
SHARDS = (ShardSpec(0, 1, 2), ShardSpec(1, 0, 2, interleave=2))
SPEC = LoadSpec("w", "w", WHOLE, shards=SHARDS)
LOCAL = (3, 4, 3)


def parts_of_ranks(name: str = "w") -> list[tuple[LoadSpec, torch.Tensor]]:
    """Return the specs and parts of four ranks."""
    whole, found = tensor(name, *WHOLE), []
    for row in range(2):
        for column in range(2):
            shards = (ShardSpec(0, row, 2), ShardSpec(1, column, 2, interleave=2))
            found.append((LoadSpec("w", "w", WHOLE, shards=shards), cut(whole, shards)))
    return found


def planned(state: dict[str, Any], *specs: LoadSpec, **options: Any) -> dict[str, list[Any]]:
    """Return the chunks that a save planner plans, by FQN."""
    planner = HFSavePlanner(specs, **options)
    planner.set_up_planner(state, is_coordinator=True)
    found: dict[str, list[Any]] = {}
    for item in planner.create_local_plan().items:
        box = item.tensor_data and (
            tuple(item.tensor_data.chunk.offsets),
            tuple(item.tensor_data.chunk.sizes),
            tuple(item.tensor_data.size),
        )
        found.setdefault(item.index.fqn, []).append(box)
    return found


BLOCKS = [((3, 0, 0), (3, 2, 3), WHOLE), ((3, 4, 0), (3, 2, 3), WHOLE)]


def test_plan_has_one_item_a_block() -> None:
    state = {"model": {"w": torch.zeros(LOCAL), "v": torch.zeros(2)}, "step": 1}
    assert planned(state, SPEC) == {
        "model.w": BLOCKS,
        "model.v": [((0,), (2,), (2,))],
        "step": [None],
    }


@pytest.mark.parametrize(
    "state",
    [
        {"model": {"w": torch.zeros(LOCAL)}, "optim": {"state": {"w": {"m": torch.zeros(LOCAL)}}}},
        {"model": {"w": torch.zeros(LOCAL)}, "optim": {"state.w.m": torch.zeros(LOCAL)}},
    ],
    ids=["nested", "flat"],
)
def test_optimizer_state_is_cut_as_its_parameter_is(state: dict[str, Any]) -> None:
    assert planned(state, SPEC) == {"model.w": BLOCKS, "optim.state.w.m": BLOCKS}


def test_a_flat_state_dict_is_planned_when_the_planner_does_not_flatten() -> None:
    state = {"w": torch.zeros(LOCAL), "optim.state.w.m": torch.zeros(LOCAL)}
    assert planned(state, SPEC, flatten_state_dict=False) == {
        "w": BLOCKS,
        "optim.state.w.m": BLOCKS,
    }


def test_numbers_of_the_optimizer_are_left_as_they_are() -> None:
    kept = {"step": torch.tensor(1.0), "scale": torch.ones(1)}
    found = planned({"model": {"w": torch.zeros(LOCAL)}, "optim": {"state": {"w": kept}}}, SPEC)
    assert found["optim.state.w.step"] == [((), (), ())]
    assert found["optim.state.w.scale"] == [((0,), (1,), (1,))]


def test_optimizer_state_of_another_shape_is_refused_until_a_spec_names_it() -> None:
    state = {
        "model": {"w": torch.zeros(LOCAL)},
        "optim": {"state": {"w": {"row": torch.zeros(3, 4)}}},
    }
    with pytest.raises(PlanningError) as error:
        planned(state, SPEC)
    assert error.value.fqn == "optim.state.w.row"
    assert "LoadSpec for 'optim.state.w.row'" in str(error.value)
    row = LoadSpec("optim.state.w.row", "row", (6, 8), shards=SHARDS)
    assert planned(state, SPEC, row)["optim.state.w.row"] == [
        ((3, 0), (3, 2), (6, 8)),
        ((3, 4), (3, 2), (6, 8)),
    ]
    whole = LoadSpec("optim.state.w.row", "row", (3, 4))
    assert planned(state, SPEC, whole)["optim.state.w.row"] == [((0, 0), (3, 4), (3, 4))]


def test_a_tensor_that_is_whole_after_all_is_saved_whole() -> None:
    kept = {"w": {"m": torch.zeros(WHOLE)}}
    state = {"model": {"w": torch.zeros(WHOLE)}, "optim": {"state": kept}}
    whole = [((0, 0, 0), WHOLE, WHOLE)]
    assert planned(state, SPEC) == {"model.w": whole, "optim.state.w.m": whole}


@pytest.mark.parametrize("shape", [(6, 8, 1), (3, 8, 3), (3, 4)], ids=str)
def test_a_tensor_that_is_not_its_shard_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanningError) as error:
        planned({"model": {"w": torch.zeros(shape)}}, SPEC)
    assert error.value.fqn == "model.w"
    assert "shape [3, 4, 3]: a shard of 'w', whose shape is [6, 8, 3]" in str(error.value)
    assert f"found shape {list(shape)}" in str(error.value)


def test_a_tensor_without_elements_is_named_in_the_checkpoint(tmp_path: Path) -> None:
    spec = LoadSpec("w", "w", (4, 0), shards=[ShardSpec(0, 1, 2)])
    state = {"model": {"w": torch.zeros(2, 0)}}
    dcp.save(state, checkpoint_id=tmp_path, planner=HFSavePlanner([spec]), no_dist=True)
    assert dcp_difference(tmp_path, {"model": {"w": torch.zeros(4, 0)}}) is None
    dcp.load(state, checkpoint_id=tmp_path, planner=HFLoadPlanner([spec]), no_dist=True)


def test_a_rank_without_elements_plans_nothing_of_the_tensor() -> None:
    spec = LoadSpec("w", "w", (3, 2), shards=[ShardSpec(0, 3, 4)])
    state = {"model": {"w": torch.zeros(0, 2), "v": torch.zeros(1)}}
    assert planned(state, spec) == {"model.v": [((0,), (1,), (1,))]}


def test_specs_are_checked() -> None:
    with pytest.raises(ConfigError, match="two specs"):
        HFSavePlanner([SPEC, SPEC])
    with pytest.raises(ConfigError, match="LoadSpec"):
        HFLoadPlanner([1])
    assert HFSavePlanner({"w": SPEC}).spec_by_name == HFLoadPlanner(iter([SPEC])).spec_by_name


def test_options_are_those_of_torch() -> None:
    save = HFSavePlanner(dedup_save_to_lowest_rank=True, enable_plan_caching=True)
    assert save.dedup_save_to_lowest_rank
    assert HFLoadPlanner(allow_partial_load=True).allow_partial_load
    with pytest.raises(TypeError):
        HFSavePlanner(unknown=True)


def test_without_specs_the_plans_are_those_of_torch(tmp_path: Path) -> None:
    state = {"model": {"w": torch.zeros(3), "n": 1}, "optim": {"state.w.m": torch.zeros(3)}}
    for ours, theirs in ((HFSavePlanner(), DefaultSavePlanner()),):
        ours.set_up_planner(state, is_coordinator=True)
        theirs.set_up_planner(state, is_coordinator=True)
        assert ours.create_local_plan() == theirs.create_local_plan()
        assert ours.state_dict.keys() == theirs.state_dict.keys()
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    metadata = FileSystemReader(tmp_path).read_metadata()
    for ours, theirs in ((HFLoadPlanner(), DefaultLoadPlanner()),):
        ours.set_up_planner(state, metadata, is_coordinator=True)
        theirs.set_up_planner(state, metadata, is_coordinator=True)
        assert ours.create_local_plan() == theirs.create_local_plan()


@pytest.fixture
def four_parts(tmp_path: Path) -> Path:
    """Make a checkpoint of what four ranks hold, planned one after the other."""
    planners = []
    for spec, part in parts_of_ranks():
        planner = HFSavePlanner([spec])
        planner.set_up_planner({"model": {"w": part}}, is_coordinator=True)
        planners.append(planner)
    plans, metadata = planners[0].create_global_plan([p.create_local_plan() for p in planners])
    results = []
    for i, (plan, planner) in enumerate(zip(plans, planners, strict=True)):
        writer = FileSystemWriter(tmp_path)
        writer.set_up_storage_writer(is_coordinator=True)
        # Names of files are given out in the global plan; each rank has its own.
        own = writer.prepare_global_plan([plan] * len(plans))[i]
        results.append(writer.write_data(planner.finish_plan(own), planner).value())
    writer.finish(metadata, results)
    return tmp_path


@pytest.mark.parametrize("copied_nbytes", [8 << 20, 64 << 10])
def test_rows_of_a_block_are_written_in_order(copied_nbytes: int) -> None:
    """Long rows as they lie, short ones copied together, however many dimensions are cut."""
    for shape, box in (
        ((6, 40_000), (slice(1, 5), slice(0, 30_000))),
        ((3, 2_000_000, 3), (slice(0, 3), slice(5, 1_900_000), slice(1, 3))),
        ((2, 3, 70_000, 2), (slice(0, 2), slice(1, 3), slice(10, 60_000), slice(0, 2))),
        ((1, 9, 5), (slice(0, 1), slice(0, 9, 2), slice(0, 4))),
    ):
        part = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)[box]
        assert not part.is_contiguous()
        pieces = list(row_major_bytes(part, copied_nbytes=copied_nbytes))
        assert b"".join(map(bytes, pieces)) == part.contiguous().numpy().tobytes()
        memory = part.numpy()
        copied = [piece for piece in pieces if not np.may_share_memory(piece, memory)]
        assert all(piece.nbytes <= copied_nbytes for piece in copied)


def test_parts_become_the_whole(four_parts: Path) -> None:
    assert dcp_difference(four_parts, {"model": {"w": tensor("w", *WHOLE)}}) is None


def test_parts_are_loaded_in_place(four_parts: Path) -> None:
    for spec, expected in parts_of_ranks():
        target = torch.zeros(LOCAL)
        state = {"model": {"w": target}}
        dcp.load(state, checkpoint_id=four_parts, planner=HFLoadPlanner([spec]), no_dist=True)
        assert state["model"]["w"] is target
        assert torch.equal(target, expected)


def test_parameters_that_want_gradients_are_loaded(four_parts: Path) -> None:
    spec, expected = parts_of_ranks()[1]
    state = {"model": {"w": torch.nn.Parameter(torch.zeros(LOCAL))}}
    dcp.load(state, checkpoint_id=four_parts, planner=HFLoadPlanner([spec]), no_dist=True)
    assert torch.equal(state["model"]["w"], expected)


def test_a_view_that_is_not_contiguous_is_loaded(four_parts: Path) -> None:
    spec, expected = parts_of_ranks()[2]
    memory = torch.zeros(3, 3, 4)
    state = {"model": {"w": memory.transpose(1, 2)}}
    dcp.load(state, checkpoint_id=four_parts, planner=HFLoadPlanner([spec]), no_dist=True)
    assert torch.equal(memory.transpose(1, 2), expected)


# What torch says of its own call.
@pytest.mark.filterwarnings("ignore:`_get_pg_default_device`:UserWarning")
@pytest.mark.filterwarnings("ignore:Multiple backends are registered:UserWarning")
def test_tensors_on_no_device_are_made(four_parts: Path) -> None:
    spec, expected = parts_of_ranks()[3]
    state = {"model": {"w": torch.zeros(LOCAL, device="meta")}}
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        dcp.load(state, checkpoint_id=four_parts, planner=HFLoadPlanner([spec]), no_dist=True)
    finally:
        dist.destroy_process_group()
    assert torch.equal(state["model"]["w"], expected)


def test_another_global_shape_is_refused(four_parts: Path) -> None:
    spec = LoadSpec("w", "w", (6, 16, 3), shards=SHARDS)
    state = {"model": {"w": torch.zeros(3, 8, 3)}}
    with pytest.raises(dcp.api.CheckpointException, match=r"saved torch.Size\(\[6, 8, 3\]\)"):
        dcp.load(state, checkpoint_id=four_parts, planner=HFLoadPlanner([spec]), no_dist=True)


def test_a_missing_key_is_refused_unless_partial_loads_are_allowed(four_parts: Path) -> None:
    spec = LoadSpec("new", "new", WHOLE, shards=SHARDS)
    state = {"model": {"new": torch.ones(LOCAL)}}
    with pytest.raises(dcp.api.CheckpointException, match="Missing key"):
        dcp.load(state, checkpoint_id=four_parts, planner=HFLoadPlanner([spec]), no_dist=True)
    planner = HFLoadPlanner([spec], allow_partial_load=True)
    dcp.load(state, checkpoint_id=four_parts, planner=planner, no_dist=True)
    assert torch.equal(state["model"]["new"], torch.ones(LOCAL))


def test_a_checkpoint_of_an_old_torch_is_refused(tmp_path: Path) -> None:
    """Torch before 2.4 named what is in lists otherwise; torch goes back to that in a load."""
    state = {"model": {"w": torch.zeros(WHOLE)}, "optim": {"groups": [{"lr": 0.1}]}}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_version, "_derived_version", "2_3")
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    dcp.load(state, checkpoint_id=tmp_path, planner=HFLoadPlanner(), no_dist=True)
    whole = LoadSpec("w", "w", WHOLE, shards=[ShardSpec(0, 0, 1)])
    with pytest.raises(dcp.api.CheckpointException, match="a checkpoint with old FQNs"):
        dcp.load(state, checkpoint_id=tmp_path, planner=HFLoadPlanner([whole]), no_dist=True)


def test_a_block_that_a_rank_does_not_hold_is_refused() -> None:
    found = blocked_tensors({"w": torch.zeros(LOCAL)}, {}, {"w": SPEC}, key=None)
    assert found["w"].part((3, 4, 0)).shape == (3, 2, 3)
    with pytest.raises(PlanningError, match="does not hold"):
        found["w"].part((0, 0, 0))


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """Be rank 3 of 6."""
    dist.init_process_group("fake", rank=3, world_size=6, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_ranks")
def test_a_dtensor_that_is_not_what_its_placements_say_is_refused() -> None:
    """As where FSDP and TP cut a dimension that does not divide evenly."""
    mesh = init_device_mesh("cpu", (3, 2))
    value = DTensor.from_local(
        torch.zeros(3, 2),
        mesh,
        [_StridedShard(0, split_factor=2), Shard(0)],
        run_check=False,
        shape=torch.Size((7, 2)),
        stride=(2, 1),
    )
    with pytest.raises(PlanningError) as error:
        blocked_tensors({"w": value}, {}, {}, key=None)
    assert error.value.fqn == "w"
    assert "divide evenly" in str(error.value)


@pytest.mark.usefixtures("fake_ranks")
def test_a_sum_that_is_not_done_is_refused() -> None:
    mesh = init_device_mesh("cpu", (3, 2))
    placements = [_StridedShard(0, split_factor=2), Partial()]
    value = DTensor.from_local(torch.zeros(2, 2), mesh, placements, run_check=False)
    with pytest.raises(PlanningError) as error:
        blocked_tensors({"w": value}, {}, {}, key=None)
    assert error.value.fqn == "w"


@pytest.mark.usefixtures("fake_ranks")
def test_dtensors_of_one_block_are_planned_by_torch() -> None:
    mesh = init_device_mesh("cpu", (3, 2))
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    value = DTensor.from_local(torch.zeros(2, 2), mesh, placements, run_check=False)
    assert blocked_tensors({"w": value}, {}, {}, key=None) == {}


@pytest.mark.usefixtures("fake_ranks")
def test_specs_of_dtensors_may_be_among_those_of_the_planner() -> None:
    """Their shards are read off the placements, which hold also for what is kept beside them."""
    mesh = init_device_mesh("cpu", (6,))
    value = distribute_tensor(torch.zeros(12, 2), mesh, [Shard(0)], src_data_rank=None)
    spec = LoadSpec.from_tensor(name="w", hf_keys="w", tensor=value)
    kept = {"m": value, "local": torch.zeros(2, 2), "row": torch.zeros(12), "step": torch.zeros(())}
    state = {"model": {"w": value}, "optim": {"state": {"w": kept}}}
    assert planned(state, spec) == {
        "model.w": [((6, 0), (2, 2), (12, 2))],
        "optim.state.w.m": [((6, 0), (2, 2), (12, 2))],
        "optim.state.w.local": [((6, 0), (2, 2), (12, 2))],
        "optim.state.w.row": [((0,), (12,), (12,))],
        "optim.state.w.step": [((), (), ())],
    }


class Layer(torch.nn.Module):
    """One layer that TP cuts by rows, one that it cuts by columns."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(4, rows, bias=False)
        self.down = torch.nn.Linear(rows, 4, bias=False)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) for s, n in zip(box.offsets, box.sizes, strict=True))


def fsdp_and_tp(rank: int, world_size: int) -> list[str]:
    """Shard layers as trainers do; say where the blocks are not what the rank holds."""
    wrong = []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    for rows in (8, 6, 7, 5):
        model = Layer(rows)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.arange(weight.numel()).reshape(weight.shape))
        whole = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        fully_shard(parallelize_module(model, mesh["tp"], plan), mesh=mesh["fsdp"])
        for name, value in model.state_dict().items():
            shape, local = tuple(value.shape), value.to_local()
            shards = shards_of(value.placements, mesh.shape, mesh.get_coordinate() or [])
            blocks = blocks_of(shape, shards)
            held = torch.full(local_shape(shape, shards), -1.0)
            for block in blocks:
                part = whole[name][slices(block.global_box)]
                held[slices(block.local_box)] = part
            if len(blocks) > 1 or held.shape != local.shape or not torch.equal(held, local):
                wrong.append(f"rank {rank}, {rows} rows, {name}: {value.placements}")
    return wrong


def test_blocks_are_what_fsdp_with_tp_holds() -> None:
    assert run_ranks(fsdp_and_tp, 4) == [[]] * 4


def test_items_of_blocks_are_shards() -> None:
    """DCP refuses a second item of a plain tensor."""
    planner = HFSavePlanner([SPEC])
    planner.set_up_planner({"w": torch.zeros(LOCAL)}, is_coordinator=True)
    kinds = {item.type for item in planner.create_local_plan().items}
    assert kinds == {WriteItemType.SHARD}
