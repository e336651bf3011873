"""The metrics of a step from its checkpoint, where they are part of the commit.

The notes of the manager hold them too, so this is read only if a crash came between the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from dcp_hf_writer.load.choose_half import read_dcp_metadata
from dcp_hf_writer.load.dcp_source import DCPSource
from dcp_hf_writer.manager.trainer_state import metrics_of_run, run_key
from dcp_hf_writer.storage.open_inputs import OpenInputs

if TYPE_CHECKING:
    from dcp_hf_writer.storage.input_contract import InputFiles


def stored_metrics(files: InputFiles) -> dict[str, float]:
    """Read the metrics that a checkpoint holds; empty if its save had none.

    Args:
        files: The checkpoint.

    Raises:
        ReadError: If a file cannot be read.
        CorruptCheckpointError: If a file is damaged.
        PickledObjectError: If the entry is not plain data.
    """
    metadata = read_dcp_metadata(files)
    if run_key() not in metadata.state_dict_metadata:
        return {}
    index = MetadataIndex(run_key())
    nothing = torch.Size(())
    item = ReadItem(
        type=LoadItemType.BYTE_IO,
        dest_index=index,
        dest_offsets=nothing,
        storage_index=index,
        storage_offsets=nothing,
        lengths=nothing,
    )
    inputs = OpenInputs(files)
    try:
        (data,) = DCPSource(inputs, metadata).read_objects([item], allow_pickled_objects=False)
    finally:
        inputs.close()
    return metrics_of_run(data)
