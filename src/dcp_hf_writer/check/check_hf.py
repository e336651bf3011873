"""Check a HuggingFace directory: its headers, its index, and weights that the index leaves out."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.digests.problems import Problem
from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.formats.names_on_disk import INDEX_NAME, SINGLE_NAME, SUFFIX
from dcp_hf_writer.formats.sharded_safetensors import has_pieces, join_pieces
from dcp_hf_writer.formats.strict_json import shortened
from dcp_hf_writer.load.hf_directory import MAX_INDEX_NBYTES, parse_index, read_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dcp_hf_writer.formats.parse_safetensors_header import FileHeader
    from dcp_hf_writer.plan.manifest import ManifestExport, ManifestTensor
    from dcp_hf_writer.storage.input_contract import InputFiles

# save_pretrained and the hub name the files of an index like this.
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


class DirectoryCheck:
    """The readable headers of a HuggingFace directory, and what is wrong with the directory."""

    def __init__(self, files: InputFiles, sizes: Mapping[str, int]) -> None:
        """Read and check the index and the headers, but not the weights.

        Args:
            files: The directory.
            sizes: Size in bytes of every file in the directory, by path within it.
        """
        self._files, self._sizes = files, sizes
        self.headers: dict[str, FileHeader] = {}
        """Headers by file; only files with a readable header are in it."""
        self.problems: list[Problem] = []
        """Faults that prevent a load, or make readers load something else."""
        self.warnings: list[Problem] = []
        """Oddities that readers ignore."""
        self.weights = sorted(n for n in sizes if n.endswith(SUFFIX) and "/" not in n)
        for name in self.weights:
            self._read_header(name)
        is_in_parts = self._check_pieces()
        if INDEX_NAME in sizes:
            self._check_index()
        elif is_in_parts:
            return
        else:
            self._check_without_index()

    @property
    def tensor_count(self) -> int:
        """Number of tensors in all files with a readable header."""
        return sum(len(header.tensors) for header in self.headers.values())

    def _read_header(self, name: str) -> None:
        try:
            with self._files.open(name) as file:
                self.headers[name] = read_header(file)
        except CheckpointError as error:
            self.problems.append(Problem.of(error, name))

    def _check_pieces(self) -> bool:
        """Check the parts that torch's writer saved on each rank; return whether there are any."""
        readable = {name: self.headers[name] for name in self.weights if name in self.headers}
        if not any(map(has_pieces, readable.values())):
            return False
        if len(readable) == len(self.weights):
            try:
                join_pieces(readable, path=self._files.path)
            except CheckpointError as error:
                self.problems.append(Problem.of(error, ""))
        return True

    def _check_index(self) -> None:
        path = f"{self._files.path}/{INDEX_NAME}"
        try:
            data = self._files.read_whole(INDEX_NAME, max_nbytes=MAX_INDEX_NBYTES)
            metadata, file_of_key = parse_index(data, path=path)
        except CheckpointError as error:
            self.problems.append(Problem.of(error, INDEX_NAME))
            return
        named = set(file_of_key.values())
        for name in sorted(named - self._sizes.keys()):
            keys = [key for key, file in file_of_key.items() if file == name]
            what = f"the file is missing; the index lists {len(keys)} tensors in it"
            self.problems.append(Problem(file=name, what=what, key=keys[0]))
        self._check_keys(file_of_key, named)
        self._check_unlisted_weights(named)
        self._check_total(metadata, named)

    def _check_keys(self, file_of_key: Mapping[str, str], named: set[str]) -> None:
        for key, name in file_of_key.items():
            header = self.headers.get(name)
            if header is not None and key not in header.tensors:
                what = "the tensor is not in the file that the index names"
                self.problems.append(Problem(file=name, key=key, what=what))
        for name in sorted(named & self.headers.keys()):
            for key in self.headers[name].tensors:
                other = file_of_key.get(key)
                if other is None:
                    what = "the tensor is not in the index"
                    self.warnings.append(Problem(file=name, key=key, what=what))
                elif other != name:
                    what = "the index names another file for the tensor"
                    found = Problem(file=name, key=key, what=what, expected=shortened(other))
                    self.problems.append(found)

    def _check_unlisted_weights(self, named: set[str]) -> None:
        for name in self.weights:
            if name in named:
                continue
            # transformers prefers a single file to an index; torch reads every shard that it finds.
            is_read = name == SINGLE_NAME or _SHARD.search(name) is not None
            what = "the index does not name these weights" + (
                ", and readers may load them instead of or with the others" if is_read else ""
            )
            (self.problems if is_read else self.warnings).append(Problem(file=name, what=what))

    def _check_total(self, metadata: Mapping[str, Any], named: set[str]) -> None:
        if not named <= self.headers.keys():
            return
        tensors = [one for name in named for one in self.headers[name].tensors.values()]
        found = {
            "total_size": sum(tensor.nbytes for tensor in tensors),
            "total_parameters": sum(math.prod(tensor.torch_shape) for tensor in tensors),
        }
        for name, total in found.items():
            if name in metadata and metadata[name] != total:
                self.warnings.append(
                    Problem(
                        file=INDEX_NAME,
                        what=f"{name} in the index does not match the files",
                        expected=str(total),
                        found=shortened(metadata[name]),
                    )
                )

    def _check_without_index(self) -> None:
        if SINGLE_NAME in self._sizes:
            self._check_unlisted_weights({SINGLE_NAME})
            return
        if any(_SHARD.search(name) for name in self.weights):
            what = "the index of these weights is missing"
            self.problems.append(Problem(file=INDEX_NAME, what=what))


def export_problems(
    export: ManifestExport, directory: DirectoryCheck, fqns: frozenset[str]
) -> Iterator[Problem]:
    """Yield differences between headers and manifest; files are named within the directory.

    Args:
        export: The export as the manifest describes it.
        directory: The export as it is stored.
        fqns: FQNs in the DCP half; a tied name may refer to one of them.
    """
    for name, file in export.files.items():
        header = directory.headers.get(name)
        if header is None:
            continue
        if file.tensors is not None:
            yield from _header_problems(name, file.tensors, header)
    if directory.headers.keys() >= export.files.keys():
        yield from _tie_problems(export, directory, fqns)


def _header_problems(
    name: str, listed_tensors: Mapping[str, ManifestTensor], header: FileHeader
) -> Iterator[Problem]:
    """Yield differences between the header of a file and a manifest that lists its tensors."""
    for key in sorted(listed_tensors.keys() ^ header.tensors.keys()):
        where = "header of its file" if key in listed_tensors else "manifest"
        what = f"the tensor is not in the {where}"
        yield Problem(file=name, key=key, what=what)
    for key in listed_tensors.keys() & header.tensors.keys():
        listed, stored = listed_tensors[key], header.tensors[key]
        said = (listed.dtype, listed.shape, listed.start)
        found = (stored.dtype, stored.torch_shape, stored.start)
        if said != found:
            yield Problem(
                file=name,
                key=key,
                what="the header and the manifest describe the tensor differently",
                expected=_described(*said),
                found=_described(*found),
            )


def _described(dtype: str, shape: tuple[int, ...], start: int) -> str:
    return f"{dtype} of shape {list(shape)} at byte {start}"


def _tie_problems(
    export: ManifestExport, directory: DirectoryCheck, fqns: frozenset[str]
) -> Iterator[Problem]:
    keys = {key for name in export.files for key in directory.headers[name].tensors}
    for dropped, kept in export.tied.items():
        if dropped in keys:
            what = "the tensor is stored although it is tied to another"
            yield Problem(file="", key=dropped, what=what, expected=f"only {shortened(kept)}")
        # A kept name is a key of the export, or the FQN of a tensor that specs split into keys.
        if kept not in keys and not any(f".{fqn}".endswith(f".{kept}") for fqn in fqns):
            what = "the tensor is tied to one that is not in the checkpoint"
            yield Problem(file="", key=dropped, what=what, expected=shortened(kept))
