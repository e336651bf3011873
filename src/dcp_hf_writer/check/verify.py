"""verify: check whether a stored checkpoint is complete and undamaged."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dcp_hf_writer.check.check_dcp import dcp_problems, fqn_at, items_by_file
from dcp_hf_writer.check.check_hf import DirectoryCheck, export_problems
from dcp_hf_writer.check.verify_progress import progress_of
from dcp_hf_writer.digests.problems import Problem, first_of
from dcp_hf_writer.digests.recompute import Recomputation, jobs_of
from dcp_hf_writer.digests.stored_digests import StoredDigests
from dcp_hf_writer.errors import CheckpointError, CorruptCheckpointError, ReadError
from dcp_hf_writer.formats.names_on_disk import (
    DCP_SUFFIX,
    DIGESTS_DIRECTORY,
    INDEX_NAME,
    INDEX_SUFFIX,
    MANIFEST_NAME,
    METADATA_NAME,
    SUFFIX,
)
from dcp_hf_writer.formats.parse_dcp_metadata import MAX_METADATA_NBYTES, parse_metadata
from dcp_hf_writer.load.halves_apart import check_same_save, open_half, open_other_half
from dcp_hf_writer.mapping.option_values import check_whole
from dcp_hf_writer.plan.parse_manifest import MAX_MANIFEST_NBYTES, parse_manifest
from dcp_hf_writer.storage.open_directory import open_directory
from dcp_hf_writer.storage.wrong_paths import hint_for, wrong_path_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch.distributed.checkpoint.metadata import Metadata

    from dcp_hf_writer.check.check_dcp import Item
    from dcp_hf_writer.plan.manifest import Manifest
    from dcp_hf_writer.storage.input_contract import InputFiles

_SHOWN = 20
"""Maximum number of problems, and of warnings, in the text of a report."""
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of `verify`. `str()` of it is for people; `ok` and `problems` are for programs."""

    path: str
    """Path of the checkpoint."""
    checked: Literal["digests", "structure", "nothing"]
    """What was checked.

    `"digests"`: every byte, against the digests of the manifest. `"structure"`: only the sizes and
    places in headers, index and metadata, because there is no readable manifest. `"nothing"`: no
    checkpoint was found.
    """
    problems: tuple[Problem, ...]
    """Faults that make the checkpoint unfit to load; empty if it is fit."""
    warnings: tuple[Problem, ...] = ()
    """Oddities that change nothing for a reader."""
    file_count: int = 0
    """Number of files in the checkpoint."""
    tensor_count: int = 0
    """Number of tensors in safetensors files."""
    digest_count: int = 0
    """Number of digests recomputed and compared."""
    nbytes: int = 0
    """Number of bytes read to recompute digests."""
    seconds: float = 0.0
    """Duration of the check."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems

    def raise_if_bad(self) -> None:
        """Raise if a problem was found.

        Raises:
            CorruptCheckpointError: If there is a problem. It shows the first problem, and how many
                others there are.
        """
        if not self.problems:
            return
        first = self.problems[0]
        raise CorruptCheckpointError(
            "the checkpoint is damaged or incomplete",
            phase="read",
            path=f"{self.path}/{first.file}" if first.file else self.path,
            key=first.key,
            fqn=first.fqn,
            found=first_of(self.problems),
            hint="verify(path) lists all problems",
        )

    def __str__(self) -> str:
        count = len(self.problems)
        verdict = "ok" if self.ok else f"{count} problem{'s' if count > 1 else ''}"
        lines = [f"{self.path}: {verdict}; {self._extent()}"]
        lines += _listed("", self.problems)
        lines += _listed("warning: ", self.warnings)
        return "\n".join(lines)

    def _extent(self) -> str:
        text = f"{self.file_count} files, {self.tensor_count} tensors in safetensors files, "
        if self.checked == "digests":
            rate = self.nbytes / _MIB / max(self.seconds, 1e-6)
            text += (
                f"{self.digest_count} digests of {self.nbytes / _MIB:.1f} MiB compared "
                f"({rate:.0f} MiB/s), "
            )
        elif self.checked == "structure":
            text += "structure only: no digests to compare, "
        return f"{text}{self.seconds:.1f} s"


def _listed(prefix: str, problems: Sequence[Problem]) -> list[str]:
    lines = [f"  {prefix}{problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  {prefix}... and {len(problems) - _SHOWN} more")
    return lines


def verify(
    path: str | os.PathLike[str],
    *,
    progress: bool | Callable[[int, int], None] | None = None,
    threads: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Check a stored checkpoint: in full if it has a manifest, otherwise only its structure.

    With a manifest, `verify` reads every byte and recomputes every digest of the manifest. If the
    export lies apart from the DCP half, the path of the DCP half checks both. Each
    byte of each tensor must be in exactly one block. Sizes, names, headers, index and DCP metadata
    must agree with the manifest and with each other, and the manifest must list every file. Without
    a manifest (a plain DCP checkpoint, or a HuggingFace directory), `verify` checks how the files,
    headers, index and metadata fit together, but not the tensor data.

    `verify` runs no code from the checkpoint. It opens no file outside the checkpoint, except the
    blobs that the snapshots of a HuggingFace cache link to. Its memory holds the manifest and the
    metadata as objects, and 4 MiB per thread, or 32 MiB per thread for a URL.

    Args:
        path: Directory of the checkpoint, or an fsspec URL.
        progress: `True` shows a line on stderr, `False` does not, and `None` does if stderr is a
            terminal. A callable gets the bytes done and the total bytes, in the calling thread.
        threads: Number of files, or parts of files, to read at the same time. `None` means one per
            CPU, but no more than suits the storage.
        storage_options: Options for an fsspec URL.

    Returns:
        A report. It lists the problems of the checkpoint, also that there is no checkpoint.

    Raises:
        ConfigError: If an argument is invalid.
    """
    began = time.monotonic()
    check = _Check(_files_of(path, storage_options), os.fspath(path))
    if threads is not None:
        check_whole("threads", threads, least=1)
    threads = threads or min(os.cpu_count() or 1, check.files.readers)
    shown = progress_of(progress, "verify")
    check.run(shown, threads)
    other = check.export_apart(storage_options)
    if other is not None:
        other.run(shown, threads)
        check.add(other)
    return check.report(time.monotonic() - began)


def _files_of(
    path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None
) -> InputFiles:
    try:
        return open_half(path, storage_options)
    except (ReadError, CorruptCheckpointError):
        # Of a local path with options, the manifest is damaged: the report is to say so.
        return open_directory(path)


class _Check:
    """One run of `verify`: the files, what manifest and metadata say of them, and the problems."""

    def __init__(self, files: InputFiles, given: str) -> None:
        self.files = files
        self._given = given
        self._sizes: dict[str, int] = {}
        self._manifest: Manifest | None = None
        self._metadata: Metadata | None = None
        self._items: dict[str, list[Item]] = {}
        self._checked: Literal["digests", "structure", "nothing"] = "nothing"
        self._problems: list[Problem] = []
        self._warnings: list[Problem] = []
        self._tensor_count = self._digest_count = self._nbytes = 0

    def run(self, progress: Callable[[int, int], None], threads: int) -> None:
        try:
            with wrong_path_errors(self.files.path, self._given):
                self._sizes = self.files.tree()
        except CheckpointError as error:
            self._problems.append(Problem.of(error, ""))
            return
        self._read_manifest()
        self._read_metadata()
        directories = self._check_exports()
        if self._manifest is not None:
            self._checked = "digests"
            self._check_listing(self._manifest)
            self._recompute(self._manifest, progress, threads)
        elif directories or self._metadata is not None or self._problems:
            self._checked = "structure"
        else:
            what = "there is no checkpoint here"
            expected = f"{MANIFEST_NAME}, {METADATA_NAME} or *{SUFFIX}"
            hint = hint_for(self.files.path, self._given)
            self._problems.append(Problem(file="", what=what, expected=expected, hint=hint))

    def export_apart(self, storage_options: Mapping[str, Any] | None) -> _Check | None:
        """Return the check of the export if it lies apart; `None` if the manifest names none."""
        manifest = self._manifest
        if manifest is None or manifest.other_half is None or manifest.is_export_alone:
            return None
        files = open_other_half(manifest.other_half, storage_options)
        return _Check(files, files.path)

    def add(self, other: _Check) -> None:
        """Add the results of the check of the export, which lies apart."""
        place = other.files.path
        if self._manifest is not None:
            try:
                check_same_save(self._manifest, other._manifest, path=place)
            except CheckpointError as error:
                self._problems.append(Problem.of(error, place))
        self._problems += [problem.below(place) for problem in other._problems]
        self._warnings += [warning.below(place) for warning in other._warnings]
        self._sizes |= {f"{place}/{name}": nbytes for name, nbytes in other._sizes.items()}
        self._tensor_count += other._tensor_count
        self._digest_count += other._digest_count
        self._nbytes += other._nbytes

    def report(self, seconds: float) -> VerifyReport:
        return VerifyReport(
            path=self.files.path,
            checked=self._checked,
            problems=tuple(self._problems),
            warnings=tuple(self._warnings),
            file_count=len(self._sizes),
            tensor_count=self._tensor_count,
            digest_count=self._digest_count,
            nbytes=self._nbytes,
            seconds=seconds,
        )

    def _read_manifest(self) -> None:
        if MANIFEST_NAME not in self._sizes:
            return
        try:
            data = self.files.read_whole(MANIFEST_NAME, max_nbytes=MAX_MANIFEST_NBYTES)
            self._manifest = parse_manifest(data, path=f"{self.files.path}/{MANIFEST_NAME}")
        except CheckpointError as error:
            self._problems.append(Problem.of(error, MANIFEST_NAME))

    def _read_metadata(self) -> None:
        if METADATA_NAME not in self._sizes:
            manifest = self._manifest
            has_dcp = manifest is not None and not manifest.is_export_alone
            if manifest is not None and has_dcp and METADATA_NAME not in manifest.files:
                what = "the checkpoint has no DCP metadata"
                self._problems.append(Problem(file=METADATA_NAME, what=what))
            return
        try:
            data = self.files.read_whole(METADATA_NAME, max_nbytes=MAX_METADATA_NBYTES)
            self._metadata = parse_metadata(data, path=f"{self.files.path}/{METADATA_NAME}")
        except CheckpointError as error:
            self._problems.append(Problem.of(error, METADATA_NAME))
            return
        self._items = items_by_file(self._metadata)
        self._problems += dcp_problems(self._metadata, self._sizes)

    def _check_exports(self) -> list[str]:
        """Check every HuggingFace directory; return their paths within the checkpoint."""
        found = self._export_directories()
        for name in found:
            below = f"{name}/" if name else ""
            sizes = {
                n[len(below) :]: size for n, size in self._sizes.items() if n.startswith(below)
            }
            directory = DirectoryCheck(self.files.below(name) if name else self.files, sizes)
            problems = directory.problems
            if self._manifest is not None and self._manifest.hf is not None:
                fqns = frozenset(self._metadata.state_dict_metadata if self._metadata else ())
                problems += export_problems(self._manifest.hf, directory, fqns)
            self._problems += [problem.below(name) for problem in problems]
            self._warnings += [warning.below(name) for warning in directory.warnings]
            self._tensor_count += directory.tensor_count
        return found

    def _export_directories(self) -> list[str]:
        if self._manifest is not None:
            return [] if self._manifest.hf is None else [self._manifest.hf.subdir]
        is_ours = {MANIFEST_NAME, METADATA_NAME} & self._sizes.keys()
        directories = {
            os.path.dirname(name)
            for name in self._sizes
            if name.endswith(SUFFIX) or os.path.basename(name) == INDEX_NAME
        }
        directories.discard(DIGESTS_DIRECTORY)
        return sorted(n for n in directories if not n or (is_ours and "/" not in n))

    def _note_files_of_others(self, manifest: Manifest, names: Collection[str]) -> None:
        """Warn of files that no save made; trainers keep files of their own beside a checkpoint.

        Weights in the export are a problem, because readers may load them. So are DCP files, which
        an older save may have left.
        """
        export = None if manifest.hf is None else manifest.hf.path_of("")
        expected = f"only what {MANIFEST_NAME} lists"
        others = set()
        for name in sorted(names):
            is_in_export = export is not None and name.startswith(export)
            is_dcp_file = "/" not in name and name.endswith(DCP_SUFFIX)
            if is_dcp_file or (is_in_export and name.endswith((SUFFIX, INDEX_SUFFIX))):
                what = "the file does not belong to the checkpoint"
                self._problems.append(Problem(file=name, what=what, expected=expected))
            else:
                others.add(name if is_in_export else name.partition("/")[0])
        for name in sorted(others):
            kind = "file" if name in names else "directory"
            what = f"the {kind} does not belong to the checkpoint"
            self._warnings.append(Problem(file=name, what=what, expected=expected))

    def _check_listing(self, manifest: Manifest) -> None:
        listed = manifest.sizes()
        for name in sorted(listed.keys() - self._sizes.keys()):
            self._problems.append(Problem(file=name, what="the file is missing"))
        self._note_files_of_others(manifest, self._sizes.keys() - listed.keys() - {MANIFEST_NAME})
        for name in sorted(listed.keys() & self._sizes.keys()):
            if self._sizes[name] != listed[name]:
                self._problems.append(
                    Problem(
                        file=name,
                        what="the file has the wrong size",
                        expected=f"{listed[name]} bytes",
                        found=f"{self._sizes[name]} bytes",
                    )
                )
        if manifest.export_error is not None:
            what = "the HuggingFace export failed when the checkpoint was saved"
            self._warnings.append(Problem(file="", what=what, found=manifest.export_error))

    def _recompute(
        self, manifest: Manifest, progress: Callable[[int, int], None], threads: int
    ) -> None:
        unread: set[str] = set()

        def note(name: str, error: CheckpointError) -> None:
            if name in self._sizes and name not in unread:
                self._problems.append(Problem.of(error, name))
            unread.add(name)

        digests = StoredDigests(self.files, manifest, on_error=note)
        found = list(jobs_of(self.files, manifest, digests))
        jobs = [job for job in found if job.file in self._sizes and job.file not in unread]
        work = Recomputation(self.files, jobs, threads=threads)
        problems = work.run(lambda: progress(work.done_nbytes, work.total_nbytes))
        progress(work.total_nbytes, work.total_nbytes)
        self._problems += self._with_fqns(problems)
        self._digest_count, self._nbytes = work.digest_count, work.done_nbytes

    def _with_fqns(self, problems: Sequence[Problem]) -> Iterator[Problem]:
        for problem in problems:
            items = self._items.get(problem.file)
            if items and problem.start is not None:
                yield replace(problem, fqn=fqn_at(items, problem.start))
            else:
                yield problem
