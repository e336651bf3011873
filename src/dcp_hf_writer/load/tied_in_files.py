"""Compare the stored tensors that a load puts into one memory because the model ties them.

A tie can drift: the model was trained with two separate tensors, and its config still says that
they are tied. Both are stored then, with different values, and one of them would be lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.load.exchange_reads import Reading
from dcp_hf_writer.load.hf_source import Findings, WantedBlock
from dcp_hf_writer.load.read_hf_blocks import load_blocks
from dcp_hf_writer.tensors.boxes import whole
from dcp_hf_writer.tensors.row_major_parts import row_major_parts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from dcp_hf_writer.load.choose_half import CheckpointPlace
    from dcp_hf_writer.load.hf_source import HFSource
    from dcp_hf_writer.storage.open_inputs import OpenInputs

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
            if not _are_equal(place, source, inputs, (first, name), dtypes[first]):
                lost.append(f"{name} (tied to {first} in the model, but stored with other values)")
    if lost:
        Findings(mismatched=tuple(lost)).refuse(place.weights.path, hint=_HINT)


def _are_equal(
    place: CheckpointPlace,
    source: HFSource,
    inputs: OpenInputs,
    names: tuple[str, str],
    dtype: torch.dtype,
) -> bool:
    """Whether two stored tensors have equal bytes when they are loaded in `dtype`."""
    shape, _ = source.kind(names[1])
    for box in row_major_parts(whole(shape), _NUMEL):
        blocks = [
            WantedBlock(name, box, torch.empty(box.sizes, dtype=dtype, device="cpu"))
            for name in names
        ]
        load_blocks(place, source, inputs, blocks, is_verified=False, reading=Reading(None))
        # Compare bytes: NaN is not equal to itself.
        one, other = (block.target.reshape(-1).view(torch.uint8) for block in blocks)
        if not torch.equal(one, other):
            return False
    return True
