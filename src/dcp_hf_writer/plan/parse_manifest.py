"""Parse the manifest `dcp-hf.json`, which may be damaged or hostile.

Pure. `encode_manifest` is the reverse. The parser checks every field that it returns: types, ranges
and file names. It also checks that the tensors of an output file, and the ranges of a DCP file, fit
into the file. It does not check that the blocks of a tensor tile it: the callers that read the
bytes do.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

import xxhash

from dcp_hf_writer.errors import CorruptCheckpointError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.formats.strict_json import is_count, is_text, parse_json, shortened
from dcp_hf_writer.plan.encode_manifest import FORMAT_VERSION, OtherHalf, WholeFile
from dcp_hf_writer.plan.manifest import (
    Manifest,
    ManifestDCPFile,
    ManifestDigests,
    ManifestExport,
    ManifestFile,
    ManifestTensor,
    StoredBlock,
)
from dcp_hf_writer.plan.parse_manifest_blocks import Places
from dcp_hf_writer.plan.rank_report import DIGEST_NAME
from dcp_hf_writer.tensors.boxes import ByteRuns
from dcp_hf_writer.tensors.dtype_names import ITEMSIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from dcp_hf_writer.tensors.boxes import Shape


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
_VERSIONS = {1: _FIELDS, FORMAT_VERSION: _FIELDS | {"digests"}}
"""Fields of a manifest, by version. Version 1 holds all digests itself."""


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
        self._version = FORMAT_VERSION
        self._places = Places()

    def manifest(self, value: Any) -> Manifest:
        if not isinstance(value, dict):
            self._refuse("the manifest", "an object", value)
        if value.get("format") != "dcp-hf":
            self._refuse("format", '"dcp-hf"', value.get("format"))
        version = value.get("version")
        if type(version) is not int or version not in _VERSIONS:
            self._refuse(
                "version",
                f"at most {FORMAT_VERSION}",
                version,
                hint="another version of this package wrote it; read it with that version",
            )
        self._version = version
        # Only a checkpoint whose halves lie apart has it.
        other = value.pop("other_half", None)
        fields = self._object(value, "the manifest", _VERSIONS[version])
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
            digests=tuple(self._digests_files(fields.get("digests", {}))),
        )
        self._check_digests_files(manifest)
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

    def _dcp_files(self, value: Any) -> dict[str, ManifestDCPFile]:
        own = {"ranges"} if self._version == 1 else {"rank"}
        found = {}
        for name, entry in self._named(value, "dcp"):
            fields = self._object(entry, name, {"nbytes", "rest"} | own)
            nbytes = self._count(fields["nbytes"], f"the size of {name}")
            rest = self._digest(fields["rest"], f"the digest of the rest of {name}")
            ranges, rank = None, 0
            if self._version == 1:
                ranges = self._ranges(fields["ranges"], name, nbytes)
            else:
                rank = self._rank(fields["rank"], name)
            found[name] = ManifestDCPFile(name, nbytes, rest, rank, ranges)
        return found

    def _ranges(self, value: Any, name: str, nbytes: int) -> tuple[tuple[int, int, str], ...]:
        reached, ranges = 0, []
        for one in self._list(value, f"the ranges of {name}"):
            start, length, digest = self._list(one, f"a range of {name}", length=3)
            start = self._count(start, f"a start in {name}", below=nbytes + 1)
            length = self._count(length, f"a length in {name}", below=nbytes - start + 1)
            if start < reached:
                self._refuse(f"the ranges of {name}", "ascending and apart", start)
            reached = start + length
            ranges.append((start, length, self._digest(digest, f"a digest of {name}")))
        return tuple(ranges)

    def _digests_files(self, value: Any) -> Iterator[ManifestDigests]:
        names = {"rank", "nbytes", "digest", "hf_files", "hf_nbytes"}
        for name, entry in self._named(value, "digests"):
            fields = self._object(entry, name, names)
            files = self._optional(fields["hf_files"], f"the files of {name}", self._counts)
            if files is not None and (len(files) != 2 or files[0] > files[1]):  # noqa: PLR2004
                self._refuse(f"the files of {name}", "a first and a last number", files)
            yield ManifestDigests(
                name,
                self._rank(fields["rank"], name),
                self._count(fields["nbytes"], f"the size of {name}"),
                self._digest(fields["digest"], f"the digest of {name}"),
                None if files is None else (files[0], files[1]),
                self._count(fields["hf_nbytes"], f"the bytes of {name}"),
            )

    def _check_digests_files(self, manifest: Manifest) -> None:
        """Check that each rank has one digests file, and that it is in the right files."""
        ranks = [file.rank for file in manifest.digests]
        if len(set(ranks)) < len(ranks):
            self._refuse("the ranks of the digests files", "listed once", sorted(ranks)[:20])
        most = 0 if manifest.hf is None else len(manifest.hf.files)
        for file in manifest.digests:
            if file.hf_files is not None and file.hf_files[1] >= most:
                self._refuse(f"the files of {file.name}", f"below {most}", file.hf_files)
        if self._version == 1:
            return
        for name, dcp in manifest.dcp.items():
            if dcp.rank not in ranks:
                self._refuse(f"the rank of {name}", "one with a digests file", dcp.rank)

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
            keys = {*(file.tensors or ())}
            if not seen.isdisjoint(keys):
                self._refuse("a key of the export", "in one file", min(seen & keys))
            seen |= keys
        return ManifestExport(subdir, tied, files)

    def _file(self, name: str, value: Any) -> ManifestFile:
        own = {"tensors"} if self._version == 1 else set[str]()
        fields = self._object(value, name, {"nbytes", "header_nbytes", "header"} | own)
        nbytes = self._count(fields["nbytes"], f"the size of {name}")
        start = self._count(fields["header_nbytes"], f"the header of {name}", below=nbytes + 1)
        header = self._digest(fields["header"], f"the digest of the header of {name}")
        tensors = None if not own else self._tensors(fields["tensors"], name, start, nbytes)
        return ManifestFile(name, nbytes, start, header, tensors)

    def _tensors(self, value: Any, name: str, start: int, nbytes: int) -> dict[str, ManifestTensor]:
        tensors, reached = {}, start
        for key, entry in self._object(value, f"the tensors of {name}").items():
            tensor = self._tensor(key, entry)
            if tensor.start != reached:
                self._refuse(f"the start of {shortened(key)}", f"{reached}", tensor.start)
            reached += tensor.nbytes
            if reached > nbytes:
                self._refuse(f"the end of {shortened(key)}", f"at most {nbytes}", reached)
            tensors[key] = tensor
        if reached != nbytes:
            self._refuse(f"the end of the tensors of {name}", f"{nbytes}", reached)
        return tensors

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
        names = [*manifest.files, *manifest.dcp, *(file.name for file in manifest.digests)]
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
