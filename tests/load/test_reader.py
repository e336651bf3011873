"""HFDualReader in one process: what it reads, casts and leaves alone, alone or in many threads."""

from __future__ import annotations

import io
import itertools
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, HFLoadPlanner, LoadSpec, ShardSpec
from dcp_hf_writer import load_hf as load_hf_directory
from dcp_hf_writer.errors import ConfigError, MismatchError, ReadError
from dcp_hf_writer.mapping.load_spec import Piece
from dcp_hf_writer.storage.fsspec_inputs import FsspecFiles
from support.compare import tensor_difference
from support.small_states import model_of, spoil, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
    from torch.futures import Future


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one checkpoint of each kind, all of step 3."""
    root = tmp_path_factory.mktemp("saved")
    state = state_of(3)
    dcp.save(state, checkpoint_id=root / "stock")
    dcp.save(state, storage_writer=HFDualWriter(root / "both"))
    dcp.save(state, storage_writer=HFDualWriter(root / "once", weights="once"))
    dcp.save(state, storage_writer=HFDualWriter(root / "dcp", export=None))
    return root


def blank(step: int = 9) -> dict[str, Any]:
    state = state_of(step)
    spoil(state)
    return state


def assert_is_of_step(state: Mapping[str, Any], step: int) -> None:
    assert difference_of(state, state_of(step)) is None


def difference_of(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    have, want = flat(found), flat(expected)
    tensors = {name: value for name, value in want.items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in want.items() if name not in tensors}
    if {name: have.get(name) for name in values} != values:
        return f"expected {values}, found {have}"
    return tensor_difference({name: have[name] for name in tensors}, tensors)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}


def refusal(state: dict[str, Any], reader: HFDualReader, **options: Any) -> BaseException:
    """Return what a load is refused with; torch wraps it, one a rank."""
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=reader, **options)
    (failure,) = caught.value.failures.values()
    found = failure[0]
    assert isinstance(found, BaseException)
    return found


@pytest.mark.parametrize(
    ("name", "verify"),
    [*itertools.product(("both", "once", "dcp"), (False, True)), ("stock", False)],
)
def test_dcp_half_gives_what_was_saved(saved: Path, name: str, verify: bool) -> None:  # noqa: FBT001
    state = blank()
    dcp.load(state, storage_reader=HFDualReader(saved / name, verify=verify))
    assert_is_of_step(state, 3)


@pytest.mark.parametrize("verify", [False, True], ids=["trusting", "verifying"])
@pytest.mark.parametrize("name", ["both", "once"])
def test_hf_half_gives_the_model(saved: Path, name: str, verify: bool) -> None:  # noqa: FBT001
    state = {"model": blank()["model"]}
    dcp.load(state, storage_reader=HFDualReader(saved / name, source="hf", verify=verify))
    assert tensor_difference(state["model"], model_of(3)) is None


@pytest.mark.parametrize("entry", ["model", None, "state"])
def test_hf_half_finds_the_entry_that_is_the_model(saved: Path, entry: str | None) -> None:
    model = blank()["model"]
    state = model if entry is None else {entry: model}
    dcp.load(state, storage_reader=HFDualReader(saved / "both" / "hf"))
    assert tensor_difference(model, model_of(3)) is None


def test_hf_half_loads_into_the_entry_that_key_names(saved: Path) -> None:
    state = {"student": blank()["model"], "teacher": {"w": torch.ones(2)}}
    error = refusal(state, HFDualReader(saved / "both", source="hf"))
    assert "more than one entry" in str(error)
    error = refusal(state, HFDualReader(saved / "both", source="hf", key="student"))
    assert "1 missing: teacher.w" in str(error)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    reader = HFDualReader(saved / "both", source="hf", key="student")
    dcp.load(state, storage_reader=reader, planner=planner)
    assert tensor_difference(state["student"], model_of(3)) is None
    assert torch.equal(state["teacher"]["w"], torch.ones(2))


def test_auto_takes_the_dcp_half_where_there_is_one_and_the_other_else(saved: Path) -> None:
    state = blank()
    dcp.load(state, storage_reader=HFDualReader(saved / "both"))
    assert_is_of_step(state, 3)
    for path in (saved / "both" / "hf", saved / "both" / "hf" / "model.safetensors"):
        model = blank()["model"]
        dcp.load({"model": model}, storage_reader=HFDualReader(path))
        assert tensor_difference(model, model_of(3)) is None


def test_auto_takes_the_export_of_a_checkpoint_without_the_other_half(
    saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / "hf").symlink_to(saved / "both" / "hf")
    model = blank()["model"]
    dcp.load({"model": model}, storage_reader=HFDualReader(tmp_path / "step-3"))
    assert tensor_difference(model, model_of(3)) is None


@pytest.mark.parametrize("source", ["dcp", "hf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_floats_are_cast_to_the_dtype_of_the_target(
    saved: Path, source: Any, dtype: torch.dtype
) -> None:
    model = {name: value.to(dtype) for name, value in blank()["model"].items()}
    dcp.load({"model": model}, storage_reader=HFDualReader(saved / "both", source=source))
    wanted = {name: value.to(dtype) for name, value in model_of(3).items()}
    assert tensor_difference(model, wanted) is None


@pytest.mark.parametrize("source", ["dcp", "hf"])
def test_targets_may_have_any_strides(saved: Path, source: Any) -> None:
    model = {}
    for name, value in blank()["model"].items():
        base = torch.full([2 * n + 1 for n in reversed(value.shape)], 7.0)
        for d, n in enumerate(reversed(value.shape)):
            base = base.narrow(d, 1, 2 * n)[(slice(None),) * d + (slice(None, None, 2),)]
        model[name] = base.permute(tuple(reversed(range(base.ndim))))
    bases = {name: value._base for name, value in model.items() if value._base is not None}
    dcp.load({"model": model}, storage_reader=HFDualReader(saved / "both", source=source))
    assert tensor_difference(model, model_of(3)) is None
    for name, base in bases.items():
        # What lies between the elements was not touched.
        assert (base == 7).sum() == base.numel() - model[name].numel(), name


def test_part_of_a_checkpoint_may_be_loaded(saved: Path) -> None:
    state = {"model": {"norm": torch.zeros(3)}, "step": 0}
    dcp.load(state, storage_reader=HFDualReader(saved / "both"))
    assert torch.equal(state["model"]["norm"], model_of(3)["norm"])  # type: ignore[index]
    assert state["step"] == 3


class Counter:
    """A value that torch asks for its state, and gives its state to."""

    def __init__(self) -> None:
        self.count = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"] + 0


def test_stateful_values_are_loaded(tmp_path: Path) -> None:
    counter = Counter()
    counter.count += 5
    dcp.save({"c": counter, "w": torch.ones(3)}, checkpoint_id=tmp_path / "x")
    other = Counter()
    dcp.load({"c": other, "w": torch.zeros(3)}, storage_reader=HFDualReader(tmp_path / "x"))
    assert torch.equal(other.count, counter.count)


def test_what_does_not_fit_is_refused_in_one_error_and_nothing_is_loaded(saved: Path) -> None:
    state = blank()
    state["model"] |= {f"more.{i}": torch.zeros(1) for i in range(30)} | {"norm": torch.zeros(4)}
    state["model"]["scale"] = torch.zeros(1)
    state["model"]["embed"] = "text"
    before = {name: str(value) for name, value in flat(state).items()}
    error = refusal(state, HFDualReader(saved / "both"))
    assert isinstance(error, MismatchError)
    text = str(error)
    assert "30 missing: model.more.0; model.more.1; " in text
    assert "and 10 more" in text
    assert "3 mismatched: " in text
    assert "model.norm (shape [4], stored as [3])" in text
    assert "model.scale (shape [1], stored as [])" in text
    assert "model.embed (a str, stored as a tensor of shape [7, 4])" in text
    assert {name: str(value) for name, value in flat(state).items()} == before


def test_what_does_not_fit_a_hub_directory_is_refused_in_one_error(saved: Path) -> None:
    state = {
        "model": {
            "embed": torch.zeros(7, 4, dtype=torch.int32),
            "head": torch.zeros(4, 7),
            "tail": torch.zeros(1),
        },
        "optim": {"lr": 0.1},
    }
    error = refusal(state, HFDualReader(saved / "both", source="hf"))
    assert isinstance(error, MismatchError)
    text = str(error)
    assert "2 missing: model.tail; optim.lr" in text
    assert "model.embed (torch.int32, stored as torch.float32)" in text
    assert "model.head (shape [4, 7], stored as [7, 4])" in text
    assert "4 unexpected: layers.0.b; layers.0.w; norm; scale" in text


def test_missing_tensors_are_left_alone_when_the_planner_does_without(saved: Path) -> None:
    state = blank() | {"more": torch.full((2,), 5.0)}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, storage_reader=HFDualReader(saved / "both"), planner=planner)
    assert torch.equal(state.pop("more"), torch.full((2,), 5.0))
    assert_is_of_step(state, 3)


@pytest.mark.parametrize("source", ["auto", "dcp", "hf"])
def test_nothing_to_read_is_an_error_of_its_own_type(tmp_path: Path, source: Any) -> None:
    for path in (tmp_path, tmp_path / "nothing", "memory://nothing"):
        reader = HFDualReader(path, source=source)
        assert isinstance(refusal({"w": torch.zeros(1)}, reader), ReadError)
        with pytest.raises(ReadError):
            reader.read_metadata()


def test_no_digests_to_verify_by_is_an_error(saved: Path) -> None:
    error = refusal(blank(), HFDualReader(saved / "stock", verify=True))
    assert isinstance(error, ReadError)
    assert "dcp-hf.json" in str(error)


@pytest.mark.parametrize(
    "options",
    [
        {"source": "both"},
        {"specs": [3]},
        {"path": ""},
        {"path": "nonsense://x"},
        {"storage_options": {"a": 1}},
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        HFDualReader(**{"path": "x", **options}).read_metadata()


def test_reader_takes_the_checkpoint_id_of_a_load(saved: Path) -> None:
    reader = HFDualReader(saved / "stock")
    state = blank()
    dcp.load(state, checkpoint_id=saved / "both", storage_reader=reader)
    assert_is_of_step(state, 3)
    assert reader.checkpoint_id == str(saved / "both")
    assert HFDualReader.validate_checkpoint_id(saved)


def test_one_reader_serves_many_threads_and_checkpoints_at_once(tmp_path: Path) -> None:
    for step in range(4):
        dcp.save(state_of(step), storage_writer=HFDualWriter(tmp_path / f"step-{step}"))
    reader = HFDualReader(tmp_path / "step-0")
    wrong: list[str] = []
    barrier = threading.Barrier(8)

    def load(number: int) -> None:
        for turn in range(12):
            step = (number + turn) % 4
            state = blank()
            barrier.wait(60)
            dcp.load(state, checkpoint_id=tmp_path / f"step-{step}", storage_reader=reader)
            fault = difference_of(state, state_of(step))
            if fault is not None:
                wrong.append(f"thread {number}, turn {turn}: {fault}")

    threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []


def test_data_without_metadata_before_it_is_refused(saved: Path) -> None:
    reader = HFDualReader(saved / "both")
    with pytest.raises(ConfigError, match="read_metadata"):
        reader.read_data(None, DefaultLoadPlanner())  # type: ignore[arg-type]


@pytest.fixture
def in_memory(saved: Path) -> Iterator[str]:
    """The checkpoints, on a store that only fsspec knows."""
    memory = fsspec.filesystem("memory")
    for path in saved.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/ckpts/{path.relative_to(saved)}", path.read_bytes())
    yield "memory://ckpts"
    memory.rm("/ckpts", recursive=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("both", {}),
        ("both", {"verify": True}),
        ("once", {"verify": True}),
        ("stock", {}),
        ("both", {"source": "hf", "verify": True}),
        ("once/hf", {}),
    ],
    ids=str,
)
def test_url_is_read_through_fsspec(in_memory: str, name: str, options: dict[str, Any]) -> None:
    state = blank()
    if options.get("source") == "hf" or name.endswith("/hf"):
        state = {"model": state["model"]}
    dcp.load(state, storage_reader=HFDualReader(f"{in_memory}/{name}", **options))
    expected = state_of(3)
    assert difference_of(state, {key: expected[key] for key in state}) is None
    if "model" in state:
        model = {name: torch.zeros_like(value) for name, value in model_of(3).items()}
        load_hf_directory(model, f"{in_memory}/both")
        assert tensor_difference(model, model_of(3)) is None


class Renumbered(DefaultLoadPlanner):
    """Looks at all plans, as a planner may."""

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        assert all(plan.items for plan in global_plan)
        return [replace(plan, items=plan.items[::-1]) for plan in global_plan]


class WithoutEmbed(HFDualReader):
    """Leaves a tensor out, as a subclass may."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items = [item for item in plan.items if item.dest_index.fqn != "model.embed"]
        return super().read_data(replace(plan, items=items), planner)


def test_items_of_plans_stay_on_their_ranks(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LoadPlan] = []

    def watched(_: DefaultLoadPlanner, plans: list[LoadPlan]) -> list[LoadPlan]:
        seen.extend(plans)
        return plans

    monkeypatch.setattr(DefaultLoadPlanner, "create_global_plan", watched)
    state = blank()
    dcp.load(state, storage_reader=HFDualReader(saved / "both"))
    assert [plan.items for plan in seen] == [[]]
    assert_is_of_step(state, 3)


def test_who_looks_at_plans_is_shown_them(saved: Path) -> None:
    on_instance = DefaultLoadPlanner()
    on_instance.finish_plan = lambda plan: replace(plan, items=[])  # type: ignore[method-assign]
    state = blank()
    dcp.load(state, storage_reader=HFDualReader(saved / "both"), planner=Renumbered())
    assert_is_of_step(state, 3)
    spoil(state)
    dcp.load(state, storage_reader=HFDualReader(saved / "both"), planner=on_instance)
    assert tensor_difference(state["model"], blank()["model"]) is None
    dcp.load(state, storage_reader=WithoutEmbed(saved / "both"))
    wanted = {**model_of(3), "embed": blank()["model"]["embed"]}
    assert tensor_difference(state["model"], wanted) is None


def test_chained_url_and_storage_options_are_passed_on(saved: Path, tmp_path: Path) -> None:
    state = blank()
    url = f"simplecache::file://{saved / 'both'}"
    options = {"simplecache": {"cache_storage": str(tmp_path / "cache")}}
    dcp.load(state, storage_reader=HFDualReader(url, storage_options=options))
    assert_is_of_step(state, 3)


def test_local_paths_do_not_go_through_fsspec(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(FsspecFiles, "__init__", refuse)
    for path in (saved / "both", f"file://{saved}/both", f"local://{saved}/both"):
        state = blank()
        dcp.load(state, storage_reader=HFDualReader(path))
        assert_is_of_step(state, 3)


def strange_tensors() -> dict[str, Any]:
    """Tensors whose archives are not those of a plain row-major tensor."""
    return {
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "channels_last": torch.arange(48.0)
        .reshape(2, 2, 3, 4)
        .to(memory_format=torch.channels_last),
        "part": torch.arange(100)[40:70],
        "column": torch.arange(100.0).reshape(10, 10)[:, 3],
        "parameter": torch.nn.Parameter(torch.arange(5.0)),
        "needs_grad": torch.arange(5.0).requires_grad_(),
        "conjugated": torch.randn(4, dtype=torch.complex64).conj(),
        "negated": torch.randn(4, dtype=torch.complex64).conj().imag,
        "float8": torch.arange(9.0).to(torch.float8_e4m3fn),
        "uint16": torch.arange(9).to(torch.uint16),
        "bool": torch.arange(9) % 2 == 0,
        "complex": torch.randn(3, dtype=torch.complex128),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "large": torch.arange(3_000_000),
    }


@pytest.mark.parametrize("writer", ["stock", "ours"])
def test_every_kind_of_archive_is_read(writer: str, tmp_path: Path) -> None:
    wanted = strange_tensors()
    if writer == "stock":
        dcp.save(wanted, checkpoint_id=tmp_path / "x")
    else:
        dcp.save(wanted, storage_writer=HFDualWriter(tmp_path / "x", export=None))
    found = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in wanted.items()}
    dcp.load(found, storage_reader=HFDualReader(tmp_path / "x"))
    plain = {name: value.detach().resolve_conj().resolve_neg() for name, value in wanted.items()}
    assert tensor_difference(found, plain) is None


@pytest.mark.parametrize("verify", [False, True], ids=["trusting", "verifying"])
def test_archives_that_only_look_alike_are_told_apart(tmp_path: Path, verify: bool) -> None:  # noqa: FBT001
    # Of equal size, dtype and shape, but one in rows and one in columns.
    wanted = {
        f"w{i}": torch.arange(i, i + 64.0).reshape(8, 8).t() if i % 3 else torch.eye(8) + i
        for i in range(20)
    }
    dcp.save(wanted, storage_writer=HFDualWriter(tmp_path / "ours", export=None))
    dcp.save(wanted, checkpoint_id=tmp_path / "stock")
    for path in ("ours", "stock"):
        found = {name: torch.zeros(8, 8) for name in wanted}
        is_verified = verify and path == "ours"
        dcp.load(found, storage_reader=HFDualReader(tmp_path / path, verify=is_verified))
        assert tensor_difference(found, wanted) is None


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 4), (2, 2), (0, 4)])
def test_part_of_a_strange_tensor_is_read(start: int, stop: int, tmp_path: Path) -> None:
    whole = torch.arange(20.0).reshape(5, 4).t()
    conjugated = torch.randn(4, 5, dtype=torch.complex64).conj()
    dcp.save({"w": whole, "c": conjugated}, checkpoint_id=tmp_path / "x")
    for name, value in (("w", whole), ("c", conjugated)):
        rows = torch.zeros(stop - start, 5, dtype=value.dtype)
        planner = RowsPlanner(name, rows, start)
        dcp.load(
            {name: torch.zeros(4, 5, dtype=value.dtype)},
            storage_reader=HFDualReader(tmp_path / "x"),
            planner=planner,
        )
        assert torch.equal(rows, value[start:stop].resolve_conj())


class RowsPlanner(DefaultLoadPlanner):
    """Loads some rows of one tensor."""

    def __init__(self, name: str, rows: torch.Tensor, start: int) -> None:
        super().__init__()
        self.name, self.rows, self.start = name, rows, start

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        items = [
            replace(
                item,
                storage_offsets=torch.Size((self.start, 0)),
                dest_offsets=torch.Size((0, 0)),
                lengths=self.rows.shape,
            )
            for item in plan.items
        ]
        return replace(plan, items=items)

    def lookup_tensor(self, index: Any) -> torch.Tensor:  # noqa: ARG002 - torch's
        return self.rows


def test_rank_metadata_is_read_where_ranks_saved_without_collectives(tmp_path: Path) -> None:
    state = {"w": torch.arange(4.0), "n": 5}
    dcp.save(state, checkpoint_id=tmp_path / "x", use_collectives=False)
    assert not (tmp_path / "x" / ".metadata").exists()
    found = {"w": torch.zeros(4), "n": 0}
    dcp.load(found, storage_reader=HFDualReader(tmp_path / "x"))
    assert (found["n"], found["w"].tolist()) == (5, [0.0, 1.0, 2.0, 3.0])  # type: ignore[attr-defined]


def test_tied_tensors_are_filled_from_the_one_that_is_stored(tmp_path: Path) -> None:
    embed = torch.arange(12.0).reshape(4, 3)
    model = {"embed": embed, "head": embed, "b": torch.ones(2)}
    dcp.save({"model": model}, storage_writer=HFDualWriter(tmp_path / "x"))
    memory = torch.zeros(4, 3)
    for head in (memory, torch.zeros(4, 3)):
        found = {"model": {"embed": memory.zero_(), "head": head, "b": torch.zeros(2)}}
        dcp.load(found, storage_reader=HFDualReader(tmp_path / "x", source="hf"))
        assert tensor_difference(found["model"], model) is None
    # Of a directory without a manifest only the memory, or a spec, tells.
    apart = {"embed": torch.zeros(4, 3), "head": torch.zeros(4, 3), "b": torch.zeros(2)}
    error = refusal(apart, HFDualReader(tmp_path / "x" / "hf"))
    assert "1 missing: head" in str(error)
    alias = LoadSpec("head", "head", (4, 3), alias_of="embed")
    dcp.load(apart, storage_reader=HFDualReader(tmp_path / "x" / "hf", specs=[alias]))
    assert tensor_difference(apart, model) is None
    shared = {"embed": memory.zero_(), "head": memory, "b": torch.zeros(2)}
    dcp.load(shared, storage_reader=HFDualReader(tmp_path / "x" / "hf"))
    assert tensor_difference(shared, model) is None


def test_tied_tensors_under_other_names_are_found_too(tmp_path: Path) -> None:
    embed = torch.arange(12.0).reshape(4, 3)
    specs = [LoadSpec("embed", "hub.embed", (4, 3)), LoadSpec("head", "hub.head", (4, 3))]
    writer = HFDualWriter(tmp_path / "x", export=HFExport(specs=specs))
    dcp.save({"model": {"embed": embed, "head": embed}}, storage_writer=writer)
    apart = {"model": {"embed": torch.zeros(4, 3), "head": torch.zeros(4, 3)}}
    dcp.load(apart, storage_reader=HFDualReader(tmp_path / "x", source="hf", specs=specs))
    assert tensor_difference(apart["model"], {"embed": embed, "head": embed}) is None


@pytest.mark.parametrize("source", ["dcp", "hf"])
def test_tensor_that_its_spec_leaves_out_stays_as_it_is(tmp_path: Path, source: Any) -> None:
    specs = [LoadSpec("cache", global_shape=(3,), pieces=())]
    model = {"cache": torch.ones(3), "w": torch.arange(4.0)}
    writer = HFDualWriter(tmp_path / "x", export=HFExport(specs=specs))
    dcp.save({"model": model}, storage_writer=writer)
    found = {"model": {"cache": torch.zeros(3), "w": torch.zeros(4)}}
    dcp.load(found, storage_reader=HFDualReader(tmp_path / "x", source=source, specs=specs))
    # The DCP half holds it, the export does not.
    expected = model if source == "dcp" else {**model, "cache": torch.zeros(3)}
    assert tensor_difference(found["model"], expected) is None


def test_what_no_key_holds_is_zero_where_another_element_is_held_twice(tmp_path: Path) -> None:
    pieces = [Piece("a", (4,), ((4, 1, 1),)), Piece("b", (4,), ((4, 1, 1),))]
    specs = [LoadSpec("w", global_shape=(6,), pieces=pieces)]
    writer = HFDualWriter(tmp_path / "x", export=HFExport(specs=specs))
    dcp.save({"model": {"w": torch.arange(1.0, 7.0)}}, storage_writer=writer)
    found = {"model": {"w": torch.full((6,), 9.0)}}
    load_hf_directory(found, tmp_path / "x", specs=specs)
    assert found["model"]["w"].tolist() == [1.0, 2.0, 3.0, 4.0, 0.0, 0.0]


def fused_specs() -> list[LoadSpec]:
    return [
        LoadSpec("qkv", ("q", "k", "v"), (10, 6), fused_sizes=(4, 2, 2), origin_shape=(8, 6)),
        LoadSpec("norm", "final.norm", (5,)),
    ]


def test_specs_map_names_fuse_parts_and_fill_padding_with_zeros(tmp_path: Path) -> None:
    model = {"qkv": torch.arange(1.0, 61.0).reshape(10, 6), "norm": torch.ones(5)}
    export = HFExport(specs=fused_specs())
    dcp.save({"model": model}, storage_writer=HFDualWriter(tmp_path / "x", export=export))
    found = {"qkv": torch.full((10, 6), -1.0), "norm": torch.zeros(5)}
    reader = HFDualReader(tmp_path / "x", source="hf", specs=fused_specs(), verify=True)
    dcp.load({"model": found}, storage_reader=reader)
    wanted = model | {"qkv": model["qkv"].clone()}
    wanted["qkv"][8:] = 0
    assert tensor_difference(found, wanted) is None


def test_shards_made_by_hand_are_loaded_from_both_halves(tmp_path: Path) -> None:
    whole = torch.arange(48.0).reshape(8, 6)
    dcp.save({"model": {"w": whole}}, storage_writer=HFDualWriter(tmp_path / "x"))
    for index, source in itertools.product(range(2), ("dcp", "hf")):
        # Gate and up, each cut in two.
        specs = [LoadSpec("w", "w", (8, 6), shards=(ShardSpec(0, index, 2, interleave=2),))]
        model = {"w": torch.zeros(4, 6)}
        reader = HFDualReader(tmp_path / "x", source=source, specs=specs)  # type: ignore[arg-type]
        error = refusal({"model": dict(model)}, reader)
        assert "shape [4, 6], stored as [8, 6]" in str(error)
        dcp.load({"model": model}, storage_reader=reader, planner=HFLoadPlanner(specs))
        first, second = 2 * index, 4 + 2 * index
        assert torch.equal(
            model["w"], torch.cat((whole[first : first + 2], whole[second : second + 2]))
        )


def test_objects_keep_their_types(tmp_path: Path) -> None:
    values = {
        "text": "é",
        "list": [1, 2.5, None, True],
        "tuple": (1, (2,)),
        "bytes": b"\0\1",
        "io": io.BytesIO(b"abc"),
        "nested": {"tensors": [torch.arange(3)]},
        "large": list(range(100_000)),
    }
    dcp.save({"v": values}, storage_writer=HFDualWriter(tmp_path / "x", export=None))
    found: dict[str, Any] = {"v": dict.fromkeys(values) | {"nested": {"tensors": [torch.zeros(3)]}}}
    del values["io"]
    found["v"].pop("io")
    dcp.load(found, storage_reader=HFDualReader(tmp_path / "x"))
    assert torch.equal(found["v"].pop("nested")["tensors"][0], values.pop("nested")["tensors"][0])  # type: ignore[index]
    assert found["v"] == values


def test_names_of_torch_before_2_4_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"model": {"w": torch.ones(2)}, "groups": [{"lr": 0.5, "betas": (0.1, 0.2)}]}
    monkeypatch.setattr(_version, "_derived_version", "2_3")
    dcp.save(state, checkpoint_id=tmp_path / "x")
    monkeypatch.setattr(_version, "_derived_version", None)
    names = HFDualReader(tmp_path / "x").read_metadata().state_dict_metadata
    assert "groups" in names
    found: dict[str, Any] = {"model": {"w": torch.zeros(2)}, "groups": [{"lr": 0, "betas": 0}]}
    dcp.load(found, storage_reader=HFDualReader(tmp_path / "x"))
    assert found["groups"] == state["groups"]
    assert torch.equal(found["model"]["w"], torch.ones(2))
    found["model"]["more"] = torch.zeros(1)
    with pytest.raises(CheckpointException, match=r"model\.more"):
        dcp.load(found, storage_reader=HFDualReader(tmp_path / "x"))


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning")
@pytest.mark.parametrize("source", ["dcp", "hf"])
def test_state_dict_is_made_from_what_is_there(saved: Path, source: Any) -> None:
    reader = HFDualReader(saved / "both", source=source)
    found = _load_state_dict_from_keys(storage_reader=reader)
    if source == "dcp":
        assert_is_of_step(found, 3)
    else:
        assert tensor_difference(found, model_of(3)) is None


def test_reader_tells_what_readers_of_torch_tell(saved: Path) -> None:
    reader, stock = HFDualReader(saved / "stock"), dcp.FileSystemReader(saved / "stock")
    assert (reader.storage_data, stock.storage_data) == ({}, {})
    first = reader.load_id
    for one in (reader, stock):
        dcp.load(blank(), storage_reader=one)
        assert one.read_metadata().storage_meta.load_id == one.load_id  # type: ignore[union-attr]
    assert reader.storage_data == stock.storage_data
    assert reader.load_id == first
    reader.reset()
    assert reader.storage_data == {}
    assert reader.load_id != first


@pytest.mark.parametrize(
    ("place", "is_readable"),
    [
        ("a/b", True),
        ("/a/b", True),
        ("file:///a", True),
        ("memory://a", True),
        ("simplecache::memory://a", True),
        ("nonsense://a", False),
        ("simplecache::nonsense://a", False),
        ("", False),
        ("a\0b", False),
        (b"a", False),
        (None, False),
        (3, False),
    ],
    ids=repr,
)
def test_checkpoint_id_is_valid_if_a_reader_can_be_made_of_it(
    place: Any,
    is_readable: bool,  # noqa: FBT001
) -> None:
    assert HFDualReader.validate_checkpoint_id(place) is is_readable


def test_group_without_an_exchange_is_refused() -> None:
    group: Any = object()
    with pytest.raises(ConfigError, match="exchange=True"):
        HFDualReader("x", process_group=group)


def test_stateful_objects_are_loaded_from_either_half(tmp_path: Path) -> None:
    class Model:
        def __init__(self, value: float) -> None:
            self.weights = {"w": torch.full((3,), value)}

        def state_dict(self) -> dict[str, Any]:
            return self.weights

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.weights = {name: value * 2 for name, value in state.items()}

    dcp.save({"model": Model(3.0)}, storage_writer=HFDualWriter(tmp_path / "x"))
    for source in ("dcp", "hf"):
        target = Model(0.0)
        reader = HFDualReader(tmp_path / "x", source=source)  # type: ignore[arg-type]
        dcp.load({"model": target}, storage_reader=reader)
        assert target.weights["w"].tolist() == [6.0] * 3


def test_writer_tells_the_save_id_that_the_metadata_has(tmp_path: Path) -> None:
    writer = HFDualWriter(tmp_path / "1")
    ids = []
    for step in ("1", "2"):
        state = {"model": {"w": torch.ones(2)}}
        dcp.save(state, storage_writer=writer, checkpoint_id=tmp_path / step)
        ids.append(writer.save_id)
        metadata = HFDualReader(tmp_path / step).read_metadata()
        assert metadata.storage_meta is not None
        assert metadata.storage_meta.save_id == writer.save_id
    assert len(set(ids)) == 2
    assert not HFDualWriter.validate_checkpoint_id(None)  # type: ignore[arg-type]
    assert HFDualWriter.validate_checkpoint_id("s3://bucket/x")
    assert not HFDualWriter.validate_checkpoint_id("nowhere://bucket/x")


def test_explanation_and_warm_up_see_the_states_of_objects(tmp_path: Path) -> None:
    state = {"model": torch.nn.Linear(3, 2)}
    writer = HFDualWriter(tmp_path / "x")
    assert writer.warm_up(state) == 8 * 4
    assert {row.fqn for row in writer.explain(state).rows} == {"model.weight", "model.bias"}
