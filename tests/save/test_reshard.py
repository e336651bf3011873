"""A checkpoint of one number of ranks resumes with torch alone on any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport
from support.ranks import run_ranks
from support.sharded_models import build_model, fsdp
from support.stock_readers import digests, resume_all, train_two_steps

if TYPE_CHECKING:
    from pathlib import Path

    from support.stock_readers import Digests

NAMES = ("llama", "llama_bf16", "llama_tied", "gpt_oss")


def save_trained(rank: int, world_size: int, root: Path) -> dict[str, Digests]:
    """Train each model for two steps and save it with its optimizer; digests of what was saved."""
    expected: dict[str, Digests] = {}
    for name in NAMES:
        model = fsdp(build_model(name), init_device_mesh("cpu", (world_size,)))
        optimizer = train_two_steps(model)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optim": optimizer_state}
        expected[name] = digests(state)
        writer = HFDualWriter(root / name, export=HFExport(assets=(model.config,)))
        dcp.async_save(state, storage_writer=writer).result()
    return expected


@pytest.fixture(scope="module", params=[2, 4], ids=lambda count: f"saved-by-{count}")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Digests]]:
    root = tmp_path_factory.mktemp(f"trained-{request.param}")
    expected = run_ranks(save_trained, request.param, root)
    assert all(one == expected[0] for one in expected)
    return root, expected[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4], ids=lambda count: f"loaded-by-{count}")
def test_stock_load_gives_equal_parameters_and_optimizer_state_when_rank_count_differs(
    trained: tuple[Path, dict[str, Digests]], world_size: int
) -> None:
    root, expected = trained
    for found in run_ranks(resume_all, world_size, NAMES, root):
        wrong = [
            f"{name}: {fqn}"
            for name, digests_of_model in expected.items()
            for fqn, digest in digests_of_model.items()
            if found[name].get(fqn) != digest
        ]
        assert wrong == []
        assert found == expected


def test_optimizer_state_is_worth_comparing(trained: tuple[Path, dict[str, Digests]]) -> None:
    _, expected = trained
    moments = {
        fqn: digest
        for fqn, digest in expected["llama"].items()
        if fqn.endswith((".exp_avg", ".exp_avg_sq"))
    }
    # Two moments for each of 21 parameters, and no two alike: none is still zero.
    assert len(moments) == 42
    assert len({text for _, _, text in moments.values()}) == 42
