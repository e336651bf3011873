"""Whether a HuggingFace directory is sound: its headers, its index, and no weights beside them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.digests.problems import Problem
from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.formats.names_on_disk import INDEX_NAME, SINGLE_NAME, SUFFIX
from dcp_hf_writer.formats.strict_json import shortened
from dcp_hf_writer.load.hf_directory import MAX_INDEX_NBYTES, parse_index, read_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dcp_hf_writer.formats.parse_safetensors_header import FileHeader
    from dcp_hf_writer.plan.parse_manifest import ManifestExport
    from dcp_hf_writer.storage.input_contract import InputFiles

# How save_pretrained and the hub name the files that an index belongs to.
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


class DirectoryCheck:
    """A HuggingFace directory as far as it can be read, and what is wrong with it."""

    def __init__(self, files: InputFiles, sizes: Mapping[str, int]) -> None:
        """Read index and headers; the weights are not touched.

        Args:
            files: The directory.
            sizes: Size of every file in it, by path within it.
        """
        self._files, self._sizes = files, sizes
        self.headers: dict[str, FileHeader] = {}
        """Headers by file, of the files that have one that can be read."""
        self.problems: list[Problem] = []
        """What keeps it from being loaded, or makes readers load something else."""
        self.warnings: list[Problem] = []
        """What readers pass over."""
        self.weights = sorted(n for n in sizes if n.endswith(SUFFIX) and "/" not in n)
        for name in self.weights:
            self._read_header(name)
        if INDEX_NAME in sizes:
            self._check_index()
        else:
            self._check_without_index()

    @property
    def tensor_count(self) -> int:
        """Number of tensors in all files that could be read."""
        return sum(len(header.tensors) for header in self.headers.values())

    def _read_header(self, name: str) -> None:
        try:
            with self._files.open(name) as file:
                self.headers[name] = read_header(file)
        except CheckpointError as error:
            self.problems.append(Problem.of(error, name))

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
            what = f"a file that the index names is missing; {len(keys)} tensors are in it"
            self.problems.append(Problem(file=name, what=what, key=keys[0]))
        self._check_keys(file_of_key, named)
        self._check_strangers(named)
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
                    what = "the tensor is in a file that the index does not name for it"
                    found = Problem(file=name, key=key, what=what, expected=shortened(other))
                    self.problems.append(found)

    def _check_strangers(self, named: set[str]) -> None:
        for name in self.weights:
            if name in named:
                continue
            # transformers prefers the one file to an index; torch reads every shard there is.
            is_read = name == SINGLE_NAME or _SHARD.search(name) is not None
            what = "weights that the index does not name" + (
                ", which readers may load instead or with the others" if is_read else ""
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
                        what=f"{name} is not that of the files",
                        expected=str(total),
                        found=shortened(metadata[name]),
                    )
                )

    def _check_without_index(self) -> None:
        if SINGLE_NAME in self._sizes:
            self._check_strangers({SINGLE_NAME})
            return
        if any(_SHARD.search(name) for name in self.weights):
            what = "the index of these weights is missing"
            self.problems.append(Problem(file=INDEX_NAME, what=what))


def export_problems(
    export: ManifestExport, directory: DirectoryCheck, fqns: frozenset[str]
) -> Iterator[Problem]:
    """Yield where headers differ from what the manifest says of them; files as the directory's.

    Args:
        export: What the manifest says.
        directory: What is there.
        fqns: Names in the DCP half, which a tied name may stand for.
    """
    for name, file in export.files.items():
        header = directory.headers.get(name)
        if header is None:
            continue
        for key in sorted(file.tensors.keys() ^ header.tensors.keys()):
            where = "header" if key in file.tensors else "manifest"
            what = f"the tensor is not in the {where} of its file"
            yield Problem(file=name, key=key, what=what)
        for key in file.tensors.keys() & header.tensors.keys():
            listed, stored = file.tensors[key], header.tensors[key]
            said = (listed.dtype, listed.shape, listed.start)
            found = (stored.dtype, stored.torch_shape, stored.start)
            if said != found:
                yield Problem(
                    file=name,
                    key=key,
                    what="the header declares another tensor than the manifest",
                    expected=_described(*said),
                    found=_described(*found),
                )
    yield from _tie_problems(export, fqns)


def _described(dtype: str, shape: tuple[int, ...], start: int) -> str:
    return f"{dtype} of shape {list(shape)} at byte {start}"


def _tie_problems(export: ManifestExport, fqns: frozenset[str]) -> Iterator[Problem]:
    keys = {key for file in export.files.values() for key in file.tensors}
    for dropped, kept in export.tied.items():
        if dropped in keys:
            what = "the tensor is stored although it is tied to another"
            yield Problem(file="", key=dropped, what=what, expected=f"only {shortened(kept)}")
        # A kept name is a key, or the name of a runtime tensor that specs take apart.
        if kept not in keys and not any(f".{fqn}".endswith(f".{kept}") for fqn in fqns):
            what = "the tensor that it is tied to is not in the checkpoint"
            yield Problem(file="", key=dropped, what=what, expected=shortened(kept))
