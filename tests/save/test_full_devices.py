"""Devices that fill up or become read-only, and limits of the process: what is said and left."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer.errors import ExportError, StorageError, WriteError
from support.faults import Outcome, Resources, Strike, check_outcomes, check_storage, hits, save
from support.mounts import mount_tmpfs, needs_mounts, remount
from support.named_bytes import save_held_by
from support.processes import in_fresh_process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEVICE_OPTIONS = "size=16m,nr_inodes=100"


def take_space(root: Path) -> None:
    with (root / "taken").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass


def take_names(root: Path) -> None:
    (root / "taken").mkdir()
    with contextlib.suppress(OSError):
        for i in range(100):
            (root / "taken" / str(i)).touch()


@dataclass(frozen=True)
class Full:
    """What fills a small device, and what becomes of the save."""

    kind: type[BaseException]
    words: tuple[str, ...]
    mib: int = 0
    """How much larger the model is than that of the saves before and after."""
    has_export: bool = True
    is_dcp_kept: bool = False
    takes: Callable[[Path], None] | None = None
    """Takes what is left, as others who use the device do."""
    at: str = "staged"
    """Point of the save at which it does."""


FULL = {
    "for either half": Full(WriteError, ("free space", ".distcp"), mib=16),
    "in the midst of the export": Full(ExportError, ("/hf/",), mib=10, is_dcp_kept=True),
    "in the midst of the dcp half": Full(
        WriteError, ("free space", ".distcp"), mib=20, has_export=False
    ),
    "for names": Full(WriteError, ("free space",), takes=take_names),
    "for the directory": Full(WriteError, ("free space",), takes=take_space),
    "for the metadata": Full(
        WriteError, ("free space", ".incomplete-"), takes=take_space, at="before report"
    ),
    "for the manifest": Full(
        WriteError, ("free space", "dcp-hf.json"), takes=take_space, at="before manifest"
    ),
}


def save_until_full(root: Path, full: Full) -> tuple[Outcome, bool]:
    """Save, save what does not fit, save again, on a small device of this process.

    Returns:
        What the save that did not fit came to, and whether its space and names were given back.
    """
    mount_tmpfs(root, DEVICE_OPTIONS)
    more: dict[str, Any] = {} if full.has_export else {"export": None}
    without = [] if full.has_export else ["step-1", "step-2"]
    check_outcomes([save(root, "step-1", 1, **more)], None)
    before = os.statvfs(root)
    fault = Strike(rank=0, point=full.at, action="call", call=full.takes)
    with fault.installed(0 if full.takes else 1, root):
        struck = save(root, "step-2", 2, mib=full.mib, **more)
    taken = root / "taken"
    shutil.rmtree(taken) if taken.is_dir() else taken.unlink(missing_ok=True)
    if full.is_dcp_kept:
        assert save_held_by(root / "step-2", has_export=False, mib=full.mib) == 2
        shutil.rmtree(root / "step-2")
    after = os.statvfs(root)
    check_outcomes([save(root, "step-2", 3, **more)], None)
    check_storage(root, {"step-1": 1, "step-2": 3}, without_export=without)
    return struck, (after.f_bfree, after.f_ffree) == (before.f_bfree, before.f_ffree)


@needs_mounts
@pytest.mark.parametrize("what", FULL)
def test_space_is_given_back_when_there_is_too_little(what: str, tmp_path: Path) -> None:
    full = FULL[what]
    root = tmp_path / "run"
    root.mkdir()
    struck, is_given_back = in_fresh_process(save_until_full, root, full)
    assert len(hits(root)) == (full.takes is not None)
    check_outcomes([struck], full.kind, full.words)
    assert getattr(struck.error, "errno", None) == errno.ENOSPC
    assert is_given_back


def save_while_read_only(root: Path, point: str) -> Outcome:
    mount_tmpfs(root)
    check_outcomes([save(root, "step-1", 1)], None)
    with Strike(rank=0, point=point, action="call", call=make_read_only).installed(0, root):
        struck = save(root, "step-2", 2)
    check_storage(root, {"step-1": 1}, may_leave=True)
    remount(root, "rw")
    check_outcomes([save(root, "step-2", 3)], None)
    check_storage(root, {"step-1": 1, "step-2": 3})
    return struck


def make_read_only(root: Path) -> None:
    remount(root, "ro")


@needs_mounts
@pytest.mark.parametrize("point", ["after fsync", "before manifest", "before rename"])
def test_previous_checkpoint_stays_when_the_device_becomes_read_only(
    point: str, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    struck = in_fresh_process(save_while_read_only, root, point)
    assert hits(root) == [f"0 call {point}"]
    check_outcomes([struck], StorageError, ("EROFS",))


# Limits of the process


def save_without_descriptors(root: Path) -> tuple[Outcome, list[str]]:
    check_outcomes([save(root, "step-1", 1)], None)
    resources = Resources(root)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    # One for the DCP half, one for the thread that tells the progress now and then.
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, limits[1]))
    struck = save(root, "step-2", 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    # The files of the export are open side by side; the DCP half is one at a time.
    assert save_held_by(root / "step-2", has_export=False) == 2
    shutil.rmtree(root / "step-2")
    check_outcomes([save(root, "step-2", 3)], None)
    check_storage(root, {"step-1": 1, "step-2": 3})
    return struck, resources.leaked()


def test_error_says_what_to_do_when_descriptors_run_out(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    struck, leaked = in_fresh_process(save_without_descriptors, root)
    check_outcomes([struck], ExportError, ("EMFILE", "ulimit -n"))
    assert leaked == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    old = os.umask(umask)
    try:
        check_outcomes([save(root, "step-1", 1)], None)
    finally:
        os.umask(old)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (root / "step-1").rglob("*")}
    modes[root / "step-1"] = stat.S_IMODE((root / "step-1").stat().st_mode)
    assert len(modes) > 8
    for path, mode in modes.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path
