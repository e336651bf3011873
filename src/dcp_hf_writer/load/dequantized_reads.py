"""Dequantise stored tensors into their targets: one part at a time, in several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.load.read_phase import run_reads
from dcp_hf_writer.load.read_plan import fetch_of_copy, plan_reads
from dcp_hf_writer.tensors.boxes import Box
from dcp_hf_writer.tensors.dtypes import TORCH_BY_NAME
from dcp_hf_writer.tensors.strided_copies import (
    copy_of_box,
    hf_view,
    runtime_view,
    split,
    strides_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcp_hf_writer.load.hf_directory import HFDirectory
    from dcp_hf_writer.load.hf_source import Dequantized
    from dcp_hf_writer.storage.open_inputs import OpenInputs
    from dcp_hf_writer.tensors.strided_copies import Copy

# Elements that one thread computes at a time. They take a few times this many bytes of memory.
_MAX_ELEMENTS = 1 << 20


def run_dequantized(
    inputs: OpenInputs, directory: HFDirectory, wanted: Sequence[Dequantized]
) -> None:
    """Dequantise elements and copy them into their targets.

    Args:
        inputs: The files of the directory.
        directory: Says where each stored tensor is.
        wanted: The elements to compute, with their targets.

    Raises:
        ReadError: If a file cannot be read.
    """
    parts = [(one, part) for one in wanted for part in split(_in_file_order(one), _MAX_ELEMENTS)]
    readers = min(inputs.files.readers, len(parts))
    if not readers:
        return
    with ThreadPoolExecutor(readers, thread_name_prefix="dcp-hf-read") as pool:
        for _ in pool.map(lambda each: _compute(inputs, directory, *each), parts):
            pass


def _in_file_order(one: Dequantized) -> Copy:
    """Put the loops of a copy in the order of the codes in the file, so that parts are runs."""
    place = one.stored.dims_in_file.index
    loops = sorted(one.copy.loops, key=lambda loop: (place(loop.hf_dim), -loop.hf_step))
    return replace(one.copy, loops=tuple(loops))


def _compute(inputs: OpenInputs, directory: HFDirectory, one: Dequantized, part: Copy) -> None:
    box = _bounds(part)
    raw = {
        key: _read_box(inputs, directory, key, wanted)
        for key, wanted in one.stored.raw_boxes(box).items()
    }
    target = one.target.detach()
    values = torch.empty(box.sizes, dtype=target.dtype, device="cpu")
    one.stored.dequantize(box, raw, values)
    runtime_view(target, part).copy_(hf_view(values, _within(part, box)))


def _bounds(copy: Copy) -> Box:
    """Return the smallest box of the HuggingFace tensor that holds all elements of a copy."""
    sizes = [1] * len(copy.hf_start)
    for loop in copy.loops:
        sizes[loop.hf_dim] += (loop.extent - 1) * loop.hf_step
    return Box(copy.hf_start, tuple(sizes))


def _within(copy: Copy, box: Box) -> Copy:
    """Return a copy whose HuggingFace indices count from the start of a box."""
    start = tuple(i - o for i, o in zip(copy.hf_start, box.offsets, strict=True))
    return type(copy)(start, copy.start, copy.loops)


def _read_box(inputs: OpenInputs, directory: HFDirectory, key: str, box: Box) -> torch.Tensor:
    stored = directory.stored(key)
    dtype, strides = TORCH_BY_NAME[stored.dtype], strides_of(stored.torch_shape)
    target = torch.empty(box.sizes, dtype=dtype, device="cpu")
    copy = copy_of_box(Box((0,) * len(box.sizes), box.sizes))
    fetch = fetch_of_copy(
        type(copy)(box.offsets, copy.start, copy.loops),
        file=directory.file_of_key[key],
        start=stored.start,
        dtype=dtype,
        strides=strides,
        target=0,
        target_strides=target.stride(),
        is_direct=True,
    )
    run_reads(inputs, plan_reads([fetch]), [target], readers=1)
    return target
