"""Quantised directories of the hub, loaded into shards, against what transformers loads."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

from dcp_hf_writer.integrations.transformers import specs_from_transformers
from dcp_hf_writer.reader import HFDualReader
from hub_quantized import (
    deepseek_config,
    dequantized_by_transformers,
    gpt_oss_config,
    write_fp8,
    write_mxfp4,
)
from ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

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


def build(name: str) -> PreTrainedModel:
    config = gpt_oss_config() if name == "gpt_oss" else deepseek_config()
    kind = GptOssForCausalLM if name == "gpt_oss" else DeepseekV3ForCausalLM
    model = kind(config)
    # Buffers keep their dtype, as when transformers loads.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
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


def load_and_compare(rank: int, world_size: int, root: Path) -> list[str]:
    """Load each directory sharded along each dimension; say what differs, and where."""
    wrong = []
    for name, dim in itertools.product(NAMES, DIMS):
        model = shard(build(name), dim)
        state_dict = model.state_dict()
        for value in state_dict.values():
            value.zero_()
        reader = HFDualReader(root / name, specs=specs_from_transformers(model), source="hf")
        dcp.load({"model": state_dict}, storage_reader=reader)
        expected = torch.load(root / f"{name}.pt")
        assert state_dict.keys() == expected.keys()
        wrong += [
            f"{name}, dim {dim}: {fqn}"
            for fqn, value in state_dict.items()
            if not same(value, expected[fqn])
        ]
    return wrong


def same(value: torch.Tensor, expected: torch.Tensor) -> bool:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.dtype == expected.dtype and torch.equal(whole, expected)


def test_shards_of_a_quantised_directory_equal_what_transformers_loads(hub: Path) -> None:
    assert run_ranks(load_and_compare, 2, hub) == [[], []]
