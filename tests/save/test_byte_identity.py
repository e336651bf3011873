"""The export of a sharded model equals, to the byte, what `save_pretrained` writes unsharded."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM

from dcp_hf_writer import HFDualWriter, HFExport
from support.compare import export_difference, tensor_difference
from support.rank_process import Raised
from support.ranks import run_ranks
from support.sharded_models import MODELS, SHARDINGS, build_model, shard
from support.stock_readers import load_dcp

if TYPE_CHECKING:
    from pathlib import Path

# One file; several; and several where many a tensor is larger than a file may be.
SIZES: dict[str, int | str] = {"one-file": "5GB", "bytes": 20_000, "text": "5KB"}

Failures = dict[tuple[str, str], Raised]


def save_all_models(rank: int, world_size: int, sharding: str, root: Path) -> Failures:
    """Save each model in each size; return what failed, so that one failure hides no other."""
    failures: Failures = {}
    for name in MODELS:
        model = shard(build_model(name), sharding)
        state = {"model": model.state_dict(), "step": 3}
        for size, max_shard_size in SIZES.items():
            export = HFExport(max_shard_size=max_shard_size, assets=(model.config,))
            writer = HFDualWriter(root / name / size, export=export)
            try:
                dcp.async_save(state, storage_writer=writer).result()
            except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
                failures[name, size] = Raised.of(error)
    return failures


@pytest.fixture(scope="module", params=list(SHARDINGS))
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Failures]:
    sharding: str = request.param
    root = tmp_path_factory.mktemp(sharding)
    failures = run_ranks(save_all_models, SHARDINGS[sharding], sharding, root)
    return root, dict(itertools.chain.from_iterable(one.items() for one in failures))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("save_pretrained")
    for name in MODELS:
        model = build_model(name)
        for size, max_shard_size in SIZES.items():
            model.save_pretrained(root / name / size, max_shard_size=max_shard_size)
    return root


def checkpoint(saved: tuple[Path, Failures], name: str, size: str) -> Path:
    root, failures = saved
    if (name, size) in failures:
        failures[name, size].reraise()
    return root / name / size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_export_equals_save_pretrained_when_model_is_sharded(
    saved: tuple[Path, Failures], references: Path, name: str, size: str
) -> None:
    directory = checkpoint(saved, name, size)
    assert export_difference(directory / "hf", references / name / size) is None


@pytest.mark.parametrize("name", MODELS)
def test_stock_load_gives_the_unsharded_weights_when_model_is_sharded(
    saved: tuple[Path, Failures], name: str
) -> None:
    directory = checkpoint(saved, name, "one-file")
    expected = build_model(name).state_dict()
    loaded = load_dcp(directory, {"model": expected, "step": 0})
    assert tensor_difference(loaded["model"], expected) is None
    assert loaded["step"] == 3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_gives_equal_logits_when_it_reads_the_export(
    saved: tuple[Path, Failures], references: Path, name: str, size: str
) -> None:
    directory = checkpoint(saved, name, size)
    loaded = AutoModelForCausalLM.from_pretrained(directory / "hf").eval()
    built = build_model(name)
    assert type(loaded) is type(built)
    assert loaded.dtype is built.dtype
    assert tensor_difference(loaded.state_dict(), built.state_dict()) is None
    # Not the model that was built: buffers that are not saved may differ from those of a load.
    original = AutoModelForCausalLM.from_pretrained(references / name / size).eval()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = original(input_ids=tokens).logits
        found = loaded(input_ids=tokens).logits
    assert tensor_difference({"logits": found}, {"logits": expected}) is None
