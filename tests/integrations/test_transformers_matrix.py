"""Models of transformers, held by ranks in every way, export what `save_pretrained` writes of one.

The default run takes a diagonal of models, parallelisms, origins and file sizes; the slow one all.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.errors import SpecError
from dcp_hf_writer.mapping.load_spec import LoadSpec, Piece
from dcp_hf_writer.torch_seam.planners import HFSavePlanner
from support.compare import export_difference, tensor_difference
from support.hf_models import MODELS, build
from support.parallel_models import (
    HALF,
    PARALLELISMS,
    WORLD_SIZE,
    can_distribute,
    fully_sharded,
    is_applicable,
    is_distributed,
    is_fused,
    parallel_model,
    unsharded,
)
from support.rank_process import Raised
from support.ranks import run_ranks
from support.stock_readers import Digests, digests, load_dcp

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

CAN_DISTRIBUTE = can_distribute()
needs_distributed = pytest.mark.skipif(
    not CAN_DISTRIBUTE,
    reason="transformers shards models so on CPUs, from 5.21 on, and where accelerate is",
)

# The first test that asks for an export waits for those of all of them.
pytestmark = pytest.mark.timeout(300)

ORIGINS = ("built", "loaded")
# One file; several; and many, where many a tensor is larger than a file may be.
SIZES: Mapping[str, int | str] = {"one-file": "5GB", "several": 20_000, "many": "5KB"}

# The other qwen3_vl_moe shows nothing more.
NAMES = tuple(name for name in MODELS if name != "qwen3_vl_moe")

TURNED = "qwen3_vl_moe_wide"
TURNED_IN = {"fsdp": "loaded", "tp": "built", "fsdp_tp": "built", "ep_fsdp": "loaded"}
if not CAN_DISTRIBUTE:
    TURNED_IN = {"fsdp": "loaded", "fsdp_inner": "built"}


# Trained too, so that optimizer state is saved with them.
TRAINED = {"qwen3_moe": "tp", "qwen2_moe": "fsdp_tp", "olmoe": "ep_fsdp"}
if not CAN_DISTRIBUTE:
    TRAINED = {"qwen3_moe": "fsdp", "qwen2_moe": "hsdp", "olmoe": "fsdp"}


class Case(NamedTuple):
    name: str
    parallelism: str
    origin: str
    size: str

    @property
    def label(self) -> str:
        return "-".join(self)

    @property
    def is_possible(self) -> bool:
        return CAN_DISTRIBUTE or not is_distributed(self.name, self.parallelism)

    @property
    def is_fused(self) -> bool:
        return is_fused(self.name, self.parallelism)


def all_cases() -> Iterator[Case]:
    for parallelism, name in itertools.product(PARALLELISMS, NAMES):
        if is_applicable(name, parallelism):
            for origin, size in itertools.product(ORIGINS, SIZES):
                yield Case(name, parallelism, origin, size)


def is_on_diagonal(case: Case) -> bool:
    i, j = NAMES.index(case.name), PARALLELISMS.index(case.parallelism)
    turn = i // 2 + j // 2
    chosen = (ORIGINS[turn % len(ORIGINS)], list(SIZES)[turn % len(SIZES)])
    return (i + j) % 2 == 0 and chosen == (case.origin, case.size)


CASES = tuple(all_cases())
DIAGONAL = tuple(case for case in CASES if is_on_diagonal(case))
SLOW = (pytest.mark.slow, pytest.mark.timeout(600))


def parameter(case: Case) -> Any:
    marks = [] if case in DIAGONAL else [*SLOW]
    if not case.is_possible:
        marks.append(needs_distributed)
    return pytest.param(case, id=case.label, marks=marks)


PARAMS = [parameter(case) for case in CASES]
every_case = pytest.mark.parametrize("case", PARAMS)


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "a", "b"])}
    made = Tokenizer(models.WordLevel(words, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64)
    tokenizer.chat_template = "{{ messages[0].content }}"
    return tokenizer


class Saved(NamedTuple):
    """What came of the saves of one rank."""

    failures: dict[Case, Raised]
    refusals: dict[Case, Raised]
    """Of the first try, without a planner, where a rank holds several blocks of a tensor."""


def save_cases(rank: int, world_size: int, cases: Iterable[Case], root: Path) -> Saved:
    """Save all cases, so that one failure hides no other."""
    saved = Saved({}, {})
    tokenizer = tiny_tokenizer()
    for (name, parallelism, origin), group in itertools.groupby(cases, lambda case: case[:3]):
        same = list(group)
        try:
            checkpoint = root / "checkpoints" / name if origin == "loaded" else None
            model = parallel_model(name, parallelism, saved=checkpoint)
        except Exception as error:  # noqa: BLE001
            saved.failures.update(dict.fromkeys(same, Raised.of(error)))
            continue
        for case in same:
            save_case(case, model, tokenizer, root, saved)
    return saved


def save_case(case: Case, model: PreTrainedModel, tokenizer: Any, root: Path, saved: Saved) -> None:
    path, size = root / "exports" / case.label, SIZES[case.size]
    if case.is_fused:
        try:
            save_model(path, model, tokenizer, max_shard_size=size)
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            saved.refusals[case] = Raised.of(error)
    planner = HFSavePlanner() if case.is_fused else None
    try:
        save_model(path, model, tokenizer, planner=planner, max_shard_size=size)
    except BaseException as error:  # noqa: BLE001
        saved.failures[case] = Raised.of(error)


def save_model(
    path: Path, model: PreTrainedModel, tokenizer: Any, *, planner: Any = None, **options: Any
) -> None:
    """Save a model as a user does."""
    dcp.async_save(
        {"model": model.state_dict()},
        storage_writer=HFDualWriter(
            path, export=HFExport.from_transformers(model, tokenizer, **options)
        ),
        planner=planner,
    ).result()


class Exports:
    """What ranks export, a group of cases at once when one is asked for, and what it should be."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.saved: dict[Case, Raised | None] = {}
        self.refusals: dict[Case, Raised] = {}

    def export_of(self, case: Case) -> Path:
        """Return the checkpoint of a case.

        Raises:
            BaseException: What the save raised.
        """
        if case not in self.saved:
            rest = [one for one in CASES if one.parallelism == case.parallelism]
            self._save(DIAGONAL if case in DIAGONAL else rest)
        raised = self.saved[case]
        if raised is not None:
            raised.reraise()
        return self.root / "exports" / case.label

    def _save(self, cases: Iterable[Case]) -> None:
        cases = [case for case in cases if case.is_possible and case not in self.saved]
        for case in cases:
            self.model_of(case.name, case.origin)
        try:
            outcomes = run_ranks(save_cases, WORLD_SIZE, cases, self.root, timeout_s=540)
        except BaseException as error:
            self.saved.update(dict.fromkeys(cases, Raised.of(error)))
            raise
        self.saved.update(dict.fromkeys(cases))
        for outcome in outcomes:
            self.saved.update(outcome.failures)
            self.refusals.update(outcome.refusals)

    @functools.cache  # noqa: B019 - lives as long as the module's tests
    def model_of(self, name: str, origin: str) -> PreTrainedModel:
        """Return the model in one piece."""
        if origin == "built":
            return unsharded(name)
        return unsharded(name, saved=self._checkpoint_of(name))

    @functools.cache  # noqa: B019
    def _checkpoint_of(self, name: str) -> Path:
        path = self.root / "checkpoints" / name
        self.model_of(name, "built").save_pretrained(path)
        return path

    @functools.cache  # noqa: B019
    def reference_of(self, name: str, origin: str, size: str) -> Path:
        """Return what `save_pretrained` writes."""
        path = self.root / "references" / name / origin / size
        self.model_of(name, origin).save_pretrained(path, max_shard_size=SIZES[size])
        tiny_tokenizer().save_pretrained(path)
        return path


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("matrix"))


def other_files(directory: Path) -> dict[str, bytes]:
    """Return the files of a model directory that are no weights, by name."""
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.suffix != ".safetensors"
    }


def logits_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    tokens = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        return {"logits": model(input_ids=tokens).logits}


def reload_difference(directory: Path, expected: PreTrainedModel) -> str | None:
    """Say how a model directory, as `from_pretrained` reads it, differs from a model."""
    loaded, info = type(expected).from_pretrained(directory, output_loading_info=True)
    if wrong := {what: keys for what, keys in info.items() if keys}:
        return f"{directory}: {wrong}"
    return tensor_difference(loaded.state_dict(), expected.state_dict()) or tensor_difference(
        logits_of(loaded.eval()), logits_of(expected)
    )


@every_case
def test_export_equals_save_pretrained_when_model_is_held_by_ranks(
    exports: Exports, case: Case
) -> None:
    export = exports.export_of(case) / "hf"
    reference = exports.reference_of(case.name, case.origin, case.size)
    assert export_difference(export, reference) is None
    assert other_files(export) == other_files(reference)


@every_case
def test_from_pretrained_gives_equal_logits_when_it_reads_the_export(
    exports: Exports, case: Case
) -> None:
    export = exports.export_of(case) / "hf"
    assert reload_difference(export, exports.model_of(case.name, case.origin)) is None


@every_case
def test_stock_load_gives_the_weights_when_model_is_held_by_ranks(
    exports: Exports, case: Case
) -> None:
    expected = exports.model_of(case.name, case.origin).state_dict()
    loaded = load_dcp(exports.export_of(case), {"model": expected})
    assert tensor_difference(loaded["model"], expected) is None


@pytest.mark.parametrize("case", [p for p in PARAMS if p.values[0].is_fused])
def test_save_names_the_planner_when_ranks_hold_several_blocks(
    exports: Exports, case: Case
) -> None:
    exports.export_of(case)
    assert "HFSavePlanner" in str(exports.refusals[case].error)


def test_diagonal_has_each_model_twice_and_each_parallelism_in_every_way() -> None:
    for name in NAMES:
        assert len({case.parallelism for case in DIAGONAL if case.name == name}) >= 2
    for parallelism in PARALLELISMS:
        chosen = [case for case in DIAGONAL if case.parallelism == parallelism]
        assert len({case.name for case in chosen}) >= 4
        assert {case.origin for case in chosen} == set(ORIGINS)
        assert {case.size for case in chosen} == set(SIZES)


def save_as_hub(model: PreTrainedModel, path: Path, size: int | str) -> None:
    """Save a qwen3_vl_moe as `save_pretrained` does, but with the experts as the hub has them."""
    from transformers.core_model_loading import revert_weight_conversion

    saved = revert_weight_conversion(model, model.state_dict())
    turned = {
        key: value.transpose(1, 2).contiguous() if ".experts." in key else value
        for key, value in saved.items()
    }
    model.save_pretrained(path, state_dict=turned, max_shard_size=size, save_original_format=False)


def hub_specs(model: PreTrainedModel) -> list[LoadSpec]:
    """Return specs, by hand, that do as `save_as_hub`."""
    specs = []
    for name, value in model.state_dict().items():
        if ".experts." in name:
            count, rows, columns = value.shape
            loops = (
                (count, rows * columns, rows * columns),
                (columns, rows, 1),
                (rows, 1, columns),
            )
            piece = Piece(name, (count, columns, rows), loops)
            specs.append(LoadSpec(name, name, tuple(value.shape), pieces=[piece]))
    return specs


def save_turned(root: Path) -> dict[str, str]:
    """Save as the hub has it, with specs of transformers and by hand; what `base` finds."""
    base, found = root / "hub" / "built" / "one-file", {}
    for parallelism, origin in TURNED_IN.items():
        model = parallel_model(TURNED, parallelism, saved=base if origin == "loaded" else None)
        try:
            HFExport.from_transformers(model, base=base)
        except SpecError as error:
            found[parallelism] = str(error)
        planner = HFSavePlanner()
        for size, max_shard_size in SIZES.items():
            path = root / parallelism / size
            options = {"base": base, "orientation": "base", "max_shard_size": max_shard_size}
            save_model(path, model, None, planner=planner, **options)
        export = HFExport(specs=hub_specs(model), assets=model)
        writer = HFDualWriter(root / parallelism / "by-hand", export=export)
        state = {"model": model.state_dict()}
        dcp.async_save(state, storage_writer=writer, planner=planner).result()
    return found


def save_trained(root: Path) -> dict[str, Digests]:
    """Save models with the optimizers that trained them; return what was saved."""
    found = {}
    for name, parallelism in TRAINED.items():
        model = parallel_model(name, parallelism, saved=None)
        # Not all parameters are on one mesh, as the fused step wants.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        tokens = torch.arange(3, 15).reshape(2, 6)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optim": optimizer_state}
        export = HFExport.from_transformers(model, max_shard_size=SIZES["several"])
        writer = HFDualWriter(root / "trained" / name, export=export)
        dcp.async_save(state, storage_writer=writer, planner=HFSavePlanner()).result()
        found[name] = digests(state)
    return found


class Others(NamedTuple):
    """What came of saves that are not in the matrix."""

    differences: dict[str, str]
    """What `base` found, by parallelism."""
    trained: dict[str, Digests]
    """What was saved, by model."""


def save_others(rank: int, world_size: int, root: Path) -> Others:
    for name in HALF:
        save_model(root / "half" / name, fully_sharded(build(name)), None, dtype="bfloat16")
    return Others(save_turned(root), save_trained(root))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Others]:
    root = tmp_path_factory.mktemp("others")
    model = unsharded(TURNED)
    for origin in ORIGINS:
        for size, max_shard_size in SIZES.items():
            save_as_hub(model, root / "hub" / origin / size, max_shard_size)
        # The order in which its keys fill the files depends on where a model comes from.
        model = type(model).from_pretrained(root / "hub" / "built" / "one-file")
    return root, run_ranks(save_others, WORLD_SIZE, root)[0]


@pytest.mark.parametrize("parallelism", TURNED_IN)
def test_base_tells_that_it_is_transposed_when_model_is_held_by_ranks(
    others: tuple[Path, Others], parallelism: str
) -> None:
    found = others[1].differences[parallelism]
    assert "transposed in dims 1, 2" in found
    assert "down_proj" in found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parallelism", TURNED_IN)
def test_export_has_the_orientation_of_the_hub_when_base_has_it(
    others: tuple[Path, Others], parallelism: str, size: str
) -> None:
    root, _ = others
    export, hub = root / parallelism / size / "hf", root / "hub" / TURNED_IN[parallelism] / size
    assert export_difference(export, hub) is None
    assert reload_difference(export, unsharded(TURNED)) is None


@pytest.mark.parametrize("parallelism", TURNED_IN)
def test_export_has_the_orientation_of_the_hub_when_a_spec_transposes(
    others: tuple[Path, Others], parallelism: str
) -> None:
    root, _ = others
    export = root / parallelism / "by-hand" / "hf"
    assert export_difference(export, root / "hub" / "built" / "one-file") is None


@pytest.mark.parametrize("parallelism", TURNED_IN)
def test_stock_load_gives_the_runtime_orientation_when_the_export_has_that_of_the_hub(
    others: tuple[Path, Others], parallelism: str
) -> None:
    expected = unsharded(TURNED).state_dict()
    loaded = load_dcp(others[0] / parallelism / "several", {"model": expected})
    assert tensor_difference(loaded["model"], expected) is None


@pytest.mark.parametrize("name", HALF)
def test_export_equals_that_of_a_half_model_when_float32_is_exported_so(
    others: tuple[Path, Others], tmp_path: Path, name: str
) -> None:
    export = others[0] / "half" / name / "hf"
    model = unsharded(name)
    assert len({tensor.dtype for tensor in model.state_dict().values()}) == 1 + HALF[name]
    model.save_pretrained(tmp_path)
    assert export_difference(export, tmp_path) is None
    assert other_files(export) == other_files(tmp_path)


@pytest.mark.parametrize("name", TRAINED)
def test_stock_load_gives_model_and_optimizer_when_they_were_trained(
    others: tuple[Path, Others], name: str
) -> None:
    root, found = others
    expected = found.trained[name]
    moments = [key for key in expected if key.endswith("experts.gate_up_proj.exp_avg")]
    assert moments
    blank = {
        key: torch.full(shape, torch.nan)
        for key, (kind, shape, _) in expected.items()
        if kind != "value"
    }
    dcp.load(blank, checkpoint_id=root / "trained" / name, no_dist=True)
    assert digests(blank) == {key: expected[key] for key in blank}


@pytest.mark.parametrize("name", TRAINED)
def test_export_equals_save_pretrained_when_the_model_was_trained(
    others: tuple[Path, Others], tmp_path: Path, name: str
) -> None:
    model = unsharded(name)
    before = model.state_dict()["lm_head.weight"].clone()
    trained = load_dcp(others[0] / "trained" / name, {"model": model.state_dict()})
    model.load_state_dict(trained["model"])
    assert not torch.equal(model.state_dict()["lm_head.weight"], before)
    model.save_pretrained(tmp_path, max_shard_size=SIZES["several"])
    assert export_difference(others[0] / "trained" / name / "hf", tmp_path) is None
