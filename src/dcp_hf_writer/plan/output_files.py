"""Assign HuggingFace tensors to output files, name the files, and encode their index.

Pure: values in, values out.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import LayoutError
from dcp_hf_writer.excerpts import MOST_NAMES, some_of
from dcp_hf_writer.formats.names_on_disk import SINGLE_NAME, weight_file_names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.assign_hf_keys import AssignedTensor


def fill_files(
    assigned: Sequence[AssignedTensor],
    export: HFExport,
    file_of_key: Mapping[str, str] | None,
) -> dict[str, list[AssignedTensor]]:
    """Assign each tensor of an export to an output file.

    Args:
        assigned: The tensors, in the order in which they fill files.
        export: Options of the export: the size limit, and what stays together.
        file_of_key: File of each key, from the index of `export.like`.

    Returns:
        The tensors of each file, by file name; the names are sorted.

    Raises:
        LayoutError: If `file_of_key` lacks a key.
    """
    if file_of_key is not None:
        return _files_like(assigned, file_of_key)
    if export.single_file is not None:
        return {export.single_file: list(assigned)}
    return _greedy_files(_units(assigned, export), export.max_shard_nbytes)


def _units(assigned: Sequence[AssignedTensor], export: HFExport) -> list[list[AssignedTensor]]:
    """Group the tensors into units that each stay in one file, in the order of filling."""
    if export.groups is None:
        return [[one] for one in assigned]
    by_key = {one.tensor.key: one for one in assigned}
    units = [[by_key.pop(key) for key in group if key in by_key] for group in export.groups]
    return [unit for unit in units if unit] + [[one] for one in by_key.values()]


def _greedy_files(
    units: Sequence[Sequence[AssignedTensor]], max_nbytes: int
) -> dict[str, list[AssignedTensor]]:
    """Fill files in order, as `save_pretrained` does.

    Source:
        huggingface_hub, "Save a state dict": greedy in order of the keys; tensors of one storage
        stay together; a unit above the limit gets its own file, and filling the current file
        goes on.
    """
    files: list[list[AssignedTensor]] = []
    current: list[AssignedTensor] = []
    filled = 0
    for unit in units:
        nbytes = sum(one.tensor.nbytes for one in unit)
        if nbytes > max_nbytes:
            files.append(list(unit))
            continue
        if filled + nbytes > max_nbytes:
            files.append(current)
            current, filled = [], 0
        current += unit
        filled += nbytes
    if current:
        files.append(current)
    return dict(zip(weight_file_names(len(files)), files, strict=True))


def _files_like(
    assigned: Sequence[AssignedTensor], file_of_key: Mapping[str, str]
) -> dict[str, list[AssignedTensor]]:
    missing = [one.tensor.key for one in assigned if one.tensor.key not in file_of_key]
    if missing:
        msg = "keys of the export are not in the index of `like`"
        raise LayoutError(
            msg,
            phase="plan",
            found=some_of(map(repr, sorted(missing)), most=MOST_NAMES),
            hint="pass specs that produce the keys of the base model, such as those of "
            "HFExport.from_transformers(model, like=...), or do not pass like=",
        )
    files: dict[str, list[AssignedTensor]] = {}
    for one in assigned:
        files.setdefault(file_of_key[one.tensor.key], []).append(one)
    return dict(sorted(files.items()))


def encode_index(
    groups: Mapping[str, Sequence[AssignedTensor]],
    total_parameters: int | None,
    *,
    single_file: str | None,
) -> bytes | None:
    """Return `model.safetensors.index.json`; `None` if one file holds everything."""
    if list(groups) == [single_file or SINGLE_NAME]:
        return None
    tensors = [one.tensor for group in groups.values() for one in group]
    if total_parameters is None:
        total_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    index = {
        "metadata": {
            "total_parameters": total_parameters,
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {one.tensor.key: name for name, group in groups.items() for one in group},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
