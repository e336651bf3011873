"""Parse the manifest `dcp-hf.json`, which may be damaged or hostile.

Pure. `encode_manifest` is the reverse. The parser checks every field that it returns: types, ranges
and file names. It also checks that the tensors of an output file, and the ranges of a DCP file, fit
into the file. It does not check that the blocks of a tensor tile it: the callers that read the
bytes do.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import xxhash

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, path_in_export
from dcp_hf_writer.formats.strict_json import is_count, is_text, parse_json, shortened
from dcp_hf_writer.plan.encode_manifest import FORMAT_VERSION, OtherHalf, WholeFile
from dcp_hf_writer.plan.parse_manifest_blocks import Places
from dcp_hf_writer.plan.rank_report import DIGEST_NAME, DCPFile
from dcp_hf_writer.tensors.boxes import ByteRuns
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from dcp_hf_writer.tensors.boxes import Shape
    from dcp_hf_writer.tensors.strided_copies import IndexLoops


MAX_MANIFEST_NBYTES = 512 << 20
"""Callers refuse a larger manifest before they read it. A block takes about 60 bytes."""

_LAST_LINE = re.compile(rb'"digest_above": "([0-9a-f]{16})"\n\}\n')
_LAST_LINE_NBYTES = 37
_DIGEST = re.compile(r"[0-9a-f]{16}")
# Linux, PATH_MAX.
_MAX_NAME_CHARS = 4096
_MAX_DIMS = 64

_FIELDS = frozenset(
    {
        *("format", "version", "save_id", "target", "owner", "step", "world_size", "digest"),
        *("nbytes", "timings", "files", "dcp", "once", "hf", "export_error", "digest_above"),
    }
)


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block of one tensor on disk: elements that one rank wrote."""

    rank: int
    """The rank."""
    offsets: Shape
    """Index of its first element."""
    extent: Shape | IndexLoops
    """Its sizes, one per dimension; or its loops, in the order of the bytes."""
    digest: str
    """xxh3_64 of its bytes in file order, in hex."""
    runs: ByteRuns | None
    """Where its bytes are in the file, ascending; `None` if the block is empty."""


@dataclass(frozen=True, slots=True)
class ManifestTensor:
    """One tensor of an output file."""

    key: str
    """HuggingFace name."""
    start: int
    """Offset of its first byte in the file."""
    dtype: str
    """safetensors name of its dtype."""
    shape: Shape
    """Its shape, counted in torch elements."""
    blocks: tuple[StoredBlock, ...]
    """The blocks that the ranks wrote."""

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One output file: its header, and tensors that tile the rest."""

    name: str
    """File name within the export."""
    nbytes: int
    """Its size."""
    header_nbytes: int
    """Size of its header; the first tensor starts here."""
    header: str
    """Digest of the header."""
    tensors: Mapping[str, ManifestTensor]
    """Its tensors by key, in the order of their bytes."""


@dataclass(frozen=True, slots=True)
class ManifestExport:
    """The HuggingFace half."""

    subdir: str
    """Its directory within the checkpoint; empty if the halves lie apart."""
    tied: Mapping[str, str]
    """Names that the export left out, each with the name that holds its bytes."""
    files: Mapping[str, ManifestFile]
    """Output files by name."""

    def path_of(self, name: str) -> str:
        """Return the path of a file of the export within the checkpoint."""
        return path_in_export(self.subdir, name)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The checked content of a manifest."""

    save_id: str
    """Id of the save."""
    target: str
    """Path that it was saved under."""
    step: int | None
    """Training step, if the path contained it."""
    world_size: int
    """Number of ranks that saved it."""
    files: Mapping[str, WholeFile]
    """Files written in one piece, by path within the checkpoint."""
    dcp: Mapping[str, DCPFile]
    """Files of the DCP half, by path within the checkpoint."""
    once: tuple[str, ...]
    """FQNs of the tensors that only the export stores."""
    hf: ManifestExport | None
    """The export; `None` without one."""
    export_error: str | None
    """Why a requested export failed; `None` if it did not."""
    seconds: Mapping[str, float]
    """Seconds that the coordinator spent in each phase."""
    ranks: tuple[tuple[int, str, Mapping[str, float]], ...] = ()
    """Rank, host, and seconds in each phase, of each rank."""
    other_half: OtherHalf | None = None
    """Where the other half lies, if the halves lie apart; `files` and `sizes` leave it out."""

    def sizes(self) -> dict[str, int]:
        """Return the size of every file but the manifest, by path within the checkpoint."""
        sizes = {name: file.nbytes for name, file in self.files.items()}
        sizes |= {name: file.nbytes for name, file in self.dcp.items()}
        if self.hf is not None:
            sizes |= {self.hf.path_of(n): file.nbytes for n, file in self.hf.files.items()}
        return sizes


def parse_manifest(data: bytes, *, path: str) -> Manifest:
    """Parse and check a manifest.

    Args:
        data: The whole file, of at most `MAX_MANIFEST_NBYTES`.
        path: Path of the file, for the error.

    Raises:
        CorruptCheckpointError: If it is damaged, has another version, or holds an invalid value.
    """
    _check_digest(data, path)
    return _Parser(path).manifest(parse_json(data, path=path))


def is_relative_name(name: str) -> bool:
    """Whether a path from storage stays within its directory, on any system."""
    if len(name) > _MAX_NAME_CHARS or "\\" in name or not name.isprintable():
        return False
    return not any(part in {"", ".", ".."} for part in name.split("/"))


def _check_digest(data: bytes, path: str) -> None:
    if len(data) > MAX_MANIFEST_NBYTES:
        msg = "the manifest is too large"
        raise CorruptCheckpointError(
            msg,
            phase="read",
            path=path,
            expected=f"at most {MAX_MANIFEST_NBYTES} bytes",
            found=f"{len(data)} bytes",
        )
    tail = _LAST_LINE.fullmatch(data[-_LAST_LINE_NBYTES:])
    if tail is None:
        msg = "the end of the manifest is missing or damaged"
        raise CorruptCheckpointError(
            msg,
            phase="read",
            path=path,
            expected="a last line with the digest of all bytes above it",
            found=shortened(data[-_LAST_LINE_NBYTES:]),
        )
    found = xxhash.xxh3_64_hexdigest(memoryview(data)[:-_LAST_LINE_NBYTES])
    if found != tail[1].decode():
        msg = "the manifest is damaged: its digest differs"
        raise CorruptCheckpointError(
            msg, phase="read", path=path, expected=tail[1].decode(), found=found
        )


class _Parser:
    """Checks and converts values; each error names the field that is invalid."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._world_size = 1
        self._places = Places()

    def manifest(self, value: Any) -> Manifest:
        if not isinstance(value, dict):
            self._refuse("the manifest", "an object", value)
        if value.get("format") != "dcp-hf":
            self._refuse("format", '"dcp-hf"', value.get("format"))
        if value.get("version") != FORMAT_VERSION:
            self._refuse(
                "version",
                f"{FORMAT_VERSION}",
                value.get("version"),
                hint="another version of this package wrote it; read it with that version",
            )
        # Only a checkpoint whose halves lie apart has it.
        other = value.pop("other_half", None)
        fields = self._object(value, "the manifest", _FIELDS)
        if fields["digest"] != DIGEST_NAME:
            self._refuse("digest", f'"{DIGEST_NAME}"', fields["digest"])
        self._world_size = self._count(fields["world_size"], "world_size", below=1 << 32)
        manifest = Manifest(
            save_id=self._text(fields["save_id"], "save_id"),
            target=self._text(fields["target"], "target"),
            step=self._optional(fields["step"], "step", self._count),
            world_size=self._world_size,
            files=self._whole_files(fields["files"]),
            dcp=self._dcp_files(fields["dcp"]),
            once=tuple(self._text(fqn, "once") for fqn in self._list(fields["once"], "once")),
            hf=self._optional(fields["hf"], "hf", self._export),
            export_error=self._optional(fields["export_error"], "export_error", self._text),
            seconds=self._seconds(fields["timings"]),
            ranks=tuple(self._rank_seconds(fields["timings"])),
            other_half=self._optional(other, "other_half", self._other_half),
        )
        self._check_halves(manifest)
        if manifest.once and manifest.hf is None:
            self._refuse("once", "empty without an export", fields["once"])
        self._check_names(manifest)
        return manifest

    def _other_half(self, value: Any, where: str) -> OtherHalf:
        fields = self._object(value, where, {"holds", "path"})
        if fields["holds"] not in ("dcp", "hf"):
            self._refuse("the other half", '"dcp" or "hf"', fields["holds"])
        path = self._text(fields["path"], "the place of the other half")
        if not path.startswith("/") and "://" not in path:
            self._refuse("the place of the other half", "an absolute path or a URL", path)
        return OtherHalf(fields["holds"], path)

    def _check_halves(self, manifest: Manifest) -> None:
        other = None if manifest.other_half is None else manifest.other_half.holds
        if other == "hf" and manifest.hf is not None:
            self._refuse("other_half", "null, as the export is here", other)
        if other == "dcp" and (manifest.dcp or manifest.hf is None):
            self._refuse("other_half", "null, as the DCP half is here", other)
        if manifest.hf is not None and not manifest.hf.subdir and other != "dcp":
            self._refuse("the directory of the export", "one plain name", "")

    def _whole_files(self, value: Any) -> dict[str, WholeFile]:
        found = {}
        for name, entry in self._named(value, "files"):
            nbytes, digest = self._list(entry, f"the entry of {name}", length=2)
            found[name] = WholeFile(
                name,
                self._count(nbytes, f"the size of {name}"),
                self._digest(digest, f"the digest of {name}"),
            )
        return found

    def _dcp_files(self, value: Any) -> dict[str, DCPFile]:
        found = {}
        for name, entry in self._named(value, "dcp"):
            fields = self._object(entry, name, {"nbytes", "ranges", "rest"})
            nbytes = self._count(fields["nbytes"], f"the size of {name}")
            reached, ranges = 0, []
            for one in self._list(fields["ranges"], f"the ranges of {name}"):
                start, length, digest = self._list(one, f"a range of {name}", length=3)
                start = self._count(start, f"a start in {name}", below=nbytes + 1)
                length = self._count(length, f"a length in {name}", below=nbytes - start + 1)
                if start < reached:
                    self._refuse(f"the ranges of {name}", "ascending and apart", start)
                reached = start + length
                ranges.append((start, length, self._digest(digest, f"a digest of {name}")))
            rest = self._digest(fields["rest"], f"the digest of the rest of {name}")
            found[name] = DCPFile(name, nbytes, tuple(ranges), rest)
        return found

    def _export(self, value: Any, where: str) -> ManifestExport:
        fields = self._object(value, where, {"subdir", "tied", "files"})
        subdir = self._text(fields["subdir"], "the directory of the export")
        if subdir and (not is_relative_name(subdir) or "/" in subdir):
            self._refuse("the directory of the export", "one plain name", subdir)
        tied = {
            self._text(drop, "a tied name"): self._text(keep, "what a name is tied to")
            for drop, keep in self._object(fields["tied"], "tied").items()
        }
        entries = self._named(fields["files"], "the files of the export")
        files = {name: self._file(name, entry) for name, entry in entries}
        seen: set[str] = set()
        for file in files.values():
            if not seen.isdisjoint(file.tensors):
                self._refuse("a key of the export", "in one file", min(seen & {*file.tensors}))
            seen |= file.tensors.keys()
        return ManifestExport(subdir, tied, files)

    def _file(self, name: str, value: Any) -> ManifestFile:
        fields = self._object(value, name, {"nbytes", "header_nbytes", "header", "tensors"})
        nbytes = self._count(fields["nbytes"], f"the size of {name}")
        start = self._count(fields["header_nbytes"], f"the header of {name}", below=nbytes + 1)
        header = self._digest(fields["header"], f"the digest of the header of {name}")
        tensors, reached = {}, start
        for key, entry in self._object(fields["tensors"], f"the tensors of {name}").items():
            tensor = self._tensor(key, entry)
            if tensor.start != reached:
                self._refuse(f"the start of {shortened(key)}", f"{reached}", tensor.start)
            reached += tensor.nbytes
            if reached > nbytes:
                self._refuse(f"the end of {shortened(key)}", f"at most {nbytes}", reached)
            tensors[key] = tensor
        if reached != nbytes:
            self._refuse(f"the end of the tensors of {name}", f"{nbytes}", reached)
        return ManifestFile(name, nbytes, start, header, tensors)

    def _tensor(self, key: str, value: Any) -> ManifestTensor:
        where = f"tensor {shortened(key)}"
        if not key or not is_text(key):
            self._refuse("the name of a tensor", "text that is not empty", key)
        start, dtype, shape, blocks = self._list(value, where, length=4)
        start = self._count(start, f"the start of {where}")
        if not isinstance(dtype, str) or dtype not in ITEMSIZE:
            self._refuse(f"the dtype of {where}", "a dtype of safetensors", dtype)
        shape = self._counts(shape, f"the shape of {where}")
        if math.prod(n for n in shape if n) * ITEMSIZE[dtype] >= 1 << 63:
            self._refuse(f"the shape of {where}", "of fewer elements, below 2^63 bytes", shape)
        at = f"a block of {where}"
        found = tuple(
            self._block(one, at, shape, itemsize=ITEMSIZE[dtype], tensor_start=start)
            for one in self._list(blocks, f"the blocks of {where}")
        )
        return ManifestTensor(key, start, dtype, shape, found)

    def _block(
        self, value: Any, at: str, shape: Shape, *, itemsize: int, tensor_start: int
    ) -> StoredBlock:
        rank, offsets, extent, digest = self._list(value, at, length=4)
        rank, digest = self._rank(rank, at), self._digest(digest, at)
        try:
            place = self._places.find(offsets, extent, shape, itemsize)
        except ValueError as error:
            self._refuse(at, str(error), value)
        runs = place.runs
        if runs is not None:
            runs = ByteRuns(tensor_start + runs.start, runs.nbytes, runs.loops)
        return StoredBlock(rank, place.offsets, place.extent, digest, runs)

    def _seconds(self, value: Any) -> dict[str, float]:
        fields = self._object(value, "timings", {"coordinator", "ranks"})
        return self._phases(self._object(fields["coordinator"], "the timings of the coordinator"))

    def _rank_seconds(self, value: Any) -> Iterator[tuple[int, str, dict[str, float]]]:
        fields = self._object(value, "timings", {"coordinator", "ranks"})
        for timing in self._list(fields["ranks"], "the timings of ranks"):
            phases = dict(self._object(timing, "the timings of a rank"))
            rank = self._rank(phases.pop("rank", None), "the timings of a rank")
            host = self._text(phases.pop("host", None), "the host of a rank")
            yield rank, host, self._phases(phases)

    def _phases(self, value: Mapping[str, Any]) -> dict[str, float]:
        for phase, seconds in value.items():
            if type(seconds) not in (int, float) or not 0 <= seconds < float("inf"):
                self._refuse(f"the time of {shortened(phase)}", "a number of seconds >= 0", seconds)
        return dict(value)

    def _check_names(self, manifest: Manifest) -> None:
        names = [*manifest.files, *manifest.dcp]
        if manifest.hf is not None:
            names += map(manifest.hf.path_of, manifest.hf.files)
        seen = {MANIFEST_NAME}
        for name in names:
            if name in seen:
                self._refuse("the name of a file", "listed once", name)
            seen.add(name)

    # -- values -------------------------------------------------------------------------------

    def _named(self, value: Any, where: str) -> Iterator[tuple[str, Any]]:
        for name, entry in self._object(value, where).items():
            if not is_relative_name(name):
                self._refuse("the name of a file", "a relative path within the checkpoint", name)
            yield name, entry

    def _object(
        self, value: Any, where: str, fields: Iterable[str] | None = None
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(where, "an object", value)
        if fields is not None and value.keys() != set(fields):
            differing = sorted(value.keys() ^ set(fields))
            self._refuse(f"the fields of {where}", "those of this version", differing)
        return value

    def _list(self, value: Any, where: str, *, length: int | None = None) -> list[Any]:
        if not isinstance(value, list) or length not in (None, len(value)):
            self._refuse(where, "a list" if length is None else f"a list of {length}", value)
        return value

    def _count(self, value: Any, where: str, *, below: int = 1 << 63) -> int:
        if not is_count(value, below=below):
            self._refuse(where, f"a count below {below}", value)
        return int(value)

    def _counts(self, value: Any, where: str) -> Shape:
        if len(self._list(value, where)) > _MAX_DIMS:
            self._refuse(where, f"at most {_MAX_DIMS} dimensions", value)
        return tuple(self._count(n, where) for n in value)

    def _rank(self, value: Any, where: str) -> int:
        return self._count(value, f"the rank in {where}", below=self._world_size)

    def _text(self, value: Any, where: str) -> str:
        if not is_text(value):
            self._refuse(where, "text", value)
        return str(value)

    def _digest(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or _DIGEST.fullmatch(value) is None:
            self._refuse(where, "16 hexadecimal digits", value)
        return value

    def _optional(self, value: Any, where: str, parse: Callable[[Any, str], Any]) -> Any:
        return None if value is None else parse(value, where)

    def _refuse(
        self, where: str, expected: str, found: object, *, hint: str | None = None
    ) -> NoReturn:
        msg = "the manifest holds an invalid value"
        raise CorruptCheckpointError(
            msg,
            phase="read",
            path=self._path,
            expected=f"{where} to be {expected}",
            found=shortened(found),
            hint=hint,
        )
