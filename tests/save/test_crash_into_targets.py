"""A process is killed at each change to the storage that it makes to take a directory's name.

The directory holds files of others, and a checkpoint or none. After each death either the old state
or the new one is there, with all files of others; the next save in the same parent directory, to
another target, leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import pytest

from dcp_hf_writer import failpoints
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME
from dcp_hf_writer.save import commit, replace_target
from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.owner_process import Owner, new_save_id
from support.changes import Changes
from support.faults import BadCall
from support.processes import in_fresh_process, status_of_fork
from support.taken_targets import FILES, Tree, put_files, small_manifest, tree

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Held = Literal["nothing", "checkpoint"]
Way = Literal["exchange", "no exchange"]

# More changes than any publication of these tests makes.
MOST_CHANGES = 400

OLD = ("__0_0.distcp", "__1_0.distcp", METADATA_NAME, "hf/old.safetensors", "hf/config.json")
NEW = ("__0_0.distcp", METADATA_NAME, "hf/new.safetensors", "hf/config.json")
MORE = {"hf/notes.md": "by hand", "step-1/hf/config.json": "nested", "step-1/.metadata": "nested"}
"""Files of others in the directories of a checkpoint, and a checkpoint within."""


def put_checkpoint(
    directory: str, files: tuple[str, ...], content: str, *, target: Path, save_id: str
) -> None:
    for name in files:
        os.makedirs(os.path.dirname(os.path.join(directory, name)), exist_ok=True)
        with open(os.path.join(directory, name), "w") as file:
            file.write(f"{content} {name}")
    with open(os.path.join(directory, MANIFEST_NAME), "w") as file:
        file.write(small_manifest(str(target), save_id, files, Owner.me()))


def prepare(target: Path, held: Held) -> None:
    put_files(target)
    (target / "link").symlink_to("nowhere")
    if held == "checkpoint":
        put_checkpoint(str(target), OLD, "old", target=target, save_id="earlier")
        put_files(target, MORE)


def staged(target: Path, *, overwrite: bool) -> StagingDirectory:
    directory = StagingDirectory.of(str(target), new_save_id())
    directory.create(overwrite=overwrite).close()
    put_checkpoint(directory.path, NEW, "new", target=target, save_id=directory.save_id)
    return directory


def publish(target: Path, *, overwrite: bool, way: Way, die_at: int | None = None) -> None:
    """Publish; die at a change to the storage that this makes, if one is given."""
    no_exchange = BadCall(rank=0, name="renameat2", errno=errno.EINVAL, times=10**6)
    with no_exchange.installed(0 if way == "no exchange" else 1, target.parent):
        directory = staged(target, overwrite=overwrite)
        if die_at is not None:
            Changes(target.parent, die_at=die_at)
        directory.publish(overwrite=overwrite)


def die(target: Path, held: Held, way: Way, n: int) -> None:
    publish(target, overwrite=held == "checkpoint", way=way, die_at=n)


def content(target: Path) -> Tree:
    """Return what is in a target, without the ids of saves."""
    found = tree(target) if target.is_dir() else {}
    if MANIFEST_NAME in found:
        found[MANIFEST_NAME] = "of save 1" if b'"earlier"' in found[MANIFEST_NAME] else "of save 2"
    return found


@dataclass
class Tried:
    deaths: int = 0
    kept: int = 0
    """How many saves died before the commit."""
    problems: list[str] = field(default_factory=list)


def expected(base: Path, held: Held) -> tuple[Tree, Tree]:
    """Return what the target holds before a save and after it."""
    target = base / "expected" / "step-9"
    prepare(target, held)
    before = content(target)
    publish(target, overwrite=held == "checkpoint", way="exchange")
    after = content(target)
    others = {name for name in before if name in after and before[name] == after[name]}
    assert {*FILES, "link"} <= others
    assert held == "nothing" or set(MORE) <= others
    assert {name for name in after if name.startswith("__")} == {"__0_0.distcp"}
    assert "hf/old.safetensors" not in after
    return before, after


def try_every_change(base: Path, held: Held, way: Way) -> Tried:
    tried = Tried()
    before, after = expected(base, held)
    for n in range(1, MOST_CHANGES):
        target = base / str(n) / "step-9"
        prepare(target, held)
        inodes = {name: os.lstat(target / name).st_ino for name in FILES}
        status = status_of_fork(die, target, held, way, n)
        found = content(target)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            if found != after or sorted(os.listdir(target.parent)) != ["step-9"]:
                tried.problems.append(f"the save that survived left {os.listdir(target.parent)}")
            return tried
        assert os.WTERMSIG(status) == signal.SIGKILL
        tried.deaths += 1
        tried.problems += [f"n={n}: {one}" for one in problems(found, before, after, held, way)]
        commit._probed.clear()
        publish(target.parent / "other", overwrite=False, way=way)
        found = content(target)
        tried.kept += found == before
        if found not in (before, after):
            tried.problems.append(f"n={n}: after the next save: {difference(found, after)}")
        elif inodes != {name: os.lstat(target / name).st_ino for name in FILES}:
            tried.problems.append(f"n={n}: files of others were copied")
        if sorted(os.listdir(target.parent)) != ["other", "step-9"]:
            tried.problems.append(f"n={n}: left behind {sorted(os.listdir(target.parent))}")
    tried.problems.append("no save survived")
    return tried


def problems(found: Tree, before: Tree, after: Tree, held: Held, way: Way) -> list[str]:
    """Say what is wrong with a target right after a death."""
    if found in (before, after):
        return []
    if way == "no exchange" and held == "checkpoint" and not found:
        # Between two renames; the next save finishes or undoes it.
        return []
    if way == "no exchange" and held == "nothing":
        # In place: the files come one after another, those that others look for last.
        missing = {name for name in after if name not in found}
        others = {name: value for name, value in found.items() if name in before}
        is_ordered = METADATA_NAME not in found or "__0_0.distcp" in found
        if others == before and MANIFEST_NAME in missing and is_ordered:
            return []
    return [difference(found, after)]


def difference(found: Tree, wanted: Tree) -> str:
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = sorted(n for n in found.keys() & wanted.keys() if found[n] != wanted[n])
    return f"missing {missing}, more {more}, other {other}"


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("held", "way"),
    [
        ("nothing", "exchange"),
        ("checkpoint", "exchange"),
        ("nothing", "no exchange"),
        pytest.param("checkpoint", "no exchange", marks=pytest.mark.slow),
    ],
)
def test_target_is_old_or_new_with_all_files_when_a_save_dies_at_any_change(
    held: Held, way: Way, tmp_path: Path
) -> None:
    found = in_fresh_process(try_every_change, tmp_path, held, way, timeout_s=180)
    print(f"{held}, {way}: {found.deaths} deaths, {found.kept} of them kept the old")  # noqa: T201
    assert found.problems == []
    assert found.deaths > 20
    assert 0 < found.kept < found.deaths


# What others do while the names change


def late(directory: Path) -> None:
    (directory / "late.txt").write_text("late")
    (directory / "late directory").mkdir()
    (directory / "late directory" / "file").write_text("late")
    (directory / "runs" / "late.out").write_text("late")


def replaced(directory: Path) -> None:
    (directory / "fresh").write_text('{"step": 2}')
    os.replace(directory / "fresh", directory / "trainer_state.json")
    (directory / "tokenizer" / "fresh").write_text("c d")
    os.replace(directory / "tokenizer" / "fresh", directory / "tokenizer" / "vocab.txt")


def removed(directory: Path) -> None:
    (directory / "rng_state_0.pth").unlink()
    (directory / "tokenizer" / "vocab.txt").unlink()
    (directory / "tokenizer").rmdir()


CHANGES: dict[str, tuple[Callable[[Path], None], dict[str, bytes | str | None]]] = {
    "added": (
        late,
        {
            "late.txt": b"late",
            "late directory": "directory",
            "late directory/file": b"late",
            "runs/late.out": b"late",
        },
    ),
    "replaced": (replaced, {"trainer_state.json": b'{"step": 2}', "tokenizer/vocab.txt": b"c d"}),
    "removed": (
        removed,
        {"rng_state_0.pth": None, "tokenizer/vocab.txt": None, "tokenizer": None},
    ),
}
POINTS = ("files carried", "before exchange", *failpoints.TARGET_POINTS[1:])


def publish_while(target: Path, held: Held, point: str, change: str, kill_at: str | None) -> None:
    """Publish; at one point others change files by path, at another the process dies."""
    directory = staged(target, overwrite=held == "checkpoint")

    def hook(reached: str) -> None:
        if reached == point:
            CHANGES[change][0](target)
        if reached == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    failpoints.set_hook(hook)
    if point == "before exchange":
        real = replace_target.exchange

        def exchange(one: str, other: str) -> None:
            replace_target.exchange = real
            hook(point)
            real(one, other)

        replace_target.exchange = exchange
    directory.publish(overwrite=held == "checkpoint")


@pytest.mark.parametrize("held", ["nothing", "checkpoint"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("point", POINTS)
def test_what_others_change_meanwhile_is_kept(
    tmp_path: Path, held: Held, change: str, point: str
) -> None:
    wanted = expected(tmp_path, held)[1]
    for name, value in CHANGES[change][1].items():
        wanted.pop(name, None)
        if value is not None:
            wanted[name] = value
    points = (
        None,
        *(p for p in failpoints.TARGET_POINTS if POINTS.index(p) >= POINTS.index(point)),
    )
    for kill_at in points:
        is_committed = kill_at != "files carried"
        target = tmp_path / f"killed at {kill_at}" / "step-9"
        prepare(target, held)
        status = status_of_fork(publish_while, target, held, point, change, kill_at)
        assert os.WIFSIGNALED(status) == (kill_at is not None)
        publish(target.parent / "other", overwrite=False, way="exchange")
        found = content(target)
        if is_committed:
            assert difference(found, wanted) == difference({}, {}), kill_at
        else:
            # The files of others are all that changed.
            prepared = tmp_path / "uncommitted" / "step-9"
            prepare(prepared, held)
            CHANGES[change][0](prepared)
            assert difference(found, content(prepared)) == difference({}, {})
        assert sorted(os.listdir(target.parent)) == ["other", "step-9"]
