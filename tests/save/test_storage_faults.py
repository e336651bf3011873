"""Errors of the storage at every step: what is committed, what every rank is told, what is left."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from dcp_hf_writer.errors import (
    CommitError,
    CoverageError,
    ExportError,
    StorageError,
    WriteError,
)
from dcp_hf_writer.save import coordinator, write_phase
from dcp_hf_writer.storage.posix_outputs import _RESERVES_SLOWLY, file_system_type
from support.faults import (
    ROOT,
    TIMEOUT_S,
    BadCall,
    Case,
    Episodes,
    InjectedFaultError,
    Outcome,
    Strike,
    check_episodes,
    check_outcomes,
    check_storage,
    hits,
    save,
)
from support.processes import in_fresh_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WORLD_SIZE = 2

pytestmark = pytest.mark.timeout(240)
ALWAYS = 10**6


def staging_of(root: Path) -> Path:
    """Return the one directory of a save in the making."""
    (found,) = root.glob(".incomplete-*")
    return found


def remove_staging(root: Path) -> None:
    staging = staging_of(root)
    while staging.exists():
        # The other rank may be making files there.
        shutil.rmtree(staging, ignore_errors=True)


def rename_staging(root: Path) -> None:
    staging_of(root).rename(root.parent / f"taken-from-{root.name}")


def remove_dcp_file(root: Path) -> None:
    (staging_of(root) / "__1_0.distcp").unlink()


def truncate_dcp_file(root: Path) -> None:
    os.truncate(staging_of(root) / "__1_0.distcp", 100)


def truncate_weights(root: Path) -> None:
    os.truncate(min((staging_of(root) / "hf").glob("*.safetensors")), 100)


def bad(rank: int, name: str, number: int, file: str, **more: Any) -> BadCall:
    return BadCall(rank=rank, name=name, errno=number, file=file, **more)


def dcp_half_fails(fault: BadCall) -> Case:
    return Case(
        fault=fault, kind=WriteError, words=(f"rank {fault.rank}", errno.errorcode[fault.errno])
    )


def export_fails(fault: BadCall) -> Case:
    words = (f"rank {fault.rank}", errno.errorcode[fault.errno], "/hf/")
    return Case(fault=fault, kind=ExportError, words=words, committed="dcp")


def export_is_left_out(fault: BadCall) -> Case:
    words = (f"rank {fault.rank}", errno.errorcode[fault.errno], "hf")
    return Case(fault=fault, kind=ExportError, words=words, committed="dcp")


def coordinator_fails(fault: BadCall, *, kind: type[BaseException] = WriteError) -> Case:
    return Case(fault=fault, kind=kind, words=(errno.errorcode[fault.errno],))


def struck(
    point: str, call: Callable[[Path], None], kind: type[BaseException], *words: str
) -> Case:
    return Case(fault=Strike(rank=0, point=point, action="call", call=call), kind=kind, words=words)


def succeeds(fault: BadCall, *, hits: int = 1, **more: Any) -> Case:
    return Case(fault=fault, kind=None, committed="both", hits=hits, **more)


DCP = "*.distcp"
WEIGHTS = "model-*.safetensors"

CASES: dict[str, Case] = {
    # The DCP half, on either rank: nothing is committed.
    **{
        f"{name} {DCP} {errno.errorcode[number]} rank {rank}": dcp_half_fails(
            bad(rank, name, number, DCP)
        )
        for rank, name, number in (
            (0, "pwritev", errno.ENOSPC),
            (1, "pwritev", errno.ENOSPC),
            (1, "pwritev", errno.EDQUOT),
            (1, "pwritev", errno.EFBIG),
            (0, "fsync", errno.EIO),
            (1, "fsync", errno.EIO),
            (1, "fsync", errno.ENOSPC),
            (1, "close", errno.EIO),
            (1, "close", errno.EDQUOT),
            (1, "open", errno.EMFILE),
        )
    },
    # The export, on either rank: the DCP half is committed without it.
    **{
        f"{name} {WEIGHTS} {errno.errorcode[number]} rank {rank} call {nth}": export_fails(
            bad(rank, name, number, WEIGHTS, nth=nth)
        )
        for rank, name, number, nth in (
            # The first writes of the coordinator are the headers; those are of the plan.
            (0, "pwrite", errno.ENOSPC, 4),
            (0, "pwrite", errno.EIO, 6),
            (1, "pwrite", errno.ENOSPC, 1),
            (1, "pwrite", errno.EDQUOT, 2),
            (1, "pwrite", errno.EIO, 5),
            (0, "fsync", errno.EIO, 1),
            (1, "fsync", errno.EIO, 1),
            (1, "fsync", errno.ENOSPC, 2),
            (1, "close", errno.EIO, 1),
            (1, "open", errno.EMFILE, 1),
        )
    },
    # What the coordinator does before the ranks write: nothing is committed.
    "mkdir of staging": coordinator_fails(bad(0, "mkdir", errno.ENOSPC, ".incomplete-*")),
    # What it makes ready of the export only: the DCP half is committed without it.
    "mkdir of hf": export_is_left_out(bad(0, "mkdir", errno.EDQUOT, "hf")),
    "pwrite of header": export_is_left_out(bad(0, "pwrite", errno.ENOSPC, WEIGHTS)),
    "pwrite of index": export_is_left_out(bad(0, "pwrite", errno.ENOSPC, "*.index.json")),
    "open of record": coordinator_fails(bad(0, "open", errno.EROFS, ".dcp-hf-save.json")),
    "pwrite of record": coordinator_fails(bad(0, "pwrite", errno.ENOSPC, ".dcp-hf-save.json")),
    "fsync of record": coordinator_fails(bad(0, "fsync", errno.EIO, ".dcp-hf-save.json")),
    # What it does after they wrote.
    "fsync of metadata": coordinator_fails(bad(0, "fsync", errno.EIO, ".metadata*")),
    "open of manifest": coordinator_fails(bad(0, "open", errno.ENOSPC, "dcp-hf.json")),
    "pwrite of manifest": coordinator_fails(bad(0, "pwrite", errno.EDQUOT, "dcp-hf.json")),
    "fsync of manifest": coordinator_fails(bad(0, "fsync", errno.EIO, "dcp-hf.json")),
    "fsync of staging": coordinator_fails(bad(0, "fsync", errno.EIO, ".incomplete-*")),
    "unlink of record": coordinator_fails(
        bad(0, "unlink", errno.EIO, ".dcp-hf-save.json"), kind=CommitError
    ),
    **{
        f"rename {errno.errorcode[number]}": coordinator_fails(
            bad(0, "renameat2", number, ".incomplete-*"), kind=CommitError
        )
        for number in (errno.EXDEV, errno.EIO, errno.EACCES)
    },
    # The rename is done and reports an error all the same, as network file systems may.
    **{
        f"rename done but {errno.errorcode[number]}": succeeds(
            bad(0, "renameat2", number, ".incomplete-*", outcome="done")
        )
        for number in (errno.ENOENT, errno.EIO)
    },
    "exchange done but EIO": succeeds(
        bad(0, "renameat2", errno.EIO, ".incomplete-*", outcome="done"), is_first_kept=True
    ),
    "fsync of parent": Case(
        fault=bad(0, "fsync", errno.EIO, ROOT),
        kind=CommitError,
        words=("EIO", "visible"),
        committed="both",
    ),
    # Calls that a file system may not offer.
    **{
        f"renameat2 {errno.errorcode[number]}": succeeds(
            bad(0, "renameat2", number, ".incomplete-*")
        )
        for number in (errno.EINVAL, errno.ENOSYS)
    },
    "exchange EINVAL": succeeds(
        bad(0, "renameat2", errno.EINVAL, "*", times=ALWAYS), hits=2, is_first_kept=True
    ),
    "exchange EIO": Case(
        fault=bad(0, "renameat2", errno.EIO, "*"),
        kind=CommitError,
        words=("EIO",),
        is_first_kept=True,
    ),
    # Less is written than was asked for; the rest follows at its place.
    "pwritev short": succeeds(bad(1, "pwritev", 0, DCP, outcome="short", times=ALWAYS)),
    "pwrite short": succeeds(bad(1, "pwrite", 0, "*", outcome="short", times=ALWAYS), hits=50),
    "pwrite of headers short": succeeds(
        bad(0, "pwrite", 0, "*", outcome="short", times=ALWAYS), hits=50
    ),
    # Somebody takes the directory away, or a part of it.
    # Depending on how far the other rank is, it finds no directory to open, or none to write to.
    "removed before slot": struck("before slot", remove_staging, StorageError, ".incomplete-"),
    "removed after fsync": struck("after fsync", remove_staging, StorageError, ".incomplete-"),
    "removed before manifest": struck("before manifest", remove_staging, CoverageError, "ENOENT"),
    "removed before rename": struck("before rename", remove_staging, CommitError, "ENOENT"),
    "renamed before rename": struck("before rename", rename_staging, CommitError, "ENOENT"),
    "dcp file removed": struck("before manifest", remove_dcp_file, CoverageError, "__1_0.distcp"),
    "dcp file cut": struck(
        "before manifest", truncate_dcp_file, CoverageError, "__1_0.distcp", "100"
    ),
    "weights cut": struck("before manifest", truncate_weights, CoverageError, "model-0", "100"),
}


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Episodes:
    return Episodes(tmp_path_factory.mktemp("faults"), CASES, WORLD_SIZE)


@pytest.mark.parametrize("name", CASES)
def test_all_of_i1_to_i8_hold_when_the_storage_fails(name: str, lives: Episodes) -> None:
    check_episodes(lives.root, name, CASES[name], lives.of(name))


# Threads of a writer


class FailsInAThread(DefaultSavePlanner):
    """Resolves no tensor for the helper threads of torch's writer, of which it loses the errors."""

    def __init__(self) -> None:
        super().__init__()
        self.is_struck = threading.Event()

    def resolve_data(self, write_item: Any) -> Any:
        if "_write_files_from_queue" in threading.current_thread().name:
            self.is_struck.set()
            msg = "injected in a thread"
            raise InjectedFaultError(msg)
        # The saving thread takes work from the same queue: it must leave some.
        assert self.is_struck.wait(10)
        return super().resolve_data(write_item)


def save_with_failing_threads(root: Path, check: str) -> tuple[Outcome, bool]:
    check_outcomes([save(root, "step-1", 1)], None)
    planner = FailsInAThread()
    given = FileSystemWriter(root / "unused", thread_count=4)
    if check == "off":
        # The rank's own check, and the coordinator's look at the planner's metadata.
        write_phase.check_results = lambda *_: None
        coordinator.check_written = lambda *_: None
    struck = save(root, "step-2", 2, planner=planner, dcp_writer=given)
    if check == "on":
        check_outcomes([save(root, "step-2", 3, dcp_writer=given)], None)
    return struck, planner.is_struck.is_set()


def test_nothing_is_committed_when_a_thread_of_a_given_writer_fails(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    struck, is_struck = in_fresh_process(save_with_failing_threads, root, "on")
    assert is_struck
    check_outcomes([struck], CoverageError, ("rank 0", "thread"))
    check_storage(root, {"step-1": 1, "step-2": 3})


def test_check_of_given_writers_is_what_keeps_a_lossy_one_from_committing(tmp_path: Path) -> None:
    """The control: with the rules switched off, torch commits what it lost."""
    root = tmp_path / "run"
    root.mkdir()
    struck, is_struck = in_fresh_process(save_with_failing_threads, root, "off")
    assert is_struck
    check_outcomes([struck], None)
    with pytest.raises((AssertionError, CheckpointException)):
        check_storage(root, {"step-1": 1, "step-2": 2})


# Calls that the kernel itself fails

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(["strace", "-qq", "true"], check=False, capture_output=True).returncode != 0,
    reason="`strace -qq true` fails here: it is missing, or may not trace",
)


@contextmanager
def injecting(rule: str, log: Path) -> Iterator[None]:
    """Let strace fail system calls of this process; its log shows which."""
    command = ["strace", "-f", "-o", str(log), "-p", str(os.getpid()), "-e", f"inject={rule}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        try:
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.communicate(timeout=20)


def save_traced(root: Path, rule: str, log: Path) -> Outcome:
    check_outcomes([save(root, "step-1", 1, export=None)], None)
    with injecting(rule, log):
        struck = save(root, "step-2", 2, export=None)
    if struck.raised is not None:
        check_storage(root, {"step-1": 1}, without_export=["step-1"])
        check_outcomes([save(root, "step-2", 2, export=None)], None)
    return struck


@needs_strace
@pytest.mark.parametrize(
    ("calls", "name"),
    [
        ("fsync", "EIO"),
        ("pwritev,pwritev2", "EDQUOT"),
        ("pwrite64,pwritev,pwritev2,fsync", "EINTR"),
    ],
)
def test_errors_of_the_kernel_are_told_and_interruptions_are_not(
    calls: str, name: str, tmp_path: Path
) -> None:
    root, log = tmp_path / "run", tmp_path / "strace.log"
    root.mkdir()
    # strace counts by thread, so each one that writes or syncs is hit at every second call.
    rule = f"{calls}:error={name}:when=1+2"
    struck = in_fresh_process(save_traced, root, rule, log)
    injected = [line for line in log.read_text().splitlines() if "(INJECTED)" in line]
    assert any(f"= -1 {name}" in line for line in injected), "nothing was injected"
    expected = (None,) if name == "EINTR" else (StorageError, (name,))
    check_outcomes([struck], *expected, within_s=TIMEOUT_S)
    check_storage(root, {"step-1": 1, "step-2": 2}, without_export=["step-1", "step-2"])


def test_save_goes_on_when_space_cannot_be_reserved(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    if file_system_type(str(root)) in _RESERVES_SLOWLY:
        pytest.skip(f"`stat -f {root}` is a tmpfs, on which no space is reserved")
    with bad(0, "fallocate64", errno.EOPNOTSUPP, "*", times=ALWAYS).installed(0, root):
        check_outcomes([save(root, "step-1", 1)], None)
    assert len(hits(root)) == 3, "one for each weight file"
    check_storage(root, {"step-1": 1})
