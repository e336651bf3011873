"""What the coordinator does before and after the ranks write: make the files, publish them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import time
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from dcp_hf_writer.errors import (
    CommitError,
    CoverageError,
    ExportError,
    LayoutError,
    WriteError,
)
from dcp_hf_writer.failpoints import reach
from dcp_hf_writer.formats.names_on_disk import (
    CONFIG_NAME,
    DIGESTS_DIRECTORY,
    INDEX_NAME,
    MANIFEST_NAME,
    path_in_export,
)
from dcp_hf_writer.formats.weights_once_places import NOTICE
from dcp_hf_writer.plan.coverage import check_coverage
from dcp_hf_writer.plan.encode_manifest import WholeFile, encode_manifest
from dcp_hf_writer.said_once import SAID_ONCE, SaidOnce
from dcp_hf_writer.save.dcp_half import digest_file
from dcp_hf_writer.save.export_failures import export_error, nbytes_of
from dcp_hf_writer.save.model_assets import CHECKSUMS_NAME
from dcp_hf_writer.save.owner_process import Owner
from dcp_hf_writer.save.save_log import step_of
from dcp_hf_writer.save.tensor_bytes import digest_of
from dcp_hf_writer.save.write_strategy import choose_strategy
from dcp_hf_writer.storage.posix_outputs import (
    OutputFile,
    file_system_type,
    free_bytes,
    make_directories,
    sync_directory,
    write_errors,
    write_file,
)
from dcp_hf_writer.storage.posix_trees import remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.storage import WriteResult

    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.plan.global_plan import GlobalPlan
    from dcp_hf_writer.plan.layout import Layout
    from dcp_hf_writer.plan.rank_report import RankReport
    from dcp_hf_writer.save.attempt import Attempt
    from dcp_hf_writer.save.commit import StagingDirectory
    from dcp_hf_writer.save.export_assets import Assets
    from dcp_hf_writer.save.save_target import Publication
    from dcp_hf_writer.save.write_strategy import Strategy
    from dcp_hf_writer.storage.output_fsync import OpenFiles

_log = logging.getLogger(__name__)


def export_files(
    layout: Layout | None, assets: Assets | None, export: HFExport | None
) -> frozenset[str]:
    """Return the files that a save makes for the export, by path within the checkpoint.

    Raises:
        LayoutError: If an asset has the name of a file that the export makes itself; the error
            names the file.
    """
    if layout is None or assets is None or export is None:
        return frozenset()
    made = {file.name for file in layout.files} | {INDEX_NAME}
    if export.checksums is not None:
        made.add(CHECKSUMS_NAME)
    taken = made & assets.files.keys()
    if taken:
        msg = "an asset has the name of a file that the export makes itself"
        raise LayoutError(msg, phase="plan", path=min(taken), hint="leave it out of assets")
    if layout.index is None:
        made.remove(INDEX_NAME)
    return frozenset(
        path_in_export(export.place_subdir, name) for name in made | assets.files.keys()
    )


def make_export(
    directory: StagingDirectory,
    plan: GlobalPlan,
    assets: Assets | None,
    attempt: Attempt,
    *,
    strategy: Strategy,
    subdir: str,
    host_budget_bytes: int,
) -> bool:
    """Make the files of the export, and choose how the ranks write them.

    Returns:
        `False` if the files cannot be made: the checkpoint then has no export. `True` if they were
        made, or if no export was planned.

    Raises:
        IncoherentStorageError: If several hosts may not write one file here.
        CommitError: If the files cannot be made and what was made cannot be removed.
    """
    if plan.layout is None or assets is None:
        return True
    files = attempt.open_files()
    chosen = choose_strategy(
        hosts=plan.hosts,
        fs_type=file_system_type(directory.path),
        strategy=strategy,
        path=attempt.target,
        nbytes=nbytes_of(plan.layout),
        host_budget_bytes=host_budget_bytes,
    )
    is_exchange = chosen.name == "exchange"
    level = logging.DEBUG if len(set(plan.hosts)) == 1 and not is_exchange else logging.INFO
    _log.log(level, "strategy %s for %s: %s", chosen.name, attempt.target, chosen.why)
    try:
        whole = prepare_export(
            directory, plan.layout, assets, files, subdir=subdir, with_headers=not is_exchange
        )
        attempt.add_whole_files(*whole)
    except WriteError as error:
        path = os.path.join(directory.path, subdir)
        files.discard_below(path)
        drop_export(directory, subdir)
        nbytes = nbytes_of(plan.layout) + sum(map(len, assets.files.values()))
        attempt.leave_out_export(export_error(error, rank=attempt.rank, path=path, nbytes=nbytes))
        return False
    attempt.exchange_cells(chosen.cell_nbytes)
    return True


def prepare_export(
    directory: StagingDirectory,
    layout: Layout,
    assets: Assets,
    files: OpenFiles,
    *,
    subdir: str,
    with_headers: bool = True,
    said: SaidOnce = SAID_ONCE,
) -> list[WholeFile]:
    """Make the output files with headers, the index and the assets; then the ranks may write.

    Args:
        directory: Directory of the save.
        layout: The export.
        assets: Its other files.
        files: Keeps the output files open.
        subdir: Directory of the export within the checkpoint.
        with_headers: Whether to write the headers. In an exchange, the owner of the first cell
            writes the header, because no other rank may write there.
        said: What this process has said about exports.

    Returns:
        The index and the assets, which are complete.

    Raises:
        WriteError: If the file system refuses an operation, or has no space.
    """
    _check_space(layout, directory)
    fs_type = file_system_type(directory.path)
    export = os.path.join(directory.path, subdir)
    if subdir:
        with write_errors(export):
            os.mkdir(export)
    for file in layout.files:
        output = files.keep(OutputFile(os.path.join(export, file.name), create=True))
        output.set_size(file.nbytes, fs_type=fs_type)
        if with_headers:
            output.write(memoryview(file.header), 0)
    whole = dict(assets.files)
    if layout.index is not None:
        whole[INDEX_NAME] = layout.index
    warn_without_config(whole, said)
    reach("headers written")
    return [_write_whole(files, directory.path, subdir, n, d) for n, d in whole.items()]


def _write_whole(files: OpenFiles, root: str, subdir: str, name: str, data: bytes) -> WholeFile:
    path = os.path.join(root, subdir, name)
    make_directories(os.path.dirname(path))
    file = files.keep(OutputFile(path, create=True))
    file.write(memoryview(data), 0)
    files.sync(files.take(path) or file)
    return WholeFile(path_in_export(subdir, name), len(data), digest_of(data))


def _check_space(layout: Layout, directory: StagingDirectory) -> None:
    # Only an early check: `set_size` reserves the space where the file system can.
    needed = nbytes_of(layout)
    free = free_bytes(directory.path)
    if free is not None and free < needed:
        msg = "there is not enough space for the export"
        raise WriteError(
            msg,
            phase="plan",
            path=directory.target,
            expected=f"{needed} bytes free",
            found=f"{free} bytes free",
            errno=errno.ENOSPC,
            hint="free space on the device, or remove old checkpoints",
        )


def warn_without_config(names: Mapping[str, bytes], said: SaidOnce = SAID_ONCE) -> None:
    """Warn once if an export has no `config.json` among its files."""
    if CONFIG_NAME in names:
        return
    said.warn(
        _log,
        "the export has no config.json, so transformers cannot load it as a model; pass "
        "HFExport(assets=(model.config, tokenizer)) or HFExport(like=<base model directory>)",
    )


def nbytes_on_disk(target: str, subdir: str) -> tuple[int, int]:
    """Return the bytes of both halves of a checkpoint, from the sizes of their data files.

    Raises:
        OSError: If the checkpoint cannot be listed.
    """
    export = os.path.join(target, subdir)
    halves = (target, ".distcp"), (export, ".safetensors")
    found = []
    for path, suffix in halves:
        with os.scandir(path) if os.path.isdir(path) else contextlib.nullcontext(()) as entries:
            found.append(sum(e.stat().st_size for e in entries if e.name.endswith(suffix)))
    return found[0], found[1]


def share_text(results: Iterable[Sequence[WriteResult]]) -> None:
    """Replace equal descriptors of weights stored once by one object; pickle then writes it once.

    Otherwise `.metadata` would repeat the file names and geometries that every rank sends.
    """
    known: dict[str, str] = {}
    for result in itertools.chain.from_iterable(results):
        info = result.storage_data
        if isinstance(info, _StorageInfo) and info.relative_path == NOTICE:
            texts = info.transform_descriptors or ()
            info.relative_path = NOTICE
            info.transform_descriptors = tuple(known.setdefault(one, one) for one in texts)


def check_files(
    directory: StagingDirectory,
    layout: Layout | None,
    reports: Sequence[RankReport],
    subdir: str,
) -> None:
    """Check that every file exists and has the planned or reported size.

    Raises:
        CoverageError: If a file does not; the error names it.
    """
    sizes = {file.name: file.nbytes for report in reports for file in report.dcp_files}
    sizes |= {one.digests.name: one.digests.nbytes for one in reports if one.digests is not None}
    for output in () if layout is None else layout.files:
        sizes[os.path.join(subdir, output.name)] = output.nbytes
    for name, nbytes in sizes.items():
        path = os.path.join(directory.path, name)
        try:
            found = f"{os.stat(path).st_size} bytes"
        except OSError as error:
            found = errno.errorcode.get(error.errno or 0, str(error))
        if found != f"{nbytes} bytes":
            msg = "a file of the checkpoint is missing or has the wrong size"
            raise CoverageError(
                msg, phase="finish", path=path, expected=f"{nbytes} bytes", found=found
            )


def check_written(metadata: Metadata, results: Iterable[Sequence[WriteResult]]) -> None:
    """Check that the ranks wrote everything that the planner's metadata lists.

    A planner may drop items after the local plans were checked. torch would then publish metadata
    of data that no file has.

    Args:
        metadata: The planner's metadata.
        results: Results of the DCP half, by rank.

    Raises:
        CoverageError: If an entry or a chunk was not written; names the first one.
    """
    written = {result.index for of_rank in results for result in of_rank}
    for fqn, entry in metadata.state_dict_metadata.items():
        places: list[torch.Size | None] = [None]
        if isinstance(entry, TensorStorageMetadata):
            places = [chunk.offsets for chunk in entry.chunks]
        for offsets in places:
            if MetadataIndex(fqn, offsets) not in written:
                raise CoverageError(
                    "no rank wrote a part that the planner's metadata lists",
                    phase="finish",
                    fqn=fqn,
                    expected="an item of a plan" + (f" at {list(offsets)}" if offsets else ""),
                    found="none",
                    hint="use a planner whose create_global_plan and finish_plan keep every item",
                )


def check_dcp_stands_alone(plan: GlobalPlan, error: ExportError) -> None:
    """Refuse to publish a DCP half whose weights are stored in the failed export.

    Raises:
        WriteError: If the plan stores weights once.
    """
    if plan.once:
        raise WriteError(
            "the export failed, and the weights are stored nowhere else",
            rank=error.rank,
            phase="finish",
            path=error.path,
            found=error.found,
            errno=error.errno,
            hint='nothing was published; with weights="both" the DCP half is saved even then',
        ) from error


def drop_export(directory: StagingDirectory, subdir: str) -> None:
    """Remove the failed export, so that the DCP half can be published alone.

    Raises:
        CommitError: If the export cannot be removed; then nothing may be published.
    """
    path = os.path.join(directory.path, subdir)
    remove_tree(path)
    if os.path.lexists(path):
        msg = "the failed export could not be removed, so nothing was published"
        raise CommitError(msg, phase="finish", path=path)


def publish(directory: StagingDirectory, attempt: Attempt, what: Publication) -> None:
    """Write the manifest, make all names durable, and give the checkpoint its name.

    Raises:
        CoverageError: If the reported blocks do not cover each file exactly once, or a file is
            missing or has the wrong size.
        StorageError: If the file system refuses an operation.
        SaveAbortedError: If the save was given up.
        SaveTimeoutError: If the deadline has passed.
    """
    reach("before manifest")
    if what.layout is not None:
        check_coverage(what.layout, what.reports)
    check_files(directory, what.layout, what.reports, what.subdir)
    covered = {file.name for report in what.reports for file in report.dcp_files}
    if what.layout is not None and not what.subdir:
        covered |= {file.name for file in what.layout.files}
        covered |= {file.name for file in what.whole_files(attempt)}
    others = [
        WholeFile(name, *digest_file(os.path.join(directory.path, name)))
        for name in _plain_files(directory.path)
        if name not in covered
    ]
    whole = [*what.whole_files(attempt), *others]
    manifest = manifest_of(attempt, what, whole, save_id=directory.save_id, target=directory.target)
    write_file(os.path.join(directory.path, MANIFEST_NAME), manifest)
    inner = (os.path.join(directory.path, name) for name in (what.subdir, DIGESTS_DIRECTORY))
    for path in (*(one for below in inner for one in _directories(below)), directory.path):
        sync_directory(path)
    reach("before rename")
    if what.half == "hf":
        attempt.check()
        directory.publish(overwrite=what.overwrite)
        return
    with attempt.committing():
        attempt.end_heartbeats()
        directory.publish(overwrite=what.overwrite)
        reach("after rename")


def manifest_of(
    attempt: Attempt, what: Publication, whole: Sequence[WholeFile], *, save_id: str, target: str
) -> bytes:
    """Return the manifest of what is published.

    Args:
        attempt: The save.
        what: What is published.
        whole: Files that the coordinator wrote whole.
        save_id: Id of the save.
        target: The checkpoint: a path, or a URL without credentials.
    """
    total_s = time.monotonic() - attempt.context.began
    return encode_manifest(
        save_id=save_id,
        target=target,
        owner=Owner.me().to_json(),
        step=step_of(attempt.target),
        subdir=what.subdir,
        layout=what.layout,
        once=sorted(what.plan.once),
        reports=what.reports,
        whole_files=whole,
        seconds={**attempt.seconds, "total": total_s, **what.seconds},
        export_error=None if what.error is None else str(what.error),
        other_half=what.other_half,
    )


def _plain_files(path: str) -> list[str]:
    """Return the names of the files at the top of the checkpoint, except the save's record."""
    with os.scandir(path) as entries:
        return sorted(
            e.name for e in entries if e.is_file() and not e.name.startswith(".dcp-hf-save")
        )


def _directories(root: str) -> list[str]:
    return [path for path, _, _ in os.walk(root, topdown=False)]
