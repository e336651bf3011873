"""What a dry run says is what a save then does, and the dry run leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dcp_hf_writer import HFDualWriter, HFExport, LoadSpec
from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.mapping.abbreviated_names import patterns, ranges
from dcp_hf_writer.mapping.load_spec import Piece, ShardSpec
from dcp_hf_writer.preflight import explanation_tables
from dcp_hf_writer.save import hf_half
from dcp_hf_writer.tensors.strided_copies import covered
from dcp_hf_writer.torch_seam.planners import HFSavePlanner
from support.audit import read_manifest
from support.plan_caches import is_cached
from support.rank_tensors import tensor
from support.ranks import run_ranks
from support.small_states import state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

    from dcp_hf_writer.preflight.explanation import Explanation

EXPERTS, WIDTH, HIDDEN = 4, 6, 8
LAYERS = 3


def moe_specs() -> list[LoadSpec]:
    """Experts one by one, a fused projection, a transpose, and rows of padding."""
    specs = [LoadSpec("embed.weight", "embed.weight", (16, HIDDEN), origin_shape=(13, HIDDEN))]
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        experts = [
            Piece(
                f"{name}.experts.{expert}.{half}_proj.weight",
                (WIDTH, HIDDEN),
                ((WIDTH * HIDDEN, 1, 1),),
                start=(2 * expert + i) * WIDTH * HIDDEN,
            )
            for expert in range(EXPERTS)
            for i, half in enumerate(("gate", "up"))
        ]
        qkv = [f"{name}.{part}_proj.weight" for part in "qkv"]
        down = Piece(f"{name}.down.weight", (HIDDEN, 4), ((HIDDEN, 4, 1), (4, 1, HIDDEN)))
        specs += [
            LoadSpec(f"{name}.experts", global_shape=(EXPERTS, 2 * WIDTH, HIDDEN), pieces=experts),
            LoadSpec(f"{name}.qkv", qkv, (16, HIDDEN), fused_sizes=(8, 4, 4)),
            LoadSpec(f"{name}.down", global_shape=(4, HIDDEN), pieces=[down]),
        ]
    return specs


def moe_state(mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Return a state dict of a small MoE model with its optimizer, sharded over a 2 x 2 mesh."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
        "embed.weight": ((16, HIDDEN), (Shard(0), Replicate()))
    }
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.experts": ((EXPERTS, 2 * WIDTH, HIDDEN), (Shard(1), Shard(0))),
            f"layers.{layer}.qkv": ((16, HIDDEN), (Shard(0), Shard(1))),
            f"layers.{layer}.down": ((4, HIDDEN), (Shard(0), Shard(1))),
            f"layers.{layer}.out.weight": ((HIDDEN, 5), (Shard(0), Shard(1))),
        }
    model = {name: tensor(name, *shape) for name, (shape, _) in shapes.items()}
    if mesh is not None:
        model = {
            name: distribute_tensor(value, mesh, shapes[name][1], src_data_rank=None)
            for name, value in model.items()
        }
    model["norm.weight"] = tensor("norm", HIDDEN)
    moments = {name: {"exp_avg": torch.zeros_like(value)} for name, value in model.items()}
    return {"model": model, "optim": {"state": moments, "lr": 0.1}, "step": 7}


def moe_export(**options: Any) -> HFExport:
    return HFExport(specs=moe_specs(), max_shard_size=3000, **options)


def check_against(explanation: Explanation, directory: Path) -> None:
    """Compare each block, file and sum with those of a checkpoint."""
    manifest = read_manifest(directory)
    written = {
        (key, rank, start, 1 if not loops else math.prod(count for count, _ in loops)): digest
        for file in manifest["hf"]["files"].values()
        for key, (*_, blocks) in file["tensors"].items()
        for rank, start, _, loops, digest in blocks
    }
    rows = {(row.key, row.rank, row.start, row.runs): row for row in explanation.rows}
    assert rows.keys() == written.keys()
    assert len(rows) == len(explanation.rows)
    for block, row in rows.items():
        data = (directory / "hf" / row.file).read_bytes()[row.start : row.stop]
        if row.runs == 1:
            assert xxhash.xxh3_64_hexdigest(data) == written[block]
            assert len(data) == row.nbytes
    files = [file for file in explanation.files if file.tensors]
    assert {file.name: [file.nbytes, file.header_nbytes, file.tensors] for file in files} == {
        name: [file["nbytes"], file["header_nbytes"], len(file["tensors"])]
        for name, file in manifest["hf"]["files"].items()
    }
    for file in explanation.files:
        assert (directory / "hf" / file.name).stat().st_size == file.nbytes
    check_sums(explanation, manifest)


def check_sums(explanation: Explanation, manifest: dict[str, Any]) -> None:
    for one in explanation.ranks:
        rows = [row for row in explanation.rows if row.rank == one.rank]
        assert one.hf_nbytes == sum(row.nbytes for row in rows)
        assert (one.blocks, one.files) == (len(rows), len({row.file for row in rows}))
        stored = manifest["dcp"].get(f"__{one.rank}_0.distcp", {"ranges": []})
        assert one.dcp_nbytes == sum(nbytes for _, nbytes, _ in stored["ranges"])
    data = sum(file.nbytes - file.header_nbytes for file in explanation.files if file.tensors)
    assert sum(row.nbytes for row in explanation.rows) == data


# On ranks


class FailsOnRank1(DefaultSavePlanner):
    def create_local_plan(self) -> Any:
        if torch.distributed.get_rank() == 1:
            msg = "rank 1 cannot plan"
            raise PlanningError(msg, fqn="w")
        return super().create_local_plan()


def explain_and_save(rank: int, world_size: int, root: Path) -> dict[str, Explanation | str]:
    mesh = init_device_mesh("cpu", (2, world_size // 2))
    found: dict[str, Any] = {}
    state = moe_state(mesh)
    for name, export, options in (
        ("plain", moe_export(), {}),
        ("cast", moe_export(dtype=torch.bfloat16, keep_dtype=("norm",)), {}),
        ("once", moe_export(), {"weights": "once"}),
    ):
        writer = HFDualWriter(root / name, export=export, **options)
        found[name] = writer.explain(state)
        assert not root.exists() or name not in {path.name for path in root.iterdir()}
        torch.distributed.barrier()
        dcp.save(state, storage_writer=writer)
    shards = (ShardSpec(0, rank, world_size, interleave=2),)
    spec = LoadSpec("w", ["gate", "up"], (16, 3), shards=shards)
    own = torch.cat([part.chunk(world_size)[rank] for part in tensor("w", 16, 3).chunk(2)])
    writer = HFDualWriter(root / "by hand", export=HFExport(specs=[spec]))
    found["by hand"] = writer.explain({"w": own}, planner=HFSavePlanner([spec]))
    dcp.save({"w": own}, storage_writer=writer, planner=HFSavePlanner([spec]))
    with pytest.raises(PlanningError) as caught:
        writer.explain(state, planner=FailsOnRank1())
    found["error"] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("explained")
    return root, run_ranks(explain_and_save, 4, root)


@pytest.mark.parametrize("name", ["plain", "cast", "once", "by hand"])
def test_save_writes_what_the_dry_run_said_on_4_ranks(
    explained: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    root, found = explained
    check_against(found[0][name], root / name)


def test_every_rank_gets_the_same_answer(
    explained: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, found = explained
    assert all(one == found[0] for one in found)
    assert "rank 1 cannot plan" in found[0]["error"]
    assert found[0]["error"].startswith("rank 1")


def test_ways_and_runs_follow_from_cut_and_spec(
    explained: tuple[Path, list[dict[str, Any]]],
) -> None:
    plain, cast = (explained[1][0][name] for name in ("plain", "cast"))
    seen = {row.fqn.rpartition(".")[2]: set[Any]() for row in plain.rows}
    for row in plain.rows:
        seen[row.fqn.rpartition(".")[2]].add((row.way, row.runs > 1))
    # A transpose swaps what is contiguous; columns lie between those of other ranks.
    assert seen == {
        "weight": {("direct", False), ("direct", True)},
        "experts": {("direct", False)},
        "qkv": {("direct", True)},
        "down": {("strided", True)},
    }
    ways = {row.key: row.way for row in cast.rows}
    assert {key for key, way in ways.items() if way == "direct"} == {"norm.weight"}
    assert set(ways.values()) == {"direct", "cast"}


def test_weights_that_are_stored_once_are_not_in_the_dcp_half(
    explained: tuple[Path, list[dict[str, Any]]],
) -> None:
    plain, once = (explained[1][0][name] for name in ("plain", "once"))
    kept = {name for name in moe_state()["model"] if name != "embed.weight"}
    assert set(once.stored_once) == {f"model.{name}" for name in kept}
    assert plain.stored_once == ()
    weights = sum(value.nbytes for name, value in moe_state()["model"].items() if name in kept)
    dcp_nbytes = [sum(one.dcp_nbytes for one in each.ranks) for each in (plain, once)]
    assert dcp_nbytes[0] - dcp_nbytes[1] == weights
    assert "stored once, in the export: 13 tensors" in str(once)


# Alone


def test_dry_run_alone_says_what_the_save_does(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "step-1", export=moe_export())
    explanation = writer.explain(moe_state())
    assert list(tmp_path.iterdir()) == []
    dcp.async_save(moe_state(), storage_writer=writer).result()
    check_against(explanation, tmp_path / "step-1")


def test_ways_are_those_that_an_asynchronous_save_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[tuple[str, tuple[int, ...]], str] = {}
    way_of = hf_half.way_of

    def recorded(value: torch.Tensor, region: Any) -> Any:
        found = taken[region.target.key, region.copy.hf_start] = way_of(value, region)
        return found

    state = {**moe_state()["model"], "conv.weight": tensor("conv", 2, 3, 4, 5)}
    # Staging makes it contiguous.
    state["conv.weight"] = state["conv.weight"].to(memory_format=torch.channels_last)
    writer = HFDualWriter(tmp_path / "step-1", export=moe_export(keep_dtype=["q_proj"]))
    explanation = writer.explain(state)
    monkeypatch.setattr(hf_half, "way_of", recorded)
    dcp.async_save(state, storage_writer=writer).result()
    assert {(row.key, row.hf_offsets): row.way for row in explanation.rows} == taken
    assert set(taken.values()) == {"direct", "strided"}


def test_what_is_left_out_is_named_with_its_reason(tmp_path: Path) -> None:
    state = moe_state()
    state["model"]["head.weight"] = state["model"]["embed.weight"]
    state["model"] |= {"rope": torch.zeros(6), "part": torch.zeros(4, 5)}
    specs = [
        *moe_specs(),
        LoadSpec("rope", (), (6,), pieces=()),
        LoadSpec("part", (), (4, 5), pieces=[Piece("p", (4, 2), ((4, 2, 5), (2, 1, 1)), start=1)]),
    ]
    explanation = HFDualWriter(tmp_path / "s", export=HFExport(specs=specs)).explain(state)
    found = {one.fqn: (one.why, one.elements, one.nbytes) for one in explanation.left_out}
    beside = {fqn for fqn, (why, *_) in found.items() if why == "beside"}
    assert len(beside) == len(moe_state()["model"])
    assert {fqn: what for fqn, what in found.items() if fqn not in beside} == {
        "model.embed.weight": ("padding", 3 * HIDDEN, 4 * 3 * HIDDEN),
        "model.head.weight": ("tied", 16 * HIDDEN, 4 * 16 * HIDDEN),
        "model.rope": ("spec", 6, 24),
        "model.part": ("unmapped", 12, 48),
        "optim.lr": ("value", 0, 0),
        "step": ("value", 0, 0),
    }
    reasons = {one.fqn: one.reason for one in explanation.left_out}
    assert reasons["model.head.weight"] == "tied to 'embed.weight'"
    assert reasons["model.embed.weight"] == f"padding beyond {[13, HIDDEN]}"
    assert reasons["optim.state.norm.weight.exp_avg"] == "entry 'optim' is not part of the model"


def test_keys_that_are_expected_are_compared_and_do_not_end_the_dry_run(tmp_path: Path) -> None:
    state = {"a": torch.zeros(2), "b": torch.zeros(2)}
    writer = HFDualWriter(tmp_path / "step-1", export=HFExport(expect_keys=["b", "c"]))
    explanation = writer.explain(state)
    assert (explanation.missing_keys, explanation.unexpected_keys) == (("c",), ("a",))
    assert "1 missing and 1 not expected" in explanation.problems[0]
    assert "the save would be refused" in str(explanation)
    with pytest.raises(BaseException, match="would not have the expected keys"):
        dcp.save(state, storage_writer=writer)
    whole = HFDualWriter(tmp_path / "s", export=HFExport(expect_keys=["a", "b"])).explain(state)
    assert whole.problems == ()


def test_files_and_keys_of_like_are_shown(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "mtp": "two.safetensors"}
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    state = {"a": torch.zeros(2), "b": torch.zeros(2)}
    writer = HFDualWriter(tmp_path / "step-1", export=HFExport(like=base))
    explanation = writer.explain(state)
    assert {row.key: row.file for row in explanation.rows} == {
        key: weight_map[key] for key in state
    }
    # A save leaves such keys out without a word, as these are of layers that nobody trains.
    assert (explanation.missing_keys, explanation.problems) == (("mtp",), ())
    other = writer.explain({**state, "c": torch.zeros(2)})
    assert (other.unexpected_keys, len(other.problems)) == (("c",), 1)


def test_dry_run_reads_no_assets_and_stages_nothing(tmp_path: Path) -> None:
    class Config:
        def save_pretrained(self, _: str) -> None:
            msg = "not now"
            raise AssertionError(msg)

    state = state_of(1)
    writer = HFDualWriter(tmp_path / "step-1", export=HFExport(assets=Config()))
    values = {name: value.clone() for name, value in state["model"].items()}
    writer.explain(state)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(value, state["model"][name]) for name, value in values.items())


def test_plans_that_torch_keeps_are_neither_used_nor_changed(tmp_path: Path) -> None:
    planner = DefaultSavePlanner(enable_plan_caching=True)
    caches = [
        SavePlanner._cached_save_plan,
        SavePlanner._cached_all_plans,
        SavePlanner._cached_global_plan,
        SavePlanner._cached_final_save_plan,
    ]
    for cache in caches:
        cache.clear()
    writer = HFDualWriter(tmp_path / "step-1")
    first = writer.explain(state_of(1), planner=planner)
    assert caches == [{}] * 4
    dcp.save(state_of(1), storage_writer=writer, planner=planner)
    kept = [dict(cache) for cache in caches]
    assert writer.explain(state_of(1), planner=planner) == first
    assert all(
        now.keys() == before.keys() and all(now[key] is before[key] for key in now)
        for now, before in zip(caches, kept, strict=True)
    )
    dcp.save(state_of(2), storage_writer=HFDualWriter(tmp_path / "step-2"), planner=planner)
    assert is_cached()
    check_against(first, tmp_path / "step-2")


def test_model_on_the_meta_device_is_explained(tmp_path: Path) -> None:
    state = {name: value.to("meta") for name, value in moe_state()["model"].items()}
    explanation = HFDualWriter(tmp_path / "s", export=moe_export()).explain({"model": state})
    real = HFDualWriter(tmp_path / "s", export=moe_export()).explain(
        {"model": moe_state()["model"]}
    )
    assert explanation == real


def test_dcp_half_alone_is_explained(tmp_path: Path) -> None:
    explanation = HFDualWriter(tmp_path / "s", export=None).explain(moe_state())
    assert (explanation.rows, explanation.files, explanation.left_out) == ((), (), ())
    assert explanation.ranks[0].values == 2
    assert "no export" in str(explanation)


def test_why_the_save_would_have_no_export_is_a_problem_of_the_dry_run(tmp_path: Path) -> None:
    def problems(state: dict[str, Any], **options: Any) -> tuple[str, ...]:
        writer = HFDualWriter(tmp_path / "s", export=HFExport(**options))
        return writer.explain(state).problems

    wrong = [LoadSpec("a", "b", (3,))]
    model = {"a": torch.zeros(2)}
    for found, words in (
        (problems(model, specs=wrong), "the shape in a spec is not the shape of its tensor"),
        (problems({"a": model, "b": model}), "more than one entry"),
        (problems({"a": torch.zeros(2, dtype=torch.complex128)}), "complex128"),
        (problems(model, assets={"model.safetensors": b""}), "model.safetensors"),
        (problems({"optim": model}), "holds no weights"),
    ):
        assert [words in one and "would have no export" in one for one in found] == [True], words


# What is printed


def moe_table(tmp_path: Path) -> str:
    writer = HFDualWriter(tmp_path / "step-1", export=moe_export(dtype=torch.bfloat16))
    return str(writer.explain(moe_state()))


def test_layers_are_one_line(tmp_path: Path) -> None:
    lines = [" ".join(line.split()) for line in moe_table(tmp_path).splitlines()]
    assert "layers.{0-2}.experts 3 [4, 12, 8] F32 4.61 kB 0" in lines
    assert "-> layers.{0-2}.experts.{0-3}.{gate,up}_proj.weight" in " ".join(lines)
    assert "-> layers.{0-2}.q_proj.weight 3 [8, 8] BF16 384 B 1-2 cast" in lines
    assert "-> layers.{0-2}.{k,v}_proj.weight 6 [4, 8] BF16 384 B 1-2 cast" in lines
    assert "norm.weight 1 [8] F32 -> BF16 16 B 0 2 cast" in lines
    assert "cast: through the bounce buffer, to change the dtype" in lines
    nbytes = sum(value.nbytes for value in moe_state()["model"].values())
    assert f"entry 'optim' is not part of the model: 14 tensors, {nbytes / 1000:.2f} kB" in lines


@pytest.mark.parametrize("width", [100, 120])
@pytest.mark.parametrize("collapse", [True, False])
def test_lines_fit_a_terminal(tmp_path: Path, width: int, *, collapse: bool) -> None:
    export = moe_export(expect_keys=[f"layers.{i}.a_key_of_some_length.weight" for i in range(40)])
    explanation = HFDualWriter("/checkpoints/step-1", export=export).explain(moe_state())
    table = explanation.table(width=width, collapse=collapse)
    assert max(map(len, table.splitlines())) <= width
    assert not re.search(r" $", table, re.MULTILINE)


def test_each_block_is_shown_with_its_bytes_where_layers_are_not_collapsed(tmp_path: Path) -> None:
    explanation = HFDualWriter(tmp_path / "s", export=moe_export()).explain(moe_state())
    for width in (40, 120):
        text = explanation.table(collapse=False, width=width)
        for row in explanation.rows:
            assert row.key in text
            assert f"{row.start:,}-{row.stop:,}" in text


PARTS = st.sampled_from(["a", "b_x", "c_x", "w1", "w3", "0", "1", "2", "3", "7", "10", "007"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=40, unique=True))
def test_patterns_stand_for_exactly_their_names(names: list[str]) -> None:
    found = patterns(names, is_complete=True)
    assert sorted(name for some in found.values() for name in some) == sorted(names)
    for pattern, some in found.items():
        assert sorted(expanded(pattern)) == sorted(some)


def expanded(pattern: str) -> Iterator[str]:
    """Yield the names that a pattern stands for, read from its text."""
    pieces = re.split(r"(\{[^}]*\})", pattern)
    choices = [_choices(piece) if piece.startswith("{") else [piece] for piece in pieces]
    yield from map("".join, itertools.product(*choices))


def _choices(braces: str) -> list[str]:
    found = []
    for choice in braces[1:-1].split(","):
        low, dash, high = choice.partition("-")
        found += map(str, range(int(low), int(high) + 1)) if dash else [choice]
    return found


def test_middle_of_what_is_many_is_left_out() -> None:
    assert ranges(range(0, 40, 2)) == "0,2,4,6,...,38"
    assert ranges([3, 1, 2, 9]) == "1-3,9"
    names = [f"a.{i}.{word}_proj" for i in range(20) for word in "abcdefgh"]
    assert list(patterns(names)) == ["a.{0-19}.{a,b,c,d,...,h}_proj"]
    assert list(patterns(names, is_complete=True)) == ["a.{0-19}.{a,b,c,d,e,f,g,h}_proj"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([4], "4"), ([2, 0, 1], "0-2"), ([1, 3, 4, 9], "1,3-4,9"), ([1, 3, 5, 7], "1..7")],
)
def test_ranks_and_files_that_lie_here_and_there_are_first_and_last(
    numbers: list[int], text: str
) -> None:
    assert explanation_tables._span(numbers) == text


@settings(deadline=None)
@given(st.data())
def test_elements_that_loops_visit_are_counted_once(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3).map(tuple))
    parts = data.draw(st.lists(parts_in(shape), max_size=5))
    seen = torch.zeros(shape, dtype=torch.int64)
    for start, loops in parts:
        for steps in itertools.product(*(range(extent) for extent, _, _ in loops)):
            at = list(start)
            for step, (_, dim, stride) in zip(steps, loops, strict=True):
                at[dim] += step * stride
            seen[tuple(at)] = 1
    assert covered(parts, shape) == int(seen.sum())


def parts_in(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    """Draw a first index and at most one loop a dimension, which stay in a tensor."""

    @st.composite
    def part(draw: Callable[..., Any]) -> Any:
        start, loops = [], []
        for dim, size in enumerate(shape):
            first = draw(st.integers(0, size - 1))
            step = draw(st.integers(1, 2))
            extent = draw(st.integers(1, 1 + (size - 1 - first) // step))
            start.append(first)
            if extent > 1:
                loops.append((extent, dim, step))
        return tuple(start), tuple(loops)

    return part()


def test_covering_nothing_counts_nothing() -> None:
    assert covered([], (3, 4)) == 0
    assert covered([((), ())], ()) == 1
    assert covered([((0, 0), ((3, 0, 1), (4, 1, 1)))] * 2, (3, 4)) == math.prod((3, 4))
