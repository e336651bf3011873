"""The directory of a save, and the step that publishes it."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer.errors import CommitError, NodeLocalPathError, TargetExistsError, WriteError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME
from dcp_hf_writer.save import commit, replace_target
from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.owner_process import Owner, is_over_here, new_save_id
from dcp_hf_writer.save.target_contents import check_target
from dcp_hf_writer.storage.linux_calls import UnsupportedCallError
from support.taken_targets import small_manifest, small_metadata, tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RECORD_NAME = ".dcp-hf-save.json"
DEAD = replace(Owner.me(), started=1)
ELSEWHERE = replace(Owner.me(), host="elsewhere", boot_id="other")


def staging(target: Path, save_id: str | None = None) -> StagingDirectory:
    return StagingDirectory.of(str(target), save_id or new_save_id())


def made(target: Path, *, overwrite: bool = False, content: str = "new") -> StagingDirectory:
    """Make the directory of a save as far as its manifest."""
    directory = staging(target)
    directory.create(overwrite=overwrite).close()
    write(directory.path, "data", content)
    write(directory.path, MANIFEST_NAME, manifest_of(directory))
    return directory


def manifest_of(directory: StagingDirectory, owner: Owner | None = None) -> str:
    owner = owner or Owner.me()
    return small_manifest(directory.target, directory.save_id, ["data"], owner)


def write(directory: str | Path, name: str, content: str) -> None:
    with open(os.path.join(directory, name), "w") as file:
        file.write(content)


def checkpoint(path: Path, content: str = "old", marker: str = MANIFEST_NAME) -> Path:
    path.mkdir()
    write(path, "data", content)
    if marker == MANIFEST_NAME:
        write(path, marker, small_manifest(str(path), "earlier", ["data"], DEAD))
    else:
        (path / marker).write_bytes(small_metadata(["data"]))
    return path


@pytest.fixture(params=["exchange", "two renames"])
def overwriting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwrite by the system call that swaps two names, and where there is none."""
    if request.param == "two renames":

        def unsupported(one: str, other: str) -> None:
            raise UnsupportedCallError(errno.EINVAL, os.strerror(errno.EINVAL), one)

        monkeypatch.setattr(replace_target, "exchange", unsupported)


@pytest.fixture(autouse=True)
def _probe_again() -> Iterator[None]:
    commit._probed.clear()
    yield
    commit._probed.clear()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# Making and publishing


def test_save_is_invisible_until_it_is_published(tmp_path: Path) -> None:
    directory = made(tmp_path / "step-100")
    assert names(tmp_path) == [f".incomplete-{directory.save_id}"]
    # Trainers look for the step anywhere in a name.
    assert "step" not in names(tmp_path)[0]
    directory.publish(overwrite=False)
    assert names(tmp_path) == ["step-100"]
    assert names(tmp_path / "step-100") == ["data", MANIFEST_NAME]


def test_record_says_whose_the_directory_is(tmp_path: Path) -> None:
    directory = staging(tmp_path / "step-1")
    directory.create(overwrite=False).close()
    with open(os.path.join(directory.path, RECORD_NAME)) as file:
        record = json.load(file)
    assert record == {
        "save_id": directory.save_id,
        "target": str(tmp_path / "step-1"),
        "owner": Owner.me().to_json(),
    }


def test_missing_parents_are_made(tmp_path: Path) -> None:
    made(tmp_path / "a" / "b" / "step-1").publish(overwrite=False)
    assert (tmp_path / "a" / "b" / "step-1" / "data").read_text() == "new"


def test_save_that_was_not_published_is_removed_and_can_be_removed_twice(tmp_path: Path) -> None:
    directory = made(tmp_path / "step-1")
    assert not is_over_here(directory.save_id)
    directory.remove()
    directory.remove()
    assert names(tmp_path) == []
    assert is_over_here(directory.save_id)


def test_rename_is_tried_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(one: str, other: str) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), one)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(WriteError, match="EXDEV"):
        staging(tmp_path / "step-1").create(overwrite=False)
    assert names(tmp_path) == []


def test_rename_is_tried_once_for_each_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []
    real = os.rename

    def noted(one: str, other: str) -> None:
        tried.append(os.path.dirname(one))
        real(one, other)

    monkeypatch.setattr(os, "rename", noted)
    for target in (tmp_path / "step-1", tmp_path / "step-2", tmp_path / "other" / "step-1"):
        made(target)
    assert tried == [str(tmp_path), str(tmp_path / "other")]


@pytest.mark.parametrize("name", ["mkdir", "open", "pwrite"])
def test_nothing_is_left_when_the_directory_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made(tmp_path / "step-0").publish(overwrite=False)
    real = getattr(os, name)

    def refused(*args: Any, **kwargs: Any) -> Any:
        # Only of the staging directory and the record in it; it is removed by calls of `open` too.
        is_other = isinstance(args[0], str) and ".incomplete-" not in args[0]
        if is_other or (name == "open" and not args[1] & os.O_CREAT):
            return real(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, refused)
    with pytest.raises(WriteError, match="ENOSPC"):
        staging(tmp_path / "step-1").create(overwrite=False)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-0"]


# Visibility


def test_directory_is_seen_by_a_rank_that_shares_it(tmp_path: Path) -> None:
    directory = made(tmp_path / "step-1")
    directory.check_visible(rank=1)
    StagingDirectory(directory.target, directory.save_id).check_visible(rank=1)


def test_rank_that_sees_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(NodeLocalPathError, match="shared file system") as caught:
        staging(tmp_path / "step-1").check_visible(rank=3)
    assert (caught.value.rank, caught.value.found) == (3, "no such directory")


def test_namesake_of_the_directory_is_not_taken_for_it(tmp_path: Path) -> None:
    directory = made(tmp_path / "step-1")
    namesake = StagingDirectory(directory.target, "another")
    os.rename(directory.path, namesake.path)
    with pytest.raises(NodeLocalPathError, match="another save"):
        namesake.check_visible(rank=1)


# Targets that exist


def occupy(target: Path, kind: str) -> None:
    if kind == "checkpoint":
        checkpoint(target)
    elif kind == "checkpoint of torch":
        checkpoint(target, marker=".metadata")
    elif kind == "file":
        target.write_text("old")
    elif kind == "link":
        target.symlink_to(checkpoint(target.parent / "linked"))
    elif kind == "dangling link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if kind == "other directory":
            write(target, "thesis.tex", "old")


KINDS = {
    "checkpoint": "replaced",
    "checkpoint of torch": "replaced",
    "empty directory": "taken",
    "other directory": "taken",
    "link": "replaced",
    "file": "refused",
    "dangling link": "refused",
}
"""What makes it, and what a save does with it: replaced means only with `overwrite`."""


@pytest.mark.parametrize("kind", [kind for kind, fate in KINDS.items() if fate != "taken"])
def test_target_that_exists_is_refused_before_anything_is_made(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "step-1"
    occupy(target, kind)
    before = tree(tmp_path)
    words = "overwrite=True" if KINDS[kind] == "replaced" else "a file is not|not a directory"
    with pytest.raises(TargetExistsError, match=words) as caught:
        staging(target).create(overwrite=False)
    assert caught.value.errno == errno.EEXIST
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", [kind for kind, fate in KINDS.items() if fate == "refused"])
def test_what_is_no_directory_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "step-1"
    occupy(target, kind)
    before = tree(tmp_path)
    with pytest.raises(TargetExistsError, match="not replaced"):
        staging(target).create(overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("overwriting")
@pytest.mark.parametrize("kind", ["checkpoint", "checkpoint of torch", "link"])
def test_checkpoint_is_overwritten_and_the_old_one_removed(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "step-1"
    occupy(target, kind)
    directory = made(target, overwrite=True)
    assert (target / "data").read_text() == "old"
    directory.publish(overwrite=True)
    assert names(tmp_path) == (["linked", "step-1"] if kind == "link" else ["step-1"])
    assert target.is_symlink() == (kind == "link")
    assert names(target) == ["data", MANIFEST_NAME]
    assert (target / "data").read_text() == "new"


def test_names_are_durable_before_the_old_checkpoint_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two renames stand for one, a crash in between must find either checkpoint."""
    checkpoint(tmp_path / "step-1")
    directory = made(tmp_path / "step-1", overwrite=True)
    done: list[str] = []

    def unsupported(one: str, other: str) -> None:
        raise UnsupportedCallError(errno.EINVAL, os.strerror(errno.EINVAL), one)

    def note(module: Any, name: str) -> None:
        real = getattr(module, name)

        def noted(*args: Any) -> Any:
            done.append(f"{name} {os.path.basename(args[0])[:9]}")
            return real(*args)

        monkeypatch.setattr(module, name, noted)

    monkeypatch.setattr(replace_target, "exchange", unsupported)
    note(replace_target, "publish_new")
    note(commit, "sync_directory")
    note(replace_target, "discard")
    directory.publish(overwrite=True)
    assert done == [
        "sync_directory .incomple",
        "publish_new .incomple",
        f"sync_directory {tmp_path.name[:9]}",
        "discard .replaced",
        "discard .incomple",
    ]


@pytest.mark.parametrize("overwrite", [False, True])
def test_checkpoint_that_appears_meanwhile_is_not_replaced_by_chance(
    tmp_path: Path, *, overwrite: bool
) -> None:
    directory = made(tmp_path / "step-1", overwrite=overwrite)
    other = made(tmp_path / "step-1", overwrite=overwrite, content="other")
    other.publish(overwrite=False)
    with pytest.raises(TargetExistsError, match="overwrite=True"):
        directory.publish(overwrite=False)
    directory.remove()
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "step-1" / "data").read_text() == "other"


@pytest.mark.usefixtures("overwriting")
def test_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    directory = made(tmp_path / "step-1", overwrite=True)
    (tmp_path / "step-1").write_text("mine")
    with pytest.raises(TargetExistsError, match="not replaced"):
        directory.publish(overwrite=True)
    assert (tmp_path / "step-1").read_text() == "mine"


def test_free_name_passes() -> None:
    check_target("/nowhere/step-1", overwrite=False)


def test_error_of_the_rename_is_told_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "step-1")
    directory = made(tmp_path / "step-1", overwrite=True)

    def refused(one: str, other: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), one)

    monkeypatch.setattr(replace_target, "exchange", refused)
    with pytest.raises(CommitError, match=r"EIO.*you may repeat the save") as caught:
        directory.publish(overwrite=True)
    assert (caught.value.phase, caught.value.errno) == ("commit", errno.EIO)
    assert (tmp_path / "step-1" / "data").read_text() == "old"


def test_parent_that_cannot_be_synced_is_an_error_that_says_what_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = made(tmp_path / "step-1")
    real = commit.sync_directory

    def refused(path: str) -> None:
        if path == str(tmp_path):
            raise WriteError("refused", errno=errno.EIO, found="EIO")
        real(path)

    monkeypatch.setattr(commit, "sync_directory", refused)
    with pytest.raises(CommitError, match="is visible, but its name may not survive"):
        directory.publish(overwrite=False)
    assert (tmp_path / "step-1" / "data").read_text() == "new"


# What dead saves left


def leave(target: Path, owner: Owner, *, save_id: str | None = None) -> StagingDirectory:
    """Leave what a save of another process had made so far."""
    directory = staging(target, save_id)
    os.mkdir(directory.path)
    record = {"save_id": directory.save_id, "target": str(target), "owner": owner.to_json()}
    write(directory.path, RECORD_NAME, json.dumps(record))
    write(directory.path, "data", "half")
    return directory


def test_save_removes_what_a_dead_one_to_its_target_left(tmp_path: Path) -> None:
    leave(tmp_path / "step-1", DEAD)
    directory = made(tmp_path / "step-1")
    assert names(tmp_path) == [f".incomplete-{directory.save_id}"]


def test_save_removes_what_dead_ones_to_other_targets_left(tmp_path: Path) -> None:
    leave(tmp_path / "step-2", DEAD)
    leave(tmp_path / "step-3", DEAD)
    made(tmp_path / "step-1").publish(overwrite=False)
    assert names(tmp_path) == ["step-1"]


def test_save_leaves_alone_what_is_not_its_own(tmp_path: Path) -> None:
    live = Owner.me()
    kept = [
        leave(tmp_path / "step-2", ELSEWHERE),
        made(tmp_path / "step-2"),
        leave(tmp_path / "step-1", ELSEWHERE),
        made(tmp_path / "step-1"),
        leave(tmp_path / "step-1", replace(live, pid=1, started=_started(1))),
    ]
    (tmp_path / ".incomplete-of someone").mkdir()
    (tmp_path / ".incomplete-file").touch()
    checkpoint(tmp_path / "step-0")
    made(tmp_path / "step-1").publish(overwrite=False)
    assert names(tmp_path) == sorted(
        [
            *(os.path.basename(one.path) for one in kept),
            *(".incomplete-of someone", ".incomplete-file", "step-0", "step-1"),
        ]
    )


def _started(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def test_save_removes_a_directory_without_a_record_when_its_process_is_gone(
    tmp_path: Path,
) -> None:
    gone = new_save_id().replace(f"-{os.getpid()}-", "-4194305-")
    os.mkdir(staging(tmp_path / "step-9", gone).path)
    alive = new_save_id().replace(f"-{os.getpid()}-", "-1-")
    kept = staging(tmp_path / "step-9", alive)
    os.mkdir(kept.path)
    made(tmp_path / "step-1").publish(overwrite=False)
    assert names(tmp_path) == [os.path.basename(kept.path), "step-1"]


def test_second_save_finds_nothing_to_remove(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(tmp_path / "step-1", DEAD)
    caplog.set_level("INFO")
    made(tmp_path / "step-1").publish(overwrite=False)
    assert "removing what a dead save left" in caplog.text
    caplog.clear()
    made(tmp_path / "step-1", overwrite=True).publish(overwrite=True)
    assert "dead" not in caplog.text


def test_save_removes_what_another_one_replaced_before_it_died(tmp_path: Path) -> None:
    """A crash after the exchange leaves the old checkpoint under the name of the new one."""
    save_id = new_save_id()
    checkpoint(tmp_path / f".incomplete-{save_id}")
    checkpoint(tmp_path / "step-1", "new")
    write(tmp_path / "step-1", MANIFEST_NAME, json.dumps({"save_id": save_id}))
    with pytest.raises(TargetExistsError):
        staging(tmp_path / "step-1").create(overwrite=False)
    made(tmp_path / "step-1", overwrite=True).remove()
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "step-1" / "data").read_text() == "new"


# A crash between the two renames of an overwrite


def crashed(target: Path) -> tuple[StagingDirectory, Path]:
    """Leave what is there after the first rename: the old checkpoint aside, the new one staged."""
    directory = leave(target, DEAD)
    os.unlink(os.path.join(directory.path, RECORD_NAME))
    write(directory.path, MANIFEST_NAME, manifest_of(directory, DEAD))
    aside = checkpoint(target)
    replaced = target.parent / f".replaced-{directory.save_id}"
    os.rename(aside, replaced)
    return directory, replaced


def test_next_save_finishes_the_overwrite(tmp_path: Path) -> None:
    crashed(tmp_path / "step-1")
    with pytest.raises(TargetExistsError):
        staging(tmp_path / "step-1").create(overwrite=False)
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "step-1" / "data").read_text() == "half"


def test_next_save_undoes_the_overwrite_when_the_new_checkpoint_is_gone(tmp_path: Path) -> None:
    directory, replaced = crashed(tmp_path / "step-1")
    write(replaced, MANIFEST_NAME, json.dumps({"target": str(tmp_path / "step-1")}))
    directory.remove()
    with pytest.raises(TargetExistsError):
        staging(tmp_path / "step-1").create(overwrite=False)
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "step-1" / "data").read_text() == "old"


def test_next_save_removes_the_old_checkpoint_when_the_new_one_has_its_name(
    tmp_path: Path,
) -> None:
    directory, _ = crashed(tmp_path / "step-1")
    os.rename(directory.path, tmp_path / "step-1")
    with pytest.raises(TargetExistsError):
        staging(tmp_path / "step-1").create(overwrite=False)
    assert names(tmp_path) == ["step-1"]


def test_save_of_another_target_finishes_the_overwrite_too(tmp_path: Path) -> None:
    crashed(tmp_path / "step-1")
    made(tmp_path / "step-2").publish(overwrite=False)
    assert names(tmp_path) == ["step-1", "step-2"]
    assert (tmp_path / "step-1" / "data").read_text() == "half"


@pytest.mark.parametrize("name", ["step-1", "step-2"])
def test_overwrite_by_another_host_is_finished_by_a_save_to_its_target(
    tmp_path: Path, name: str
) -> None:
    """Nobody here can tell whether that host still works on it, and the target has no name."""
    directory, _ = crashed(tmp_path / "step-1")
    write(directory.path, MANIFEST_NAME, manifest_of(directory, ELSEWHERE))
    made(tmp_path / name, overwrite=True).remove()
    assert (tmp_path / "step-1").exists() == (name == "step-1")
    assert len(names(tmp_path)) == (1 if name == "step-1" else 2)


def test_overwrite_of_a_live_save_is_left_to_it(tmp_path: Path) -> None:
    directory, replaced = crashed(tmp_path / "step-1")
    write(
        directory.path,
        MANIFEST_NAME,
        manifest_of(directory, replace(DEAD, pid=1, started=_started(1))),
    )
    made(tmp_path / "step-2").publish(overwrite=False)
    assert names(tmp_path) == sorted([os.path.basename(directory.path), replaced.name, "step-2"])
