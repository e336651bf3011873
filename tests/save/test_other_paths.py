"""Ranks that save to different paths or with other options: found at once, on every rank."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.tensor import init_device_mesh

from dcp_hf_writer import HFDualWriter, HFExport
from dcp_hf_writer.errors import ConfigError, SaveAbortedError
from support.own_errors import own_errors
from support.ranks import run_ranks
from support.small_states import state_of

if TYPE_CHECKING:
    from pathlib import Path

# Far below the deadline of a save, and above what a busy machine needs.
AT_ONCE_S = 20


def errors_of(path: str, how: str, planner: Any, world_size: int) -> tuple[list[Any], float]:
    began = time.monotonic()
    state = state_of(1, init_device_mesh("cpu", (world_size,)))
    try:
        if how == "save":
            dcp.save(state, storage_writer=HFDualWriter(path), planner=planner)
        else:
            dcp.async_save(state, storage_writer=HFDualWriter(path), planner=planner).result()
    except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
        return own_errors(error), time.monotonic() - began
    return [], time.monotonic() - began


def save_apart(rank: int, world_size: int, root: Path, how: str) -> tuple[Any, ...]:
    os.chdir(root)
    apart = errors_of(str(root / f"step-{rank}"), how, None, world_size)
    (root / f"here-{rank}").mkdir()
    os.chdir(root / f"here-{rank}")
    relative = errors_of("step-1", how, None, world_size)
    together = errors_of(str(root / "step-9"), how, None, world_size)
    return apart, relative, together


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_every_rank_is_told_both_paths_at_once(how: str, tmp_path: Path) -> None:
    for apart, relative, together in run_ranks(save_apart, 2, tmp_path, how):
        for (errors, seconds), own, other in (
            (apart, tmp_path / "step-0", tmp_path / "step-1"),
            (relative, tmp_path / "here-0/step-1", tmp_path / "here-1/step-1"),
        ):
            assert [type(error) for error in errors] == [ConfigError]
            assert errors[0].path == str(own)
            assert f"rank 1: {other}" in str(errors[0])
            assert seconds < AT_ONCE_S
        assert together[0] == []
    assert sorted(os.listdir(tmp_path)) == ["here-0", "here-1", "step-9"]
    assert os.listdir(tmp_path / "here-0") == []


def save_apart_from_the_plan_cache(rank: int, world_size: int, root: Path) -> list[Any]:
    planners = lambda: DefaultSavePlanner(enable_plan_caching=True)  # noqa: E731
    found = [errors_of(str(root / f"step-{n}"), "save", planners(), world_size) for n in range(3)]
    return [*found, errors_of(str(root / f"apart-{rank}"), "save", planners(), world_size)]


def test_a_rank_is_told_at_once_when_the_plan_comes_from_the_cache(tmp_path: Path) -> None:
    for *before, (errors, seconds) in run_ranks(save_apart_from_the_plan_cache, 2, tmp_path):
        assert [errors for errors, _ in before] == [[], [], []]
        # Rank 0 may wait for the other one, and then has an error of its own.
        (told,) = (error for error in errors if not isinstance(error, SaveAbortedError))
        assert type(told) is ConfigError
        assert f"rank 1: {tmp_path / 'apart-1'}" in str(told)
        assert seconds < AT_ONCE_S
    assert sorted(os.listdir(tmp_path)) == ["step-0", "step-1", "step-2"]


# What each rank's writer gets, by case.
DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no export on rank 0": ({"export": None}, {}),
    "no export on rank 1": ({}, {"export": None}),
    "dtype": ({}, {"export": HFExport(dtype=torch.bfloat16)}),
    "subdir": ({}, {"export": HFExport(subdir="served")}),
    "weights": ({}, {"weights": "once"}),
}


def save_with_different_options(rank: int, world_size: int, root: Path) -> dict[str, list[Any]]:
    found = {}
    for name, options in DIFFERENT.items():
        state = state_of(1, init_device_mesh("cpu", (world_size,)))
        try:
            dcp.save(state, storage_writer=HFDualWriter(root / "step-1", **options[rank]))
        except BaseException as error:  # noqa: BLE001 torch's CheckpointException is no Exception
            found[name] = own_errors(error)
    # What only rank 0 reads may differ.
    assets = {"config.json": b'{"model_type": "none"}'} if rank == 0 else ()
    state = state_of(2, init_device_mesh("cpu", (world_size,)))
    dcp.save(state, storage_writer=HFDualWriter(root / "step-2", export=HFExport(assets=assets)))
    return found


def test_writers_with_different_options_are_refused_on_every_rank(tmp_path: Path) -> None:
    for found in run_ranks(save_with_different_options, 2, tmp_path):
        assert found.keys() == DIFFERENT.keys()
        for name, errors in found.items():
            assert [type(error) for error in errors] == [ConfigError], name
            assert "the writers of the ranks have different options" in str(errors[0]), name
            assert "rank 1: export=" in str(errors[0]), name
    assert os.listdir(tmp_path) == ["step-2"]
