"""Fill blocks of runtime tensors from a HuggingFace directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.load.dequantized_reads import run_dequantized
from dcp_hf_writer.load.read_plan import Fetch, plan_reads
from dcp_hf_writer.load.verify_ranges import verify_ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dcp_hf_writer.load.checkpoint_half import Place
    from dcp_hf_writer.load.exchange import Reading
    from dcp_hf_writer.load.hf_directory import HFDirectory
    from dcp_hf_writer.load.hf_source import Block, Dequantized, HFSource
    from dcp_hf_writer.storage.open_inputs import OpenInputs


def load_blocks(
    place: Place,
    source: HFSource,
    inputs: OpenInputs,
    blocks: Sequence[Block],
    *,
    is_verified: bool,
    reading: Reading,
) -> None:
    """Load blocks into their targets.

    Args:
        place: Where the directory is; with a manifest if `is_verified`.
        source: The directory.
        inputs: Its files.
        blocks: What is wanted; all of it is there.
        is_verified: Compare what is read with the digests of the manifest first.
        reading: Runs the reads.

    Raises:
        CorruptCheckpointError: If a digest differs; then nothing was loaded.
        ReadError: If a file cannot be read.
    """
    jobs = source.jobs(blocks)
    if is_verified:
        # Without one the load was refused when it began.
        assert place.manifest is not None
        raw = _raw_fetches(source.directory, jobs.computed)
        verify_ranges(place, place.manifest, [*jobs.fetches, *raw])
    for target in jobs.padded:
        target.detach().zero_()
    reading.run(inputs, plan_reads(jobs.fetches), [block.target for block in blocks])
    run_dequantized(inputs, source.directory, jobs.computed)


def _raw_fetches(directory: HFDirectory, computed: Iterable[Dequantized]) -> Iterator[Fetch]:
    """Yield all bytes of the stored tensors that something is computed from."""
    for key in {key for one in computed for key in one.stored.keys}:
        stored = directory.stored(key)
        yield Fetch(
            file=directory.file_of_key[key],
            start=stored.start,
            dtype=torch.uint8,
            target=0,
            target_start=0,
            loops=((stored.nbytes, 1, 1),),
            is_direct=True,
        )
