"""Values that no checkpoint can hold: the error names the value and the cause."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

from dcp_hf_writer import HFDualReader, HFDualWriter, load_hf
from dcp_hf_writer.errors import CheckpointError, PlanningError, StagingError
from support.own_errors import own_errors
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path


class Stubborn:
    def __reduce__(self) -> Any:
        msg = "not today"
        raise ValueError(msg)


VALUES: dict[str, Any] = {
    "a function": lambda x: x,
    "a lock": threading.Lock(),
    "a generator": (x for x in ()),
    "an object that refuses": Stubborn(),
}
CAUSES = {
    "a function": "lambda",
    "a lock": "lock",
    "a generator": "generator",
    "an object that refuses": "not today",
}


@pytest.mark.parametrize("how", ["save", "async_save"])
@pytest.mark.parametrize("name", VALUES)
def test_value_that_cannot_be_pickled_is_named_with_its_cause(
    name: str, how: str, tmp_path: Path
) -> None:
    state = {"model": {"w": torch.ones(2, 3)}, "extra": {"hook": VALUES[name]}}
    writer = HFDualWriter(tmp_path / "step-1")
    options = {"storage_writer": writer, "no_dist": True}
    with pytest.raises(BaseException, match=r"cannot be (pickled|copied)") as caught:
        dcp.save(state, **options) if how == "save" else dcp.async_save(state, **options).result()
    (error,) = own_errors(caught.value)
    assert isinstance(error, (PlanningError, StagingError))
    assert CAUSES[name] in str(error)
    assert "leave it out of the state dict" in str(error)
    assert error.fqn == "extra.hook"
    assert list(tmp_path.iterdir()) == []


def partial_errors(rank: int, world_size: int, root: Path) -> dict[str, CheckpointError]:
    mesh = init_device_mesh("cpu", (world_size,))
    weight = torch.ones(4, 2)
    summand = DTensor.from_local(weight, mesh, [Partial()])
    whole = DTensor.from_local(weight, mesh, [Replicate()])
    dcp.save({"model": {"w": whole}}, storage_writer=HFDualWriter(root / "step-1"))

    def async_save() -> None:
        writer = HFDualWriter(root / "step-2")
        dcp.async_save({"model": {"w": summand}}, storage_writer=writer).result()

    calls = {
        "save": lambda: dcp.save(
            {"model": {"w": summand}}, storage_writer=HFDualWriter(root / "step-2")
        ),
        "async_save": async_save,
        "load": lambda: dcp.load(
            {"model": {"w": summand}}, storage_reader=HFDualReader(root / "step-1")
        ),
        "load_hf": lambda: load_hf({"w": summand}, root / "step-1"),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            found[name] = own_errors(error)[0]
    # The control: the hint's call gives a tensor that is saved.
    reduced = summand.redistribute(placements=[Replicate()])
    dcp.save({"model": {"w": reduced}}, storage_writer=HFDualWriter(root / "step-2"))
    sharded = summand.redistribute(placements=[Shard(0)])
    dcp.load({"model": {"w": sharded}}, storage_reader=HFDualReader(root / "step-2"))
    assert torch.equal(sharded.to_local(), torch.full((4 // world_size, 2), float(world_size)))
    return found


def test_partial_placement_is_named_by_every_call(tmp_path: Path) -> None:
    for found in run_ranks(partial_errors, 2, tmp_path):
        assert list(found) == ["save", "async_save", "load", "load_hf"]
        for name, error in found.items():
            assert isinstance(error, PlanningError)
            assert error.fqn == ("w" if name == "load_hf" else "model.w")
            assert "Partial" in str(error)
            assert "redistribute(placements=[Replicate()])" in str(error)
