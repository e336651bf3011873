"""What DCP would save wrongly, without a word, is refused; what it would not, is not."""

from __future__ import annotations

import io
import logging
import math
import random
import re
import threading
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.errors import CheckpointError, PlanningError
from dcp_hf_writer.mapping.load_spec import LoadSpec
from dcp_hf_writer.preflight import rank_samples
from dcp_hf_writer.preflight.compare_ranks import check_samples
from dcp_hf_writer.preflight.rank_samples import DIGEST_ROW, TENSOR_ROW, rows_of, samples_of
from dcp_hf_writer.said_once import SaidOnce
from dcp_hf_writer.tensors.shards import ShardSpec
from dcp_hf_writer.torch_seam.caller_frames import Planned
from dcp_hf_writer.torch_seam.future_guard import own_error
from dcp_hf_writer.torch_seam.planners import HFSavePlanner
from support.expert_layouts import LAYOUTS, specs_of, state_of
from support.odd_tensors import Coded, Gathered, Named
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
    random_state = {**model_with("x", tensor("x", 5, 2)), "rng": {"cpu": torch.rand(2, 8) + rank}}
    for how in (False, True):
        saver.save(f"random state, {how}", random_state, sync=how)
        subclass = tensor(f"x of {rank}", 5, 2).as_subclass(Named)
        saver.save(f"subclass, {how}", model_with("x", subclass), sync=how)
    saver.save("vectors of other sizes", model_with("x", torch.ones(4 + rank)))
    saver.save("scalars of other dtypes", model_with("x", torch.ones((), dtype=_DTYPES[rank])))
    flat = DefaultSavePlanner(flatten_state_dict=False)
    saver.save("nested", model_with("x", tensor(f"x of {rank}", 5, 2)), planner=flat, export=None)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    dtype = torch.float64 if rank == 2 else torch.float32
    for name, export in {"dtypes": HFExport(), "dtypes, no export": None}.items():
        local = torch.ones(1, 2, dtype=dtype)
        shard = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        saver.save(name, model_with("x", shard), export=export)
    local = torch.ones(1 + rank % 2, 2)
    shape = {"shape": torch.Size((6, 2)), "stride": (2, 1)}
    shard = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, **shape)
    saver.save("uneven", model_with("x", shard))
    stage = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "shard"))["shard"]
    whole = tensor(f"moments of stage {rank // 2}", 4, 2)
    moments = distribute_tensor(whole, stage, [Shard(0)], src_data_rank=None)
    optimizer = {"state": {0: {"exp_avg": moments}}}
    saver.save(
        "numbered stages", {**model_with(f"stages.{rank // 2}.x", whole), "optim": optimizer}
    )
    optimizer = {"state": {0: {"exp_avg": sharded_rows(whole, stage.get_group())}}}
    saver.save(
        "numbered stages of FSDP1",
        {**model_with(f"stages.{rank // 2}.x", whole), "optim": optimizer},
    )

    wrong = LoadSpec("x", "x", (9, 2), shards=[ShardSpec(0, rank, WORLD_SIZE)])
    specs = [wrong] if rank == 1 else []
    value = tensor("x", 5, 2)
    saver.save("wrong spec", model_with("x", value), planner=HFSavePlanner(specs))
    saver.save("after it", model_with("x", value), planner=HFSavePlanner())


def sharded_rows(whole: torch.Tensor, group: Any) -> ShardedTensor:
    """Return a ShardedTensor of which each of two ranks of a group holds half of the rows."""
    half = whole.shape[0] // 2
    ranks = dist.get_process_group_ranks(group)
    places = [
        ShardMetadata([number * half, 0], [half, whole.shape[1]], f"rank:{rank}/cpu")
        for number, rank in enumerate(ranks)
    ]
    number = dist.get_rank(group)
    shards = [LocalShard(whole[number * half :][:half].clone(), places[number])]
    properties = TensorProperties(dtype=whole.dtype)
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, ShardedTensorMetadata(places, whole.shape, properties), process_group=group
    )


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
        errors.append(own_error(raised.error) or raised.error)
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
    assert re.search(r"one on ranks \[[01]", text)
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
        ("subclass, False", "one on ranks [0] and one on ranks [1]"),
        ("subclass, True", "one on ranks [0] and one on ranks [1]"),
        ("vectors of other sizes", "one on ranks [0] and one on ranks [1]"),
        ("scalars of other dtypes", "one on ranks [0, 1, 3] and one on ranks [2]"),
        ("dtypes", "torch.float64 of shape [4, 2] on rank 2"),
        ("dtypes, no export", "torch.float64 of shape [4, 2] on rank 2"),
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
        *("rows", "both", "stages", "vectors", "scalars", "only here", "drifted"),
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


@pytest.mark.parametrize(
    ("name", "fqn"),
    [("random state, False", "rng.cpu"), ("random state, True", "rng.cpu"), ("nested", "model")],
)
def test_values_of_each_rank_are_refused(
    saved: tuple[Path, list[dict[str, Raised | None]]], name: str, fqn: str
) -> None:
    error = refusal(saved, name)
    assert isinstance(error, PlanningError)
    assert error.fqn == fqn
    assert str(error.found).startswith("one on ranks [0] and one on ranks [1]")


@pytest.mark.parametrize("name", ["numbered stages", "numbered stages of FSDP1"])
def test_stages_that_number_their_parameters_from_0_are_refused(
    saved: tuple[Path, list[dict[str, Raised | None]]], name: str
) -> None:
    error = refusal(saved, name)
    assert isinstance(error, PlanningError)
    assert error.fqn == "optim.state.0.exp_avg"
    assert "flatten_optimizer_state_dict=True" in str(error.hint)


def test_local_sizes_that_no_placement_gives_are_refused(
    saved: tuple[Path, list[dict[str, Raised | None]]],
) -> None:
    error = refusal(saved, "uneven")
    assert isinstance(error, PlanningError)
    assert error.fqn == "model.x"
    text = "a local tensor of shape [2, 2], which Shard(dim=0) of [6, 2] gives this rank"
    assert error.expected == text
    assert error.found == "shape [1, 2]"


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


def compared(*models: dict[str, Any], said: SaidOnce | None = None) -> None:
    """Compare models as those of ranks."""
    compared_states(*({"model": model} for model in models), said=said)


def compared_states(
    *states: dict[str, Any],
    said: SaidOnce | None = None,
    planner_class: type[DefaultSavePlanner] = DefaultSavePlanner,
    **options: Any,
) -> None:
    """Compare state dicts as those of ranks."""
    planners = []
    for state in states:
        planner = planner_class(**options)
        planner.set_up_planner(state, is_coordinator=True)
        planners.append(planner)
    samples = [
        samples_of(planned(planner), key=None, world_size=len(states)) for planner in planners
    ]
    plans = [planner.create_local_plan() for planner in planners]
    check_samples(samples, plans, said=said or SaidOnce())


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
    said = SaidOnce()
    with caplog.at_level(logging.WARNING):
        compared({"x": one}, {"x": one * 1.004}, said=said)
        compared({"x": one}, {"x": one * 1.004}, said=said)
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


def test_a_sample_has_all_tensors_in_the_same_order_on_every_rank() -> None:
    count = rank_samples.MAX_DIGESTS + 500
    names = [f"x{i}" for i in range(count)]
    one = samples_of(planned_of({n: torch.ones(2, 2) for n in names}), key=None, world_size=2)
    other = samples_of(
        planned_of({n: torch.ones(2, 2) for n in reversed(names)}), key=None, world_size=2
    )
    assert one == other
    tensors, digests = rows_of(one)
    assert len(tensors) == count
    assert 0 < len(digests) <= rank_samples.MAX_DIGESTS


@pytest.mark.parametrize("place", range(0, 2500, 500))
@pytest.mark.parametrize("kind", ["tensors", "numbers"])
def test_one_of_thousands_of_tensors_or_numbers_is_found(kind: str, place: int) -> None:
    """Also among so many that a sample of some of them would miss it."""
    value = (lambda x: torch.full((2,), x)) if kind == "tensors" else float
    one, other = (beside(optim={f"m{i}": value(1.0) for i in range(2500)}) for _ in range(2))
    other["optim"][f"m{place}"] = value(2.0)
    with pytest.raises(PlanningError, match="different values") as caught:
        compared_states(one, other)
    assert caught.value.fqn == f"optim.m{place}"


def test_a_rank_that_saves_alone_samples_nothing() -> None:
    assert samples_of(planned_of({"x": torch.ones(2, 2)}), key=None, world_size=1) == b""


def test_two_models_are_compared_when_nobody_says_which_one_is_exported() -> None:
    states = [
        {"actor": {"x": tensor("x", 3, 3)}, "critic": {"y": tensor(f"y of {rank}", 3, 3)}}
        for rank in range(2)
    ]
    with pytest.raises(PlanningError, match="different tensors") as caught:
        compared_states(*states)
    assert caught.value.fqn == "critic.y"


# Everything that is not a weight


def beside(**entries: Any) -> dict[str, Any]:
    return {"model": {"w": tensor("w", 4, 3)}, **entries}


def generator_state(draws: int) -> torch.Tensor:
    """Return a random state after some draws: only its counters tell how many there were."""
    generator = torch.Generator().manual_seed(7)
    torch.rand(draws, generator=generator)
    return generator.get_state()


def optimizer_of(value: Any) -> dict[str, Any]:
    return beside(optim={"state": {0: {"exp_avg": value}}})


def codes_of(value: float, scale: float = 0.1) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.full((3, 3), value), scale, 0, torch.quint8)


def channels_of(value: float) -> torch.Tensor:
    zeros = torch.zeros(3, dtype=torch.long)
    scales = torch.full((3,), value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_channel(torch.full((3, 3), value), scales, zeros, 0, torch.qint8)


def rows_of_ones(*columns: int) -> torch.Tensor:
    """Return a sparse matrix with a one in each row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = torch.arange(len(columns) + 1)
        return torch.sparse_csr_tensor(ends, torch.tensor(columns), torch.ones(len(columns)))


def nested(value: float) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.full((3,), value)])


def around_itself(value: int) -> SimpleNamespace:
    made = SimpleNamespace(value=value)
    made.inner = {"outer": made}
    return made


# Two values under one name, by what differs.
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "moments": (optimizer_of(torch.zeros(4, 4)), optimizer_of(torch.ones(4, 4))),
    "moments of a vector": (optimizer_of(torch.zeros(4)), optimizer_of(torch.ones(4))),
    "a scalar": (optimizer_of(torch.tensor(1.0)), optimizer_of(torch.tensor(2.0))),
    "shape of a moment": (optimizer_of(torch.zeros(4)), optimizer_of(torch.zeros(5))),
    "dtype of a scalar": (
        optimizer_of(torch.tensor(1.0)),
        optimizer_of(torch.tensor(1.0, dtype=torch.float64)),
    ),
    "encoded moments": (
        optimizer_of(Coded.of(torch.ones(4, 4))),
        optimizer_of(Coded.of(torch.ones(4, 4) * 2)),
    ),
    "shape of a vector of the model": (
        {"model": {"w": torch.ones(4, 4), "b": torch.ones(4)}},
        {"model": {"w": torch.ones(4, 4), "b": torch.ones(5)}},
    ),
    "dtype of a scalar of the model": (
        {"model": {"w": torch.ones(4, 4), "s": torch.tensor(1)}},
        {"model": {"w": torch.ones(4, 4), "s": torch.tensor(1.0)}},
    ),
    "a subclass in the model": (
        {"model": {"x": tensor("x", 4, 4).as_subclass(Named)}},
        {"model": {"x": tensor("y", 4, 4).as_subclass(Named)}},
    ),
    "a wrapper in the model": (
        {"model": {"x": Gathered.of(tensor("x", 4, 4))}},
        {"model": {"x": Gathered.of(tensor("y", 4, 4))}},
    ),
    "random state": (beside(rng=generator_state(3)), beside(rng=generator_state(5))),
    "another entry": (beside(mine=torch.zeros(3)), beside(mine=torch.ones(3))),
    "a number": (beside(dataloader={"at": 3}), beside(dataloader={"at": 4})),
    "a text": (beside(run="a"), beside(run="b")),
    "bytes": (beside(loader=b"a"), beside(loader=b"b")),
    "a list": (beside(losses=[1.0, 2.0]), beside(losses=[1.0, 3.0])),
    "an infinite loss": (beside(loss=math.inf), beside(loss=-math.inf)),
    "an infinite moment": (
        optimizer_of(torch.full((4, 4), math.inf)),
        optimizer_of(torch.ones(4, 4)),
    ),
    "a loss": (beside(loss=1.0), beside(loss=1.5)),
    "python's random state": (
        beside(rng=random.Random(1).getstate()),
        beside(rng=random.Random(2).getstate()),
    ),
    "an array": (beside(rng=np.zeros(3)), beside(rng=np.ones(3))),
    "a stream": (beside(rng=io.BytesIO(b"a")), beside(rng=io.BytesIO(b"b"))),
    "parameters of a group": (
        beside(optim={"param_groups": [{"lr": 0.1, "params": ["a"]}]}),
        beside(optim={"param_groups": [{"lr": 0.1, "params": ["b"]}]}),
    ),
    "a tensor in a tuple": (beside(rng=(torch.zeros(3),)), beside(rng=(torch.ones(3),))),
    "a tensor in a set": (beside(x={torch.zeros(3)}), beside(x={torch.ones(3)})),
    "a tensor in an object": (
        beside(x=SimpleNamespace(a=[torch.zeros(3)])),
        beside(x=SimpleNamespace(a=[torch.ones(3)])),
    ),
    "a field of an object": (beside(x=SimpleNamespace(a=1)), beside(x=SimpleNamespace(a=2))),
    "codes": (optimizer_of(codes_of(1.0)), optimizer_of(codes_of(2.0))),
    "scales": (optimizer_of(codes_of(1.0, 0.1)), optimizer_of(codes_of(2.0, 0.2))),
    "scales of channels": (optimizer_of(channels_of(1.0)), optimizer_of(channels_of(2.0))),
    "codes in the model": (
        {"model": {"w": torch.ones(4, 4), "q": codes_of(1.0)}},
        {"model": {"w": torch.ones(4, 4), "q": codes_of(2.0)}},
    ),
    "codes in a tuple": (beside(x=(codes_of(1.0),)), beside(x=(codes_of(2.0),))),
    "a sparse tensor in a tuple": (
        beside(x=(torch.ones(3).to_sparse(),)),
        beside(x=((torch.ones(3) * 2).to_sparse(),)),
    ),
    "places of a sparse tensor in a tuple": (
        beside(x=(rows_of_ones(0, 1, 2),)),
        beside(x=(rows_of_ones(2, 1, 0),)),
    ),
    "a nested tensor in a tuple": (
        beside(x=(nested(0.0),)),
        beside(x=(nested(1.0),)),
    ),
    "a number and another kind of value": (beside(x=1.0), beside(x=7)),
    "a number and a text": (beside(x=1.0), beside(x="a")),
    "a value that contains itself": (beside(x=around_itself(1)), beside(x=around_itself(2))),
    "flattened moments": (
        {"w": torch.ones(2, 2), "state.w.exp_avg": torch.zeros(2)},
        {"w": torch.ones(2, 2), "state.w.exp_avg": torch.ones(2)},
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_values_that_differ_are_refused_wherever_they_lie(name: str) -> None:
    one, other = DIFFERENT[name]
    compared_states(one, one)
    with pytest.raises(PlanningError, match="DCP would keep only one of them") as caught:
        compared_states(one, one, other)
    assert caught.value.found == "one on ranks [0, 1] and one on ranks [2]"
    assert caught.value.fqn is not None


@pytest.mark.parametrize("name", ["moments", "a subclass in the model", "a tensor in a tuple"])
def test_values_are_compared_when_the_planner_does_not_flatten(name: str) -> None:
    one, other = DIFFERENT[name]
    compared_states(one, one, flatten_state_dict=False)
    with pytest.raises(PlanningError, match="DCP would keep only one of them"):
        compared_states(one, other, flatten_state_dict=False)


@pytest.mark.parametrize("name", ["a number", "a list", "moments", "a tensor in a tuple"])
def test_values_are_compared_when_the_planner_shows_nothing(name: str) -> None:
    plans, samples = [], []
    for state in DIFFERENT[name]:
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=True)
        plans.append(planner.create_local_plan())
        del planner.state_dict
        samples.append(samples_of(Planned.of(planner, state), key=None, world_size=2))
    with pytest.raises(PlanningError, match="DCP would keep only one of them"):
        check_samples(samples, plans)


def test_message_about_state_names_the_ways_out() -> None:
    with pytest.raises(PlanningError) as caught:
        compared_states(*DIFFERENT["random state"])
    assert caught.value.fqn == "rng"
    assert "PerRank(value)" in str(caught.value.hint)
    assert "one rank only" in str(caught.value.hint)


# What looks different but is equal, or differs by design.
ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "order of a dict in a tuple": (beside(x=({1: 2, 3: 4},)), beside(x=({3: 4, 1: 2},))),
    "objects that are shared": (
        beside(x=(twice := ["a" * 9], twice)),
        beside(x=(["a" * 9], ["aaaaaaaaa"])),
    ),
    "a set": (
        beside(x={f"{i}" for i in range(99)}),
        beside(x={f"{i}" for i in reversed(range(99))}),
    ),
    "a number that is none": (beside(x=[math.nan]), beside(x=[float("nan")])),
    "infinity": (
        optimizer_of(torch.full((4, 4), math.inf)),
        optimizer_of(torch.full((4, 4), math.inf)),
    ),
    "time that passed": (beside(seconds=1000.0), beside(seconds=1001.0)),
    "moments that drifted": (
        optimizer_of(tensor("m", 9, 9)),
        optimizer_of(tensor("m", 9, 9) * 1.0001),
    ),
    "batch norm statistics": (
        beside(ema={"w": torch.ones(4, 3), "mean": torch.zeros(3)}),
        beside(ema={"w": torch.ones(4, 3), "mean": torch.zeros(3)}),
    ),
    "a value of one rank": (beside(step=3), beside()),
    "a lock": (beside(x=threading.Lock()), beside(x=threading.Lock())),
    "state of a layer": (
        {"model": {"w": torch.ones(2, 2), "l._extra_state": io.BytesIO(b"a")}},
        {"model": {"w": torch.ones(2, 2), "l._extra_state": io.BytesIO(b"b")}},
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_equal_values_and_those_that_differ_by_design_are_not_refused(name: str) -> None:
    compared_states(*ALIKE[name])


def test_value_that_contains_itself_is_not_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    compared_states(beside(x=(cycle,)), beside(x=(cycle,)))


def test_vectors_of_the_model_that_differ_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    said = SaidOnce()
    states = [
        {"model": {"w": torch.ones(2, 2), "mean": torch.full((3,), float(rank))}}
        for rank in range(2)
    ]
    with caplog.at_level(logging.WARNING):
        compared_states(*states, said=said)
        compared_states(*states, said=said)
    (record,) = caplog.records
    assert record.getMessage() == (
        "ranks hold different values of model.mean: one on ranks [0] and one on ranks [1]; the "
        "save keeps one of them"
    )


def test_small_drift_is_not_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compared_states(beside(seconds=1000.0), beside(seconds=1000.25))
    assert "the replicas of seconds have drifted apart" in caplog.text


def test_one_element_that_differs_is_not_silent(caplog: pytest.LogCaptureFixture) -> None:
    one, other = (optimizer_of(torch.zeros(100, 100)) for _ in range(2))
    other["optim"]["state"][0]["exp_avg"][3, 4] = 5.0
    with caplog.at_level(logging.WARNING):
        compared_states(one, other)
    assert "the replicas of optim.state.0.exp_avg have drifted apart" in caplog.text


def test_one_value_among_many_is_found() -> None:
    count = rank_samples.MAX_DIGESTS + 500
    one, other = ({f"x{i}": i for i in range(count)} for _ in range(2))
    other["x777"] = -1
    with pytest.raises(PlanningError, match="different values"):
        compared_states(one, other)


def test_planner_without_shards_keeps_one_of_the_tensors(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compared_states(*DIFFERENT["moments"], planner_class=HFSavePlanner)
    assert "ranks hold different values of optim.state.0.exp_avg" in caplog.text
    with pytest.raises(PlanningError):
        compared_states(*DIFFERENT["a number"], planner_class=HFSavePlanner)


def test_state_that_no_spec_covers_is_refused() -> None:
    """The parameter is declared; the path of its optimizer state has a form that nobody knows."""
    states = [
        {
            "model": {"w": tensor(f"w of {rank}", 2, 3)},
            "moments": {"first": {"of w": tensor(f"m of {rank}", 2, 3)}},
        }
        for rank in range(2)
    ]
    plans, samples = [], []
    for rank, state in enumerate(states):
        planner = HFSavePlanner([LoadSpec("w", "w", (4, 3), shards=[ShardSpec(0, rank, 2)])])
        planner.set_up_planner(state, is_coordinator=True)
        samples.append(samples_of(planned(planner), key=None, world_size=2))
        plans.append(planner.create_local_plan())
    with pytest.raises(PlanningError) as caught:
        check_samples(samples, plans)
    assert caught.value.fqn == "moments.first.of w"
    assert "HFSavePlanner(specs)" in str(caught.value.hint)


def test_spec_may_say_that_a_tensor_that_differs_is_whole() -> None:
    whole = LoadSpec("router", "router", (4, 3), shards=[ShardSpec(0, 0, 1)])
    shard = LoadSpec("w", "w", (4, 3), shards=[ShardSpec(0, 0, 1)])
    samples = []
    for rank in range(2):
        planner = HFSavePlanner([whole, shard])
        planner.set_up_planner({"model": {"router": tensor(f"{rank}", 4, 3)}})
        samples.append(samples_of(planned(planner), key=None, world_size=2))
    check_samples(samples, [])


def test_a_sample_has_rows_of_known_size() -> None:
    sample = samples_of(planned_of({"x": torch.ones(4, 4)}), key=None, world_size=2)
    assert len(sample) == 8 + TENSOR_ROW.itemsize + DIGEST_ROW.itemsize
