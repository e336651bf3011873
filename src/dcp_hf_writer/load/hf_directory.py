"""Open a HuggingFace directory, written by this package or downloaded from a hub.

Opening a directory reads and checks its index and the header of every file. It reads no weights.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from dcp_hf_writer.errors import CorruptCheckpointError, PlanningError, ReadError
from dcp_hf_writer.excerpts import some_of
from dcp_hf_writer.formats.names_on_disk import (
    CONFIG_NAME,
    INDEX_NAME,
    INDEX_SUFFIX,
    SINGLE_NAME,
    SUFFIX,
)
from dcp_hf_writer.formats.parse_safetensors_header import (
    LENGTH_NBYTES,
    header_nbytes,
    parse_header,
)
from dcp_hf_writer.formats.quantized_checkpoints import logical_tensors
from dcp_hf_writer.formats.sharded_safetensors import has_pieces, join_pieces
from dcp_hf_writer.formats.strict_json import is_text, parse_json, shortened
from dcp_hf_writer.plan.parse_manifest import is_relative_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from dcp_hf_writer.formats.parse_safetensors_header import FileHeader, StoredTensor
    from dcp_hf_writer.formats.quantized_tensors import Stored
    from dcp_hf_writer.formats.sharded_safetensors import PiecedTensor
    from dcp_hf_writer.storage.input_contract import InputFile
    from dcp_hf_writer.storage.open_inputs import OpenInputs
    from dcp_hf_writer.tensors.boxes import Shape


MAX_INDEX_NBYTES = 256 << 20
_MAX_CONFIG_NBYTES = 16 << 20

_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")

# Files of one rank, as torch's HuggingFaceStorageWriter(save_distributed=True) names them.
_OF_RANK = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")

_MANY = 8
"""How many names an error lists."""

# Endings of files that hold pickled weights.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")

# Reading this many headers of local files takes less time than starting a thread.
_FEW = 8


@dataclass(frozen=True, slots=True)
class HFDirectory:
    """The checked headers, index and config of a directory."""

    headers: Mapping[str, FileHeader]
    """Header of each file of weights, by file name."""
    file_of_key: Mapping[str, str]
    """Name of the file that holds a stored tensor, or its first part, by key."""
    config: Mapping[str, Any] | None
    """The model's `config.json`; `None` without one."""
    pieced: Mapping[str, PiecedTensor] = field(default_factory=dict)
    """Tensors that are stored in several parts, by key."""

    def shape(self, key: str) -> Shape:
        """Return the shape of a stored tensor in torch elements, all its parts together."""
        pieced = self.pieced.get(key)
        return self.stored(key).torch_shape if pieced is None else pieced.shape

    def stored(self, key: str) -> StoredTensor:
        """Return the entry of a stored tensor, or of its first part, in the header of its file."""
        return self.headers[self.file_of_key[key]].tensors[key]

    def logical(self, wanted: Collection[str] | None = None) -> dict[str, Stored]:
        """Return the tensors as a model sees them, such as one weight for codes and scales.

        See `logical_tensors`.

        Raises:
            PlanningError: If the checkpoint is quantised in a way that this package cannot read.
            CorruptCheckpointError: If scales are missing, or do not fit their weights.
        """
        kinds = {}
        for key in self.file_of_key:
            kinds[key] = (self.stored(key).dtype, self.shape(key))
        found = logical_tensors(kinds, self.config, wanted=wanted)
        for name, one in found.items():
            if not one.is_plain and not self.pieced.keys().isdisjoint(one.keys):
                raise PlanningError(
                    "a quantised tensor is stored in parts",
                    phase="plan",
                    key=name,
                    expected="codes and scales that each lie in one file",
                    found="files of torch's HuggingFaceStorageWriter(save_distributed=True)",
                    hint="consolidate them with torch.distributed.checkpoint",
                )
        return found


def open_hf_directory(inputs: OpenInputs, *, only: str | None = None) -> HFDirectory:
    """Open a directory with weights.

    Args:
        inputs: The files of the directory.
        only: Name of the one file of weights, or of the index, to use; `None` finds the files.

    Raises:
        ReadError: If it has no weights, or a file cannot be read.
        CorruptCheckpointError: If index and files contradict each other, or a header is damaged;
            if parts of tensors are missing; if it is not clear which files belong together.
    """
    names = inputs.files.names()
    index, files = _weights(names if only is None else [only], inputs.files.path)
    file_of_indexed: dict[str, str] = {}
    if index is not None:
        file_of_indexed = _read_index(inputs, index)
        files = sorted(set(file_of_indexed.values()))
        _check_there(files, names, inputs.files.path)
        _check_single(files, names if only is None else [], inputs.files.path)
    headers = _headers(inputs, files)
    config = _read_config(inputs, names)
    joined: dict[str, PiecedTensor] = {}
    if any(map(has_pieces, headers.values())):
        joined = join_pieces(headers, path=inputs.files.path)
        if index is None:
            file_of_indexed = {key: one.pieces[0].file for key, one in joined.items()}
    return HFDirectory(
        headers,
        _files_of_keys(headers, file_of_indexed, inputs),
        config,
        {key: one for key, one in joined.items() if len(one.pieces) > 1},
    )


def _headers(inputs: OpenInputs, files: Sequence[str]) -> dict[str, FileHeader]:
    def header(name: str) -> FileHeader:
        with inputs.use(name) as file:
            return read_header(file)

    if inputs.files.reads_ahead and len(files) <= _FEW:
        return {name: header(name) for name in files}
    readers = min(inputs.files.readers, len(files))
    with ThreadPoolExecutor(readers, thread_name_prefix="dcp-hf-read") as pool:
        return dict(zip(files, pool.map(header, files), strict=True))


def _weights(names: Sequence[str], path: str) -> tuple[str | None, list[str]]:
    """Return the name of the index and no files, or `None` and the files if there is no index."""
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if INDEX_NAME in indices or len(indices) == 1:
        return (INDEX_NAME if INDEX_NAME in indices else indices[0]), []
    files = [name for name in names if name.endswith(SUFFIX)]
    if SINGLE_NAME in files:
        return None, [SINGLE_NAME]
    if not files:
        raise ReadError(
            "there are no weights in the safetensors format",
            phase="read",
            path=path,
            expected=f"{SINGLE_NAME}, or {INDEX_NAME} and the files that it names",
            found=other_files_found(names) if names else "an empty directory",
            hint=conversion_hint(names),
        )
    if len(files) > 1 and not _is_complete(files) and not all(map(_OF_RANK.fullmatch, files)):
        _refuse(
            path,
            "there are several files of weights, and no index says which belong together",
            expected=INDEX_NAME,
            found=some_of(map(repr, files), most=_MANY),
            hint="pass the path of the file to load, or of an index",
        )
    return None, files


def other_files_found(names: Sequence[str]) -> str:
    """Name the files of a directory without weights, for a message."""
    return f"only {some_of(map(repr, names), most=_MANY)}"


def conversion_hint(names: Sequence[str]) -> str | None:
    """Say how to convert weights that are pickled; `None` if there are none."""
    if not any(name.endswith(_PICKLED) for name in names):
        return None
    return "convert the weights: load them with from_pretrained, then call save_pretrained"


def _is_complete(files: Sequence[str]) -> bool:
    found = [_SHARD.fullmatch(name) for name in files]
    parts = {(match[1], int(match[3]), int(match[2])) for match in found if match is not None}
    stem, count, _ = min(parts, default=("", 0, 0))
    return len(files) == count and parts == {(stem, count, i) for i in range(1, count + 1)}


def _read_index(inputs: OpenInputs, name: str) -> dict[str, str]:
    data = inputs.files.read_whole(name, max_nbytes=MAX_INDEX_NBYTES)
    path = f"{inputs.files.path}/{name}"
    _, weight_map = parse_index(data, path=path)
    if not weight_map:
        _refuse(path, "an index names no tensors")
    for key, file in weight_map.items():
        if not file.endswith(SUFFIX):
            _refuse(
                path,
                "an index names a file that is not a file of weights",
                key=key,
                expected=f"a name that ends in {SUFFIX}",
                found=file,
            )
    return weight_map


def parse_index(data: bytes, *, path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the metadata of an index, and the file of each key.

    Raises:
        CorruptCheckpointError: If the data is not an index, or names a file in another directory.
    """
    fields = parse_json(data, path=path)
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict):
        _refuse(path, "an index has no weight_map", found=shortened(fields))
    seen: set[str] = set()
    for key, name in weight_map.items():
        if not key or not is_text(key):
            _refuse(path, "an index has a key that cannot name a tensor", found=shortened(key))
        # Thousands of tensors share a few files, so check each file name only once.
        if not isinstance(name, str) or (name not in seen and not _is_plain_name(name)):
            _refuse(
                path,
                "an index names a file outside its directory",
                key=key,
                expected="a plain file name",
                found=shortened(name),
            )
        seen.add(name)
    metadata = fields.get("metadata")
    return metadata if isinstance(metadata, dict) else {}, weight_map


def _is_plain_name(name: str) -> bool:
    return is_relative_name(name) and "/" not in name


def _check_there(files: Sequence[str], names: Sequence[str], path: str) -> None:
    missing = [name for name in files if name not in names]
    if missing:
        _refuse(
            path,
            "files that the index names are missing",
            expected=f"{len(files)} files",
            found=f"{len(missing)} missing: {some_of(map(repr, missing), most=_MANY)}",
        )


def _check_single(files: Sequence[str], names: Sequence[str], path: str) -> None:
    if SINGLE_NAME in names and SINGLE_NAME not in files:
        _refuse(
            path,
            "the directory holds two sets of weights; one of them is left from another save",
            expected=f"either {SINGLE_NAME} or {INDEX_NAME}",
            found="both",
            hint="remove the old set, or pass the path of the file or index to load",
        )


def read_header(file: InputFile) -> FileHeader:
    """Read and check the header of an open safetensors file.

    Raises:
        CorruptCheckpointError: If the file has no valid header.
        ReadError: If the file cannot be read.
    """
    start = file.read(0, min(LENGTH_NBYTES, file.nbytes))
    nbytes = header_nbytes(start, file_nbytes=file.nbytes, path=file.path)
    return parse_header(file.read(0, nbytes), file_nbytes=file.nbytes, path=file.path)


def _files_of_keys(
    headers: Mapping[str, FileHeader], indexed: Mapping[str, str], inputs: OpenInputs
) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, header in headers.items():
        for key in header.tensors:
            if key in found and key not in indexed:
                path = f"{inputs.files.path}/{name}"
                _refuse(path, "another file holds the same tensor", key=key, found=found[key])
            found[key] = name
    lost = [key for key, name in indexed.items() if key not in headers[name].tensors]
    if lost:
        _refuse(
            f"{inputs.files.path}/{indexed[lost[0]]}",
            "tensors are missing from the files that the index names for them",
            key=lost[0],
            found=f"{len(lost)} missing: {some_of(map(shortened, lost), most=_MANY)}",
        )
    return {**found, **indexed}


def _read_config(inputs: OpenInputs, names: Collection[str]) -> Mapping[str, Any] | None:
    if CONFIG_NAME not in names:
        return None
    data = inputs.files.read_whole(CONFIG_NAME, max_nbytes=_MAX_CONFIG_NBYTES)
    found = parse_json(data, path=f"{inputs.files.path}/{CONFIG_NAME}")
    if not isinstance(found, dict):
        _refuse(
            f"{inputs.files.path}/{CONFIG_NAME}",
            "a config is not a JSON object",
            found=type(found).__name__,
        )
    return found


def _refuse(
    path: str,
    problem: str,
    *,
    key: str | None = None,
    expected: object = None,
    found: object = None,
    hint: str | None = None,
) -> NoReturn:
    raise CorruptCheckpointError(
        problem, phase="read", path=path, key=key, expected=expected, found=found, hint=hint
    )
