"""Fill blocks of runtime tensors from a HuggingFace directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.load.dequantized_reads import run_dequantized
from dcp_hf_writer.load.read_plan import fetch_of_bytes, plan_reads
from dcp_hf_writer.load.verify_while_reading import verify_ranges

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from dcp_hf_writer.load.choose_half import CheckpointPlace
    from dcp_hf_writer.load.exchange_reads import Reading
    from dcp_hf_writer.load.hf_directory import HFDirectory
    from dcp_hf_writer.load.hf_source import Dequantized, HFSource, WantedBlock
    from dcp_hf_writer.load.read_plan import Fetch
    from dcp_hf_writer.storage.open_inputs import OpenInputs


def load_blocks(
    place: CheckpointPlace,
    source: HFSource,
    inputs: OpenInputs,
    blocks: Sequence[WantedBlock],
    *,
    is_verified: bool,
    reading: Reading,
) -> None:
    """Load blocks into their targets.

    Args:
        place: The directory; with a manifest if `is_verified`.
        source: The same directory, seen as runtime tensors.
        inputs: The files of the directory.
        blocks: The blocks to load; the directory must hold all of them.
        is_verified: First compare the bytes with the digests of the manifest.
        reading: Runs the reads.

    Raises:
        CorruptCheckpointError: If a digest differs; no target has changed then.
        ReadError: If a file cannot be read.
    """
    jobs = source.jobs(blocks)
    if is_verified:
        # `find_place` refuses a verified load that has no manifest.
        assert place.manifest is not None
        raw = _raw_fetches(source.directory, jobs.computed)
        verify_ranges(place, place.manifest, [*jobs.fetches, *raw])
    for target in jobs.padded:
        target.detach().zero_()
    reading.run(inputs, plan_reads(jobs.fetches), [block.target for block in blocks])
    run_dequantized(inputs, source.directory, jobs.computed)


def _raw_fetches(directory: HFDirectory, computed: Iterable[Dequantized]) -> Iterator[Fetch]:
    """Yield a fetch of all bytes of each stored tensor that elements are computed from."""
    for key in {key for one in computed for key in one.stored.keys}:
        stored = directory.stored(key)
        yield fetch_of_bytes(directory.file_of_key[key], stored.start, stored.nbytes)
