"""What DCP would save wrongly, without a word, is refused; what it would not, is not."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.errors import CheckpointError, PlanningError
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.preflight import detect_hand_sharded
from dcp_hf_writer.preflight.detect_hand_sharded import check_samples, samples_of
from dcp_hf_writer.tensors.shards import ShardSpec
from dcp_hf_writer.torch_seam.caller_frames import Planned
from dcp_hf_writer.torch_seam.planners import HFSavePlanner
from support.expert_layouts import LAYOUTS, specs_of, state_of
from support.rank_process import Raised
from support.rank_tensors import tensor
from support.ranks import run_ranks
from support.small_states import leftovers

if TYPE_CHECKING:
    from pathlib import Path

WORLD_SIZE = 4


class Saver:
    """Saves what one rank holds, and notes what came of it."""

    def __init__(self, root: Path, rank: int) -> None:
        self.root, self.rank = root, rank
        self.found: dict[str, Raised | None] = {}

    def save(self, name: str, state: dict[str, Any], *, sync: bool = False, **options: Any) -> None:
        planner = options.pop("planner", None)
        writer = HFDualWriter(self.root / name, **options)
        self.found[name] = None
        try:
            if sync:
                dcp.save(state, storage_writer=writer, planner=planner)
            else:
                dcp.async_save(state, storage_writer=writer, planner=planner).result()
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            self.found[name] = Raised.of(error)


def model_with(name: str, value: torch.Tensor) -> dict[str, Any]:
    return {"model": {"w": tensor("w", 4, 3), name: value}}


def save_what_is_refused(saver: Saver) -> None:
    rank = saver.rank
    for name, layout in LAYOUTS.items():
        state = state_of(1, layout, rank=rank, world_size=WORLD_SIZE)
        saver.save(name, state)
        saver.save(f"sync {name}", state, sync=True)
        specs = specs_of(layout, rank, WORLD_SIZE)
        saver.save(f"specs {name}", state, export=HFExport(specs=specs))
        saver.save(f"no export {name}", state, export=None)
        if name != "fused DTensors":
            planner = HFSavePlanner()
            saver.save(f"other specs {name}", state, export=HFExport(specs=specs), planner=planner)
    saver.save("same shape", model_with("x", tensor(f"x of {rank}", 5, 2)))
    saver.save("one rank", model_with("x", tensor(f"x of {rank == 2}", 5, 2)))
    saver.save("other dtype", model_with("x", torch.ones(5, 2, dtype=_DTYPES[rank])))
    saver.save("integers", model_with("x", torch.arange(10).reshape(5, 2) + rank))

    wrong = LoadSpec("x", "x", (9, 2), shards=[ShardSpec(0, rank, WORLD_SIZE)])
    specs = [wrong] if rank == 1 else []
    value = tensor("x", 5, 2)
    saver.save("wrong spec", model_with("x", value), planner=HFSavePlanner(specs))
    saver.save("after it", model_with("x", value), planner=HFSavePlanner())


_DTYPES = (torch.float32, torch.float32, torch.float64, torch.float32)


def save_what_is_right(saver: Saver) -> None:
    rank = saver.rank
    torch.manual_seed(rank)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    whole = tensor("x", 4, 8)
    for name, placements in {
        "rows": [Replicate(), Shard(0)],
        "both": [_StridedShard(0, split_factor=2), Shard(0)],
    }.items():
        value = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        saver.save(name, model_with("x", value))
    # The replicas of a stage of a pipeline, whose mesh has not all ranks.
    value = distribute_tensor(whole + rank // 2, mesh["shard"], [Shard(0)], src_data_rank=None)
    saver.save("stages", model_with(f"stages.{rank // 2}.x", value))
    saver.save("vectors", model_with("x", torch.full((7,), float(rank))))
    saver.save("scalars", model_with("x", torch.tensor(float(rank))))
    saver.save("only here", model_with(f"x{rank}", tensor(f"x of {rank}", 5, 2)))
    saver.save("random state", {**model_with("x", whole), "rng": {"cpu": torch.rand(2, 8)}})
    saver.save("drifted", model_with("x", whole * (1 + rank * 1e-5)))
    declared = HFSavePlanner()
    saver.save("declared", model_with("x", tensor(f"x of {rank}", 5, 2)), planner=declared)


def save_from_cached_plans(saver: Saver) -> None:
    """The same at first, as the seeds were the same; DCP sends no plan with the second save."""
    for step, differs in enumerate([False, True, False]):
        value = tensor(f"x of {saver.rank * differs}", 5, 2)
        planner = DefaultSavePlanner(enable_plan_caching=True)
        saver.save(f"cached {step}", model_with("x", value), planner=planner)


def save_all(rank: int, world_size: int, root: Path) -> dict[str, Raised | None]:
    saver = Saver(root, rank)
    save_what_is_refused(saver)
    save_what_is_right(saver)
    save_from_cached_plans(saver)
    dist.barrier()
    return saver.found


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[dict[str, Raised | None]]]:
    root = tmp_path_factory.mktemp("hand-sharded")
    return root, run_ranks(save_all, WORLD_SIZE, root)


def refusal(saved: tuple[Path, list[dict[str, Raised | None]]], name: str) -> CheckpointError:
    """Return the error of a save, which must be the same kind on every rank and leave nothing."""
    root, found = saved
    errors = []
    for outcomes in found:
        raised = outcomes[name]
        assert raised is not None, name
        errors.append(raised.error)
    assert not (root / name).exists()
    own = [error for error in errors if isinstance(error, PlanningError)]
    return own[0] if own else errors[0]


SHARDED = [name for name in LAYOUTS if name != "fused DTensors"]


@pytest.mark.parametrize("how", ["", "sync ", "no export "])
@pytest.mark.parametrize("layout", SHARDED)
def test_experts_of_each_rank_are_refused_when_nothing_declares_them(
    saved: tuple[Path, list[dict[str, Raised | None]]], layout: str, how: str
) -> None:
    text = str(refusal(saved, f"{how}{layout}"))
    assert "ranks hold different tensors under one name" in text
    assert "layers.0.experts.w" in text
    assert "one on ranks [0" in text
    assert "HFSavePlanner(specs)" in text


@pytest.mark.parametrize("how", ["", "sync ", "specs ", "no export "])
def test_fused_dtensors_are_refused_when_the_planner_is_torchs(
    saved: tuple[Path, list[dict[str, Raised | None]]], how: str
) -> None:
    text = str(refusal(saved, f"{how}fused DTensors"))
    assert "'model.layers.0.experts.w13'" in text
    assert "[6, 1, 3] at [0, 0, 0], [6, 1, 3] at [0, 4, 0] of [6, 8, 3]" in text
    assert "found [6, 2, 3] at [0, 0, 0], by DefaultSavePlanner" in text
    assert "HFSavePlanner(specs)" in text


@pytest.mark.parametrize("how", ["specs ", "other specs "])
@pytest.mark.parametrize("layout", SHARDED)
def test_declared_shards_are_refused_when_the_planner_does_not_know_them(
    saved: tuple[Path, list[dict[str, Raised | None]]], layout: str, how: str
) -> None:
    error = refusal(saved, f"{how}{layout}")
    assert isinstance(error, PlanningError)
    assert error.fqn is not None
    assert "layers.0.experts.w" in error.fqn
    assert "HFSavePlanner(specs)" in str(error.hint)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("same shape", "one on ranks [0] and one on ranks [1]"),
        ("one rank", "one on ranks [0, 1, 3] and one on ranks [2]"),
        ("other dtype", "one on ranks [0, 1, 3] and one on ranks [2]"),
        ("integers", "one on ranks [0] and one on ranks [1]"),
    ],
)
def test_refusal_names_the_tensor_and_the_ranks(
    saved: tuple[Path, list[dict[str, Raised | None]]], name: str, ranks: str
) -> None:
    error = refusal(saved, name)
    assert isinstance(error, PlanningError)
    assert error.fqn == "model.x"
    assert str(error.found).startswith(ranks)


@pytest.mark.parametrize(
    "name",
    [
        *("rows", "both", "stages", "vectors", "scalars", "only here", "random state", "drifted"),
        *("declared", "cached 0", "cached 2", "after it"),
    ],
)
def test_what_dcp_saves_rightly_is_not_refused(
    saved: tuple[Path, list[dict[str, Raised | None]]], name: str
) -> None:
    root, found = saved
    for outcomes in found:
        raised = outcomes[name]
        if raised is not None:
            raised.reraise()
    assert (root / name / "hf" / "model.safetensors").exists()


def test_a_spec_that_is_wrong_on_one_rank_is_refused_on_all(
    saved: tuple[Path, list[dict[str, Raised | None]]],
) -> None:
    error = refusal(saved, "wrong spec")
    assert isinstance(error, PlanningError)
    assert error.fqn == "model.x"
    assert "shape [3, 2]: a shard of 'x', whose shape is [9, 2]" in str(error.expected)


def test_different_tensors_are_refused_when_the_plan_is_that_of_the_save_before(
    saved: tuple[Path, list[dict[str, Raised | None]]],
) -> None:
    error = refusal(saved, "cached 1")
    assert isinstance(error, PlanningError)
    assert error.fqn == "model.x"


def test_refused_saves_leave_nothing(saved: tuple[Path, list[dict[str, Raised | None]]]) -> None:
    assert leftovers(saved[0]) == []


def planner_of(model: dict[str, Any]) -> DefaultSavePlanner:
    planner = DefaultSavePlanner()
    planner.set_up_planner({"model": model}, is_coordinator=True)
    return planner


def planned(planner: DefaultSavePlanner) -> Planned:
    return Planned.of(planner, {})


def planned_of(model: dict[str, Any]) -> Planned:
    return planned(planner_of(model))


def compared(*models: dict[str, Any]) -> None:
    """Compare models as those of ranks."""
    planners = [planner_of(model) for model in models]
    samples = [
        samples_of(planned(planner), key=None, world_size=len(models)) for planner in planners
    ]
    check_samples(samples, [planner.create_local_plan() for planner in planners])


DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool),
    torch.complex64,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_tensor_is_compared(dtype: torch.dtype) -> None:
    one, other = (
        torch.view_as_complex(tensor(name, 9, 4, 2))
        if dtype.is_complex
        else tensor(name, 9, 4, dtype=dtype)
        for name in ("one", "other")
    )
    compared({"x": one}, {"x": one.clone()})
    with pytest.raises(PlanningError, match="different tensors"):
        compared({"x": one}, {"x": other})


def test_layout_in_memory_makes_no_difference() -> None:
    one = tensor("x", 9, 4)
    compared({"x": one}, {"x": one.t().contiguous().t()}, {"x": torch.stack([one] * 2)[1]})


def test_values_that_are_no_numbers_make_no_difference() -> None:
    one = torch.full((4, 4), math.nan)
    compared({"x": one}, {"x": one.clone()}, {"x": torch.full((4, 4), math.nan)})


def test_tensors_without_elements_are_compared_by_shape() -> None:
    compared({"x": torch.zeros(0, 3)}, {"x": torch.zeros(0, 3)})
    with pytest.raises(PlanningError, match="different tensors"):
        compared({"x": torch.zeros(0, 3)}, {"x": torch.ones(2, 3)})


def test_replicas_that_drifted_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    one = tensor("x", 40, 40)
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patched:
        patched.setattr(detect_hand_sharded, "_is_warned", False)
        compared({"x": one}, {"x": one * 1.004})
        compared({"x": one}, {"x": one * 1.004})
    (record,) = caplog.records
    assert record.getMessage() == (
        "the replicas of model.x have drifted apart: one on ranks [0] and one on ranks [1]; "
        "the save keeps one of them"
    )
    with pytest.raises(PlanningError, match="different tensors"):
        compared({"x": one}, {"x": one * 1.02})


def test_one_tensor_among_many_is_found() -> None:
    models = [{f"x{i}": tensor(f"{i}", 3, 3) for i in range(300)} for _ in range(5)]
    models[3]["x217"] = tensor("another", 3, 3)
    with pytest.raises(PlanningError) as error:
        compared(*models)
    assert error.value.fqn == "model.x217"
    assert error.value.found == "one on ranks [0, 1, 2, 4] and one on ranks [3]"


def test_a_sample_is_bounded_and_of_the_same_tensors_on_every_rank() -> None:
    count = detect_hand_sharded._MAX_TENSORS + 500
    names = [f"x{i}" for i in range(count)]
    one = samples_of(planned_of({n: torch.ones(2, 2) for n in names}), key=None, world_size=2)
    other = samples_of(
        planned_of({n: torch.ones(2, 2) for n in reversed(names)}), key=None, world_size=2
    )
    assert one == other
    assert len(one) == detect_hand_sharded._MAX_TENSORS * detect_hand_sharded._ROW.itemsize
    assert len(one) < 100_000


def test_nothing_is_sampled_where_nothing_can_differ() -> None:
    planner = planner_of({"x": torch.ones(2, 2)})
    assert samples_of(planned(planner), key=None, world_size=1) == b""
    declared = HFSavePlanner()
    declared.set_up_planner({"model": {"x": torch.ones(2, 2)}})
    assert samples_of(planned(declared), key=None, world_size=2) == b""
    assert samples_of(planned_of({"x": torch.ones(4)}), key=None, world_size=2) == b""


def test_entries_that_are_no_model_are_compared_when_no_model_is_known() -> None:
    """The state dict has two models; which one to export is another question."""
    for state in ({"actor": {"x": tensor("x", 3, 3)}, "critic": {"y": tensor("y", 3, 3)}},):
        planner = DefaultSavePlanner()
        planner.set_up_planner({**state, "optim": {"z": tensor("z", 3, 3)}})
        rows = np.frombuffer(
            samples_of(planned(planner), key=None, world_size=2), detect_hand_sharded._ROW
        )
        assert len(rows) == 2
