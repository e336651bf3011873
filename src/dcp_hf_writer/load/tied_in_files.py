"""Compare the stored tensors that a load puts into one memory because the model ties them.

A tie can drift: the model was trained with two separate tensors, and its config still says that
they are tied. Both are stored then, with other values, and one of them would be lost.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.load.exchange_reads import Reading
from dcp_hf_writer.load.hf_source import Findings, WantedBlock
from dcp_hf_writer.load.read_hf_blocks import load_blocks
from dcp_hf_writer.tensors.boxes import Box

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from dcp_hf_writer.load.choose_half import CheckpointPlace
    from dcp_hf_writer.load.hf_source import HFSource
    from dcp_hf_writer.storage.open_inputs import OpenInputs
    from dcp_hf_writer.tensors.boxes import Shape

# Elements that are compared at a time. This bounds the memory: two buffers of at most 32 MiB.
_NUMEL = 4 << 20


_HINT = (
    "make the model with untied parameters (tie_word_embeddings=False in its config), which keeps "
    "both, or remove the tensor that is not needed from the directory"
)


def refuse_drifted_ties(
    place: CheckpointPlace,
    source: HFSource,
    inputs: OpenInputs,
    groups: Iterable[Sequence[str]],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Refuse tied tensors for which the directory holds different values.

    Every rank compares the whole tensors, so that all ranks refuse or none does. Tensors are read
    only if the directory holds more than one tensor of a group, which is rare.

    Args:
        place: The directory.
        source: The same directory, seen as runtime tensors.
        inputs: The files of the directory.
        groups: Names of runtime tensors that share one memory; the directory holds all of them, in
            the shape of that memory.
        dtypes: Dtype that each tensor is loaded in, by name.

    Raises:
        MismatchError: If there are any; names each tensor that would be lost.
        ReadError: If a file cannot be read.
    """
    lost = []
    for first, *others in groups:
        for name in others:
            if source.keys_of(name) == source.keys_of(first):
                continue
            shape, _ = source.kind(name)
            read = _Reader(place, source, inputs, dtypes[first])
            if any(not _same_bits(read.box(first, b), read.box(name, b)) for b in _boxes(shape)):
                lost.append(f"{name} (tied to {first} in the model, but stored with other values)")
    if lost:
        Findings(mismatched=tuple(lost)).refuse(place.weights.path, hint=_HINT)


class _Reader:
    """Reads boxes of runtime tensors into new memory."""

    def __init__(
        self, place: CheckpointPlace, source: HFSource, inputs: OpenInputs, dtype: torch.dtype
    ) -> None:
        self._place, self._source, self._inputs, self._dtype = place, source, inputs, dtype

    def box(self, name: str, box: Box) -> torch.Tensor:
        target = torch.empty(box.sizes, dtype=self._dtype, device="cpu")
        load_blocks(
            self._place,
            self._source,
            self._inputs,
            [WantedBlock(name, box, target)],
            is_verified=False,
            reading=Reading(None),
        )
        return target


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    # Compare bytes: NaN is not equal to itself.
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _boxes(shape: Shape) -> Iterator[Box]:
    """Yield boxes that cover a tensor, each with a bounded number of elements or one row."""
    if not shape:
        yield Box((), ())
        return
    rows = max(1, _NUMEL // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        yield Box((start, *[0] * (len(shape) - 1)), (count, *shape[1:]))
