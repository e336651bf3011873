"""Assign HuggingFace tensors to output files, name the files, and encode their index.

Pure: values in, values out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import LayoutError
from dcp_hf_writer.excerpts import MOST_NAMES, some_of
from dcp_hf_writer.formats.names_on_disk import SINGLE_NAME, weight_file_names
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.assign_hf_keys import AssignedTensor

_json = json.JSONEncoder().encode


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


def _units(
    assigned: Sequence[AssignedTensor], export: HFExport
) -> Iterator[tuple[int, Sequence[AssignedTensor]]]:
    """Yield the size in bytes and the tensors of each unit that stays in one file, in order."""
    alone = assigned
    if export.groups is not None:
        by_key = {one.key: one for one in assigned}
        for group in export.groups:
            unit = [by_key.pop(key) for key in group if key in by_key]
            if unit:
                yield sum(one.nbytes for one in unit), unit
        alone = list(by_key.values())
    for one in alone:
        yield one.nbytes, (one,)


def _greedy_files(
    units: Iterable[tuple[int, Sequence[AssignedTensor]]], max_nbytes: int
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
    for nbytes, unit in units:
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
    missing = [one.key for one in assigned if one.key not in file_of_key]
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
        files.setdefault(file_of_key[one.key], []).append(one)
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
    nbytes: dict[str, int] = {}
    lines: dict[str, str] = {}
    for name, group in groups.items():
        encoded_name = _json(name)
        for one in group:
            nbytes[one.dtype] = nbytes.get(one.dtype, 0) + one.nbytes
            lines[one.key] = f"{_json(one.key)}: {encoded_name}"
    if total_parameters is None:
        total_parameters = sum(size // ITEMSIZE[dtype] for dtype, size in nbytes.items())
    # As `json.dumps` with `indent=2`, which runs in Python and takes several times as long.
    weight_map = ",\n    ".join([lines[key] for key in sorted(lines)])
    return (
        f'{{\n  "metadata": {{\n    "total_parameters": {_json(total_parameters)},\n'
        f'    "total_size": {_json(sum(nbytes.values()))}\n  }},\n'
        f'  "weight_map": {{\n    {weight_map}\n  }}\n}}\n'
    ).encode()
