"""What staging costs a training step that runs on the device meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dcp_hf_writer import HFDualWriter
from gpu_stagers import TIMEOUT_S

if TYPE_CHECKING:
    from gpu_device import Device, Reporter

_SIZE = {"cuda": 8192, "cpu": 256}
"""Rows and columns of the matrices; on a GPU enough to fill it."""
_LONGER_THAN_COPY = 1.5
"""The step lasts that much longer than the copies, so that they could be hidden behind it."""
_MIN_S, _MAX_S = 0.05, 1.0
_CHECKED = "model.layers.0.mlp.down_proj.weight"
"""The weight that the optimizer changes; its staged copy must stay as it was."""

Mode = Literal["none", "blocking", "overlap"]


def measure_step(
    state_dict: dict[str, Any], device: Device, report: Reporter, *, copy_s: float, rounds: int
) -> None:
    """Time steps without a save, with blocking and with overlapped staging, in turns.

    Args:
        state_dict: What is staged; the weight `_CHECKED` of it is trained.
        device: Where the step runs.
        report: Takes the samples.
        copy_s: How long a copy of the state dict takes.
        rounds: Most rounds; ends earlier when the time is up.
    """
    step = Step(state_dict, device, copy_s=copy_s)
    report.fact(step_matmuls=step.matmuls, step_rows=_SIZE[device.kind])
    modes: list[Mode] = ["none", "blocking", "overlap"]
    for number in range(rounds):
        if number and report.left_s < 6 * _MAX_S:
            report.skip(f"steps from round {number + 1} on", "no time was left")
            return
        turn = number % len(modes)
        for mode in modes[turn:] + modes[:turn]:
            report.sample(f"step: {mode}", **step.run(mode))


class Step:
    """Matrix products on the current stream, then one step of an optimizer that is guarded."""

    def __init__(self, state_dict: dict[str, Any], device: Device, *, copy_s: float) -> None:
        """Make the matrices, load the kernels, and find how many products fill the time."""
        self._state_dict, self._device = state_dict, device
        self._writers = {
            mode: HFDualWriter("unused", export=None, staging=mode, timeout_s=TIMEOUT_S)
            for mode in ("blocking", "overlap")
        }
        self._weight = nn.Parameter(state_dict["model"][_CHECKED])
        self._weight.grad = torch.ones_like(self._weight)
        self._optimizer = torch.optim.SGD([self._weight], lr=1.0)
        self._writers["overlap"].guard(self._optimizer)
        size = _SIZE[device.kind]
        self._factor = torch.randn(size, size, dtype=torch.bfloat16, device=device.kind)
        self._product = torch.empty_like(self._factor)
        # The first calls load kernels, for which CUDA may wait for the whole device.
        self._compute(3)
        self._optimizer.step()
        self.matmuls = self._calibrate(min(max(copy_s * _LONGER_THAN_COPY, _MIN_S), _MAX_S))

    def run(self, mode: Mode) -> dict[str, float]:
        """Run one step with staging in the middle of it, and check what was staged.

        Returns:
            Seconds: `stall_s` of staging, `compute_s` of the products on the device, `device_s`
            from the first product to the end of the optimizer's step there, `wall_s` of all of it.

        Raises:
            RuntimeError: If the staged weight is not that from before the step.
        """
        device = self._device
        expected = self._weight.detach().to("cpu", copy=True)
        device.synchronize()
        start = time.perf_counter()
        begin = device.mark()
        self._compute(self.matmuls // 2)
        before_stage = time.perf_counter()
        staged = None if mode == "none" else self._writers[mode].stage(self._state_dict)
        stall = time.perf_counter() - before_stage
        self._compute(self.matmuls - self.matmuls // 2)
        computed = device.mark()
        self._optimizer.step()
        end = device.mark()
        device.synchronize()
        wall = time.perf_counter() - start
        self._check(staged, expected, mode)
        return {
            "stall_s": stall,
            "compute_s": device.seconds_between(begin, computed),
            "device_s": device.seconds_between(begin, end),
            "wall_s": wall,
        }

    def _check(self, staged: Any, expected: torch.Tensor, mode: Mode) -> None:
        whole = staged.result() if isinstance(staged, Future) else staged
        if whole is not None and not torch.equal(whole["model"][_CHECKED], expected):
            msg = f"{mode}: the optimizer's step reached the staged copy of {_CHECKED}"
            raise RuntimeError(msg)
        if torch.equal(self._weight.detach().cpu(), expected):
            msg = f"{mode}: the optimizer did not change {_CHECKED}, so that nothing was checked"
            raise RuntimeError(msg)

    def _compute(self, count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                torch.matmul(self._factor, self._factor, out=self._product)

    def _calibrate(self, seconds: float) -> int:
        self._device.synchronize()
        begin = self._device.mark()
        self._compute(10)
        end = self._device.mark()
        self._device.synchronize()
        one = self._device.seconds_between(begin, end) / 10
        return max(2, round(seconds / one))
