"""What four ranks saved under FSDP2 x TP, any ranks load in any sharding, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport
from support.ranks import run_ranks
from support.sharded_models import build_model, shard
from support.stock_readers import digests

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from support.stock_readers import Digests

NAMES = ("llama", "llama_tied")
# Directory -> writer options; `None` is torch's own writer.
SAVED: dict[str, dict[str, Any] | None] = {
    "both": {},
    "once": {"weights": "once"},
    "stock": None,
}

# Directory, source, whether digests are compared, dimensions along which the model is then cut.
LOADED = (
    ("both", "dcp", False, (0, 1)),
    ("once", "dcp", True, (1,)),
    ("stock", "auto", False, (1,)),
    ("both", "hf", True, (0, 1)),
    ("once", "hf", False, (1,)),
)


def with_optimizer(model: PreTrainedModel) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    """Take a step by gradients that differ from element to element, without a forward pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5 + 0.1
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def nested(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optim": optimizer_state, "step": 7}


def save_all(rank: int, world_size: int, root: Path) -> dict[str, Digests]:
    expected: dict[str, Digests] = {}
    for name in NAMES:
        model, optimizer = with_optimizer(shard(build_model(name), "fsdp2_tp2"))
        state = nested(model, optimizer)
        expected[name] = digests(state)
        for saved, options in SAVED.items():
            path = root / f"{name}-{saved}"
            if options is None:
                dcp.save(state, checkpoint_id=path)
            else:
                export = HFExport(assets=(model.config,))
                dcp.save(state, storage_writer=HFDualWriter(path, export=export, **options))
    return expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Digests]]:
    root = tmp_path_factory.mktemp("trained")
    expected = run_ranks(save_all, 4, root)
    assert all(one == expected[0] for one in expected)
    return root, expected[0]


def resharded(name: str, dim: int, world_size: int) -> PreTrainedModel:
    """Make a model with other weights, cut along a dimension where that goes evenly."""

    def placement(parameter: torch.nn.Parameter) -> Shard | None:
        at = min(dim, parameter.ndim - 1)
        return Shard(at) if parameter.shape[at] % world_size == 0 else None

    mesh = init_device_mesh("cpu", (world_size,))
    model = build_model(name, seed=99)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    return model


def load_all(rank: int, world_size: int, root: Path) -> list[tuple[str, Digests]]:
    """Load every model from every source, cut along either dimension; digests of each."""
    found = []
    for name in NAMES:
        for saved, source, verify, dims in LOADED:
            for dim in dims:
                model = resharded(name, dim, world_size)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
                state = nested(model, optimizer)
                state["step"] = 0
                if source == "hf":
                    state = {"model": state["model"]}
                reader = HFDualReader(root / f"{name}-{saved}", source=source, verify=verify)  # type: ignore[arg-type]
                dcp.load(state, storage_reader=reader)
                if source != "hf":
                    set_state_dict(
                        model,
                        optimizer,
                        model_state_dict=state["model"],
                        optim_state_dict=state["optim"],
                    )
                    state = nested(model, optimizer) | {"step": state["step"]}
                found.append((f"{name} {saved} {source} dim {dim} {verify}", digests(state)))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4], ids=lambda count: f"loaded-by-{count}")
def test_every_source_gives_what_was_saved_on_any_number_of_ranks(
    trained: tuple[Path, dict[str, Digests]], world_size: int
) -> None:
    root, expected = trained
    for found in run_ranks(load_all, world_size, root):
        assert len(found) == len(NAMES) * sum(len(dims) for *_, dims in LOADED)
        for what, have in found:
            wanted = expected[what.partition(" ")[0]]
            if " hf " in what:
                wanted = {fqn: one for fqn, one in wanted.items() if fqn.startswith("model.")}
            wrong = {fqn: one for fqn, one in wanted.items() if have.get(fqn) != one}
            assert (what, wrong) == (what, {})
            assert have.keys() == wanted.keys()


def test_optimizer_state_is_worth_comparing(trained: tuple[Path, dict[str, Digests]]) -> None:
    _, expected = trained
    moments = [
        text
        for fqn, (_, _, text) in expected["llama"].items()
        if fqn.endswith((".exp_avg", ".exp_avg_sq"))
    ]
    assert len(moments) == 42
    assert len(set(moments)) == 42
