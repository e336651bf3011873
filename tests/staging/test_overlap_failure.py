"""A copy that fails in the background on one rank: every rank gets the error, and none waits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from dcp_hf_writer import HFDualWriter
from dcp_hf_writer.errors import StagingError
from dcp_hf_writer.staging.stager import EAGER_NBYTES, Stager
from support.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 20


def state_of(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((EAGER_NBYTES // 2,), float(step))}}


def save_with_a_bad_copy(rank: int, world_size: int, root: str) -> tuple[str, int | None, float]:
    copy_now, calls = Stager._copy_now, []

    def fail_in_the_background(self: Stager, pairs: Any) -> None:
        calls.append(len(pairs))
        if rank == 1 and len(calls) == 2:
            msg = "the device fell off the bus"
            raise RuntimeError(msg)
        copy_now(self, pairs)

    Stager._copy_now = fail_in_the_background  # type: ignore[method-assign]
    began = time.monotonic()
    writer = HFDualWriter(f"{root}/step-1", staging="overlap", timeout_s=DEADLINE_S)
    response = dcp.async_save(state_of(1), storage_writer=writer)
    error = response.upload_completion.exception(timeout=DEADLINE_S)
    took = time.monotonic() - began
    Stager._copy_now = copy_now  # type: ignore[method-assign]
    assert len(calls) == 2
    assert isinstance(error, StagingError), error
    writer = HFDualWriter(f"{root}/step-2", staging="overlap", timeout_s=DEADLINE_S)
    dcp.async_save(state_of(2), storage_writer=writer).upload_completion.result()
    return str(error), error.rank, took


def test_every_rank_gets_the_error_when_one_cannot_copy(tmp_path: Path) -> None:
    results = run_ranks(save_with_a_bad_copy, 2, str(tmp_path))
    for text, rank, took in results:
        assert "the device fell off the bus" in text
        assert rank == 1
        assert took < DEADLINE_S / 4
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    saved = load_file(tmp_path / "step-2" / "hf" / "model.safetensors")
    assert torch.equal(saved["w"], state_of(2)["model"]["w"])
