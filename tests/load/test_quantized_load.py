"""Quantised directories of the hub, loaded into shards, against what transformers loads."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.errors import PlanningError
from dcp_hf_writer.hf_loader import load_hf
from dcp_hf_writer.integrations.transformers import specs_from_transformers
from dcp_hf_writer.reader import HFDualReader
from support.hub_quantized import (
    deepseek_config,
    dequantized_by_transformers,
    gpt_oss_config,
    write_fp8,
    write_mxfp4,
)
from support.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from dcp_hf_writer.tensors.boxes import Box

NAMES = ("deepseek_v3", "gpt_oss")
DIMS = (0, -2, -1)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a quantised one a name, and what transformers makes of each."""
    root = tmp_path_factory.mktemp("hub")
    for name, write in zip(NAMES, (write_fp8, write_mxfp4), strict=True):
        write(root / name)
        torch.save(dequantized_by_transformers(root / name), root / f"{name}.pt")
    return root


def build(name: str, dtypes: Mapping[str, torch.dtype]) -> PreTrainedModel:
    """Make a model whose parameters have the dtypes that transformers loads them in."""
    config = gpt_oss_config() if name == "gpt_oss" else deepseek_config()
    kind = GptOssForCausalLM if name == "gpt_oss" else DeepseekV3ForCausalLM
    model = kind(config)
    # Buffers keep their dtype, as when transformers loads.
    for fqn, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[fqn])
    return model


def shard(model: PreTrainedModel, dim: int) -> PreTrainedModel:
    """Shard matrices and stacks of them along a dimension, counted from the last where negative."""

    def placement(parameter: torch.nn.Parameter) -> Shard | None:
        at = dim % parameter.ndim
        is_even = parameter.ndim > 1 and parameter.shape[at] % 2 == 0
        return Shard(at) if is_even else None

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    return model


def load_by_dcp(model: PreTrainedModel, path: Path) -> None:
    reader = HFDualReader(path, specs=specs_from_transformers(model), source="hf")
    dcp.load({"model": model.state_dict()}, storage_reader=reader)


def load_and_compare(rank: int, world_size: int, root: Path) -> list[str]:
    """Load each directory sharded along each dimension; say what differs, and where."""
    wrong = []
    for name, dim, load in itertools.product(NAMES, DIMS, (load_by_dcp, load_hf)):
        expected = torch.load(root / f"{name}.pt")
        model = shard(build(name, {fqn: one.dtype for fqn, one in expected.items()}), dim)
        for value in model.state_dict().values():
            value.zero_()
        load(model, root / name)
        state_dict = model.state_dict()
        assert state_dict.keys() == expected.keys()
        wrong += [
            f"{name}, dim {dim}, {load.__name__}: {fqn}"
            for fqn, value in state_dict.items()
            if not same(value, expected[fqn])
        ]
    return wrong


def same(value: torch.Tensor, expected: torch.Tensor) -> bool:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.dtype == expected.dtype and torch.equal(whole, expected)


def test_shards_of_a_quantised_directory_equal_what_transformers_loads(hub: Path) -> None:
    assert run_ranks(load_and_compare, 2, hub) == [[], []]


def test_each_code_is_read_once_when_a_tensor_is_loaded_in_parts(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dcp_hf_writer.load import dequantized_reads

    read: dict[str, int] = {}
    inner = dequantized_reads._read_box

    def counted(inputs: Any, directory: Any, key: str, box: Box) -> torch.Tensor:
        read[key] = read.get(key, 0) + box.numel
        return inner(inputs, directory, key, box)

    monkeypatch.setattr(dequantized_reads, "_read_box", counted)
    # Fewer than the values of an expert.
    monkeypatch.setattr(dequantized_reads, "_MAX_ELEMENTS", 5000)
    stored = load_file(hub / "gpt_oss" / "model.safetensors")
    expected = torch.load(hub / "gpt_oss.pt")
    loaded = {key: torch.zeros_like(value) for key, value in expected.items()}
    load_hf(loaded, hub / "gpt_oss")
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    packed = {key: stored[key].numel() for key in stored if key.endswith(("_blocks", "_scales"))}
    assert len(packed) == 4
    assert read == packed


@pytest.fixture
def codes(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return an export of a model that computes with codes and scales itself, and its state."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "a.weight": torch.randn(256, 96, generator=generator).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.rand(2, 1, generator=generator),
        "norm.weight": torch.rand(7, generator=generator),
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    export = HFExport(assets=(config,))
    dcp.save({"model": state}, storage_writer=HFDualWriter(tmp_path / "step", export=export))
    return tmp_path / "step", state


@pytest.mark.parametrize("is_dcp", [True, False])
def test_model_that_holds_scales_itself_gets_its_codes(
    codes: tuple[Path, dict[str, torch.Tensor]], *, is_dcp: bool
) -> None:
    path, state = codes
    loaded = {key: torch.zeros_like(value) for key, value in state.items()}
    if is_dcp:
        dcp.load({"model": loaded}, storage_reader=HFDualReader(path, source="hf"))
    else:
        load_hf(loaded, path)
    assert all(
        torch.equal(value.view(torch.uint8), state[key].view(torch.uint8))
        for key, value in loaded.items()
    )


def test_the_same_directory_gives_values_to_a_model_that_holds_none(
    codes: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, state = codes
    loaded = {"a.weight": torch.zeros(256, 96), "norm.weight": torch.zeros(7)}
    load_hf(loaded, path)
    scales = state["a.weight_scale_inv"].repeat_interleave(128, 0)
    assert torch.equal(loaded["a.weight"], state["a.weight"].float() * scales)
    assert torch.equal(loaded["norm.weight"], state["norm.weight"])


def test_a_method_that_is_not_known_is_named(tmp_path: Path) -> None:
    save_file({"a.qweight": torch.zeros(4, 4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanningError, match="found 'awq'"):
        load_hf({"a.weight": torch.zeros(4, 32)}, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_base_model_is_loaded_from_a_quantised_directory_of_the_whole(name: str, hub: Path) -> None:
    expected = torch.load(hub / f"{name}.pt")
    base = build(name, {fqn: one.dtype for fqn, one in expected.items()}).base_model
    keys = load_hf(base, hub / name, strict=False)
    assert (keys.missing, keys.unexpected) == ((), ("lm_head.weight",))
    for fqn, value in base.state_dict().items():
        assert same(value, expected[f"model.{fqn}"]), fqn
