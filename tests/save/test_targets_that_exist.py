"""Saves into directories that exist: what torch's writer takes is taken, and no file is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from dcp_hf_writer import HFDualReader, HFDualWriter, HFExport, failpoints, materialize, verify
from dcp_hf_writer.errors import CommitError, ExportError, TargetExistsError
from dcp_hf_writer.save import replace_target
from dcp_hf_writer.save.commit import StagingDirectory
from dcp_hf_writer.save.owner_process import new_save_id
from support.faults import BadCall, Strike, check_outcomes, hits, save
from support.mounts import mount_tmpfs, needs_mounts
from support.named_bytes import save_held_by
from support.processes import in_fresh_process
from support.ranks import run_ranks
from support.taken_targets import FILES, files_of_others, put_files, tree
from support.unwilling import Unwilling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

VALUE = {"model": {"w": torch.arange(6.0).view(2, 3)}, "step": 7}


def put(path: Path, number: float = 0, **options: object) -> None:
    """Save a small state; `number` is added to every weight."""
    state = {"model": {"w": VALUE["model"]["w"] + number}, "step": 7}
    dcp.async_save(state, storage_writer=HFDualWriter(path, **options), no_dist=True).result()


def check_held(path: Path, number: float = 0) -> None:
    """Check that stock torch and our reader load what `put` saved, and that the bytes are right."""
    for reader in (None, HFDualReader(path)):
        state = {"model": {"w": torch.zeros(2, 3)}}
        dcp.load(state, checkpoint_id=path, storage_reader=reader, no_dist=True)
        assert torch.equal(state["model"]["w"], VALUE["model"]["w"] + number)
    verify(path).raise_if_bad()


@pytest.fixture(params=["exchange", "no exchange"])
def way(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Save where two names can be exchanged, and where they cannot."""
    bad = BadCall(rank=0, name="renameat2", errno=errno.EINVAL, times=10**6)
    with bad.installed(0 if request.param == "no exchange" else 1, tmp_path):
        yield request.param


def meanwhile(root: Path, point: str, act: Callable[[], object]) -> AbstractContextManager[None]:
    """Let others act once, when the save of this process reaches a point."""
    strike = Strike(rank=0, point=point, action="call", call=lambda _: act())
    return strike.installed(0, root)


# What the trainer put there


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("files", [{}, FILES])
@pytest.mark.parametrize("overwrite", [False, True])
def test_directory_without_checkpoint_is_taken_with_its_files(
    tmp_path: Path, files: dict[str, str], *, overwrite: bool
) -> None:
    target = tmp_path / "step-1"
    put_files(target, files)
    put(target, 1, overwrite=overwrite)
    check_held(target, 1)
    assert files_of_others(target, files) == files
    assert os.listdir(tmp_path) == ["step-1"]


@pytest.mark.usefixtures("way")
def test_files_beside_a_checkpoint_stay_when_it_is_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    put(target, 1)
    put_files(target)
    put_files(target, {"hf/notes.md": "by hand"})
    put(target, 2, overwrite=True)
    check_held(target, 2)
    assert files_of_others(target) == FILES
    assert (target / "hf" / "notes.md").read_text() == "by hand"
    put(target, 3, overwrite=True, export=None)
    # What was left of the export is only what a person put there.
    assert os.listdir(target / "hf") == ["notes.md"]
    assert files_of_others(target) == FILES
    assert os.listdir(tmp_path) == ["step-1"]


@pytest.mark.usefixtures("way")
def test_open_files_stay_the_same_files(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    put_files(target)
    (target / "read only").write_text("fixed")
    (target / "read only").chmod(0o444)
    (target / "link").symlink_to("runs")
    before = {path: os.lstat(target / path).st_ino for path in (*FILES, "read only", "link")}
    with open(target / "runs" / "day 1" / "events.out", "a") as events:
        put(target, 1)
        events.write(" and more")
    assert (target / "runs/day 1/events.out").read_text() == "events and more"
    assert before == {path: os.lstat(target / path).st_ino for path in before}
    assert (target / "link").readlink() == Path("runs")
    assert (target / "read only").stat().st_mode & 0o777 == 0o444


def test_directory_that_exists_stays_the_same_directory(tmp_path: Path) -> None:
    """A process may work in it, or hold it open."""
    target = tmp_path / "step-1"
    put_files(target)
    before = {path: (target / path).stat().st_ino for path in (".", "runs", "runs/day 1")}
    target.chmod(0o2750)
    put(target, 1)
    put(target, 2, overwrite=True)
    assert before == {path: (target / path).stat().st_ino for path in before}
    assert target.stat().st_mode & 0o7777 == 0o2750
    check_held(target, 2)


def test_directory_that_exists_keeps_its_rights_when_its_checkpoint_is_overwritten(
    tmp_path: Path,
) -> None:
    """Nothing but the checkpoint is in it; a group of users shares it."""
    target = tmp_path / "step-1"
    put(target, 1)
    target.chmod(0o2770)
    put(target, 2, overwrite=True)
    assert target.stat().st_mode & 0o7777 == 0o2770
    check_held(target, 2)


@pytest.mark.parametrize("held", ["nothing", "file", "checkpoint"])
def test_working_directory_of_the_process_can_be_the_target(
    tmp_path: Path, held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "step-1"
    target.mkdir()
    if held == "checkpoint":
        put(target, 1)
    elif held == "file":
        (target / "notes").write_text("mine")
    monkeypatch.chdir(target)
    put(Path(), 2, overwrite=held == "checkpoint")
    assert os.path.samefile(os.getcwd(), target)
    Path("by relative path").write_text("x")
    assert (target / "by relative path").read_text() == "x"
    check_held(target, 2)


def test_files_written_without_pause_while_saves_run_are_all_there(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    target.mkdir()
    (target / "logs").mkdir()
    is_over, written, failures = threading.Event(), [], []

    def write() -> None:
        while not is_over.is_set():
            for name in (f"state-{len(written)}", f"logs/{len(written)}"):
                try:
                    (target / name).write_text(name)
                except OSError as error:
                    failures.append(error)
                written.append(name)
            # A file each millisecond is enough to meet every step of the saves.
            time.sleep(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(4):
            put(target, number, overwrite=number > 0)
    finally:
        is_over.set()
        thread.join()
    assert failures == []
    assert len(written) > 20
    assert {name: (target / name).read_text() for name in written} == {n: n for n in written}
    check_held(target, 3)
    assert os.listdir(tmp_path) == ["step-1"]


def test_target_that_appears_with_files_while_the_save_runs_is_taken(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    with meanwhile(tmp_path, "before rename", lambda: put_files(target)):
        put(target, 1)
    check_held(target, 1)
    assert files_of_others(target) == FILES


# Names that collide


def own(name: str) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("of the user")

    return make


COLLISIONS = {
    "hf": lambda target: (target / "hf").mkdir(parents=True),
    "hf with files": own("hf/config.json"),
    "hf as a file": own("hf"),
    "__0_0.distcp": own("__0_0.distcp"),
    "__0_1.distcp": own("__0_1.distcp"),
}


@pytest.mark.parametrize("kind", COLLISIONS)
def test_name_that_the_checkpoint_needs_is_an_error_before_anything_is_written(
    tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "step-1"
    COLLISIONS[kind](target)
    put_files(target)
    before, reached = tree(tmp_path), []
    failpoints.set_hook(reached.append)
    try:
        with pytest.raises(TargetExistsError, match="name that the checkpoint needs") as caught:
            put(target, 1, export=HFExport(assets={"config.json": b"{}"}))
    finally:
        failpoints.set_hook(None)
    assert str(target / kind.split(maxsplit=1)[0]) in str(caught.value)
    assert "move it away" in str(caught.value)
    assert "directory made" not in reached
    assert tree(tmp_path) == before


def test_file_of_another_rank_or_of_no_export_does_not_collide(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    put_files(target, {"__7_0.distcp": "of a larger run", "hf/config.json": "mine"})
    put(target, 1, export=None)
    state = {"model": {"w": torch.zeros(2, 3)}}
    dcp.load(state, checkpoint_id=target, no_dist=True)
    assert torch.equal(state["model"]["w"], VALUE["model"]["w"] + 1)
    assert (target / "__7_0.distcp").read_text() == "of a larger run"
    assert (target / "hf" / "config.json").read_text() == "mine"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("held", ["nothing", "checkpoint"])
def test_colliding_name_that_appears_while_the_save_runs_publishes_nothing(
    tmp_path: Path, held: str
) -> None:
    target = tmp_path / "step-1"
    put_files(target)
    if held == "checkpoint":
        put(target, 1, export=None)
    with (
        meanwhile(tmp_path, "before rename", lambda: put_files(target, {"hf/mine": "mine"})),
        pytest.raises(TargetExistsError, match="name that the checkpoint needs"),
    ):
        put(target, 2, overwrite=held == "checkpoint")
    assert files_of_others(target, {**FILES, "hf/mine": "mine"}) == {**FILES, "hf/mine": "mine"}
    assert (target / ".metadata").exists() == (held == "checkpoint")
    assert os.listdir(tmp_path) == ["step-1"]


def test_colliding_name_that_appears_in_the_last_moment_is_kept_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "step-1"
    put_files(target)
    real = replace_target.exchange

    def exchange(one: str, other: str) -> None:
        monkeypatch.setattr(replace_target, "exchange", real)
        put_files(target, {"hf/model.safetensors": "mine", "hf/notes.md": "mine"})
        real(one, other)

    monkeypatch.setattr(replace_target, "exchange", exchange)
    put(target, 1)
    check_held(target, 1)
    (kept,) = target.glob("hf/model.safetensors.kept-*")
    assert kept.read_text() == "mine"
    assert kept.name in caplog.text
    assert (target / "hf" / "notes.md").read_text() == "mine"


# Checkpoints of others, and checkpoints within


@pytest.mark.usefixtures("way")
def test_checkpoint_of_torch_is_replaced_by_what_its_metadata_names(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    state = {"model": {"w": torch.ones(2)}, "other": torch.zeros(3)}
    dcp.save(state, storage_writer=FileSystemWriter(target, thread_count=2), no_dist=True)
    assert (target / "__0_1.distcp").exists()
    put_files(target)
    with pytest.raises(TargetExistsError, match="overwrite=True"):
        put(target, 1)
    put(target, 1, overwrite=True)
    check_held(target, 1)
    assert not (target / "__0_1.distcp").exists()
    assert files_of_others(target) == FILES


def test_damaged_manifest_gives_no_file_away(tmp_path: Path) -> None:
    target = tmp_path / "step-1"
    put(target, 1)
    with open(target / "dcp-hf.json", "r+b") as file:
        file.write(b"?")
    before = tree(target)
    # `.metadata` still tells the DCP half; nothing tells whose the export is.
    with pytest.raises(TargetExistsError, match=r"no manifest or \.metadata") as caught:
        put(target, 2, overwrite=True)
    assert str(target / "hf") in str(caught.value)
    assert tree(target) == before
    put(target, 2, overwrite=True, export=None)
    assert (target / "hf" / "model.safetensors").exists()
    assert [path.name for path in target.glob("*.distcp")] == ["__0_0.distcp"]


@pytest.mark.usefixtures("way")
def test_checkpoint_within_another_stays_when_the_outer_one_is_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    put(run, 0)
    put(run / "step-1", 1)
    before = tree(run / "step-1")
    with pytest.raises(TargetExistsError):
        put(run, 2)
    put(run, 2, overwrite=True)
    check_held(run, 2)
    assert tree(run / "step-1") == before
    put(run / "step-1", 3, overwrite=True)
    check_held(run / "step-1", 3)
    check_held(run, 2)
    assert {"step-1", "hf", ".metadata"} <= set(os.listdir(run))
    assert not [name for name in os.listdir(run) if name.startswith(".incomplete")]


def overwrite(path: Path, number: int) -> None:
    put(path, number, overwrite=True)


def test_save_within_goes_on_while_the_outer_checkpoint_is_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    put(run, 0)

    def replace_outer() -> None:
        # Not in this process, whose staging memory is in use.
        in_fresh_process(overwrite, run, 2, timeout_s=100)

    with meanwhile(tmp_path, "before manifest", replace_outer):
        put(run / "step-1", 1)
    assert len(hits(tmp_path)) == 1
    check_held(run, 2)
    check_held(run / "step-1", 1)


# Links and mounts


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("is_relative", [False, True])
def test_link_to_a_directory_stands_for_the_directory(tmp_path: Path, *, is_relative: bool) -> None:
    real = tmp_path / "disk" / "step-1"
    put_files(real)
    link = tmp_path / "runs" / "latest"
    link.parent.mkdir()
    link.symlink_to("../disk/step-1" if is_relative else real)
    put(link, 1)
    check_held(link, 1)
    check_held(real, 1)
    put(link, 2, overwrite=True)
    check_held(real, 2)
    assert link.is_symlink()
    assert files_of_others(real) == FILES
    assert (os.listdir(real.parent), os.listdir(link.parent)) == (["step-1"], ["latest"])


def test_link_that_is_turned_during_the_save_does_not_move_it(tmp_path: Path) -> None:
    one, other, link = tmp_path / "one", tmp_path / "other", tmp_path / "latest"
    one.mkdir()
    other.mkdir()
    link.symlink_to(one)

    def turn() -> None:
        link.unlink()
        link.symlink_to(other)

    with meanwhile(tmp_path, "before manifest", turn):
        put(link, 1)
    check_held(one, 1)
    assert os.listdir(other) == []


def save_into_mounts(root: Path) -> list[str]:
    """Save to a mount point, and into a directory with a mount point below it."""
    point, outer = root / "mounted", root / "outer"
    put_files(outer, {"data/x": "", "notes": "mine"})
    point.mkdir()
    mount_tmpfs(point)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(outer / "data")], check=True)
    (outer / "data" / "below").write_text("mine")
    (root / "bound").mkdir()
    subprocess.run(["mount", "--bind", str(outer), str(root / "bound")], check=True)
    said = []
    for path in (point, root / "bound"):
        with pytest.raises(TargetExistsError) as caught:
            put(path, 1)
        said.append(str(caught.value))
    put(outer, 1)
    check_held(outer, 1)
    said.append((outer / "data" / "below").read_text())
    said.append((outer / "notes").read_text())
    with pytest.raises(CommitError) as refused:
        put(outer, 2, overwrite=True)
    said.append(str(refused.value))
    check_held(outer, 1)
    assert sorted(os.listdir(root)) == ["bound", "mounted", "outer"]
    return said


@needs_mounts
def test_mount_points_are_refused_or_left_in_their_place(tmp_path: Path) -> None:
    point, bound, below, notes, refused = in_fresh_process(
        save_into_mounts, tmp_path, timeout_s=120
    )
    assert "something is mounted there" in point
    assert "something is mounted there" in bound
    assert (below, notes) == ("mine", "mine")
    assert "data/below" in refused
    assert "EXDEV" in refused
    assert "untouched" in refused


# Other ways to a target


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("held", ["nothing", "checkpoint"])
def test_files_stay_when_only_the_export_fails(tmp_path: Path, held: str) -> None:
    target = tmp_path / "step-1"
    if held == "checkpoint":
        put(target, 1)
        put_files(target, {"hf/notes.md": "by hand"})
    put_files(target)
    with pytest.raises(ExportError):
        put(
            target,
            2,
            overwrite=held == "checkpoint",
            export=HFExport(assets=[Unwilling()]),
        )
    state = {"model": {"w": torch.zeros(2, 3)}}
    dcp.load(state, checkpoint_id=target, no_dist=True)
    assert torch.equal(state["model"]["w"], VALUE["model"]["w"] + 2)
    assert files_of_others(target) == FILES
    assert not (target / "hf" / "model.safetensors").exists()
    assert (target / "hf").exists() == (held == "checkpoint")
    assert os.listdir(tmp_path) == ["step-1"]


@pytest.mark.usefixtures("way")
def test_materialize_takes_a_directory_with_files(tmp_path: Path) -> None:
    put(tmp_path / "once", 1, weights="once")
    target = tmp_path / "plain"
    put_files(target)
    materialize(tmp_path / "once", target)
    assert files_of_others(target) == FILES
    with pytest.raises(TargetExistsError, match="overwrite=True"):
        materialize(tmp_path / "once", target)
    put_files(target, {"later": "later"})
    materialize(tmp_path / "once", target, overwrite=True)
    state = {"model": {"w": torch.zeros(2, 3)}}
    dcp.load(state, checkpoint_id=target, no_dist=True)
    assert torch.equal(state["model"]["w"], VALUE["model"]["w"] + 1)
    assert files_of_others(target, {**FILES, "later": "later"}) == {**FILES, "later": "later"}


def save_into_files(rank: int, world_size: int, root: Path) -> None:
    """Save into a directory in which every rank goes on writing, as trainers do."""
    target = root / "step-1"
    if rank == 0:
        put_files(target)
    dist.barrier()
    (target / f"rng_of_{rank}").write_text("rng")
    check_outcomes([save(root, "step-1", 1)], None)
    check_outcomes([save(root, "step-1", 2, overwrite=True)], None)


def test_ranks_save_into_a_directory_with_files(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run_ranks(save_into_files, 2, root)
    files = {**FILES, "rng_of_0": "rng", "rng_of_1": "rng"}
    assert files_of_others(root / "step-1", files) == files
    assert save_held_by(root / "step-1", others=files) == 2


def publish(target: Path, start: threading.Barrier, raised: list[BaseException]) -> None:
    directory = StagingDirectory.of(str(target), new_save_id())
    directory.create(overwrite=False).close()
    Path(directory.path, "dcp-hf.json").write_text(f'{{"save_id": "{directory.save_id}"}}')
    start.wait()
    try:
        directory.publish(overwrite=False)
    except TargetExistsError as error:
        raised.append(error)
    finally:
        directory.remove()


@pytest.mark.usefixtures("way")
def test_one_of_two_saves_into_one_directory_wins(tmp_path: Path) -> None:
    for number in range(8):
        target = tmp_path / f"step-{number}"
        put_files(target)
        start, raised = threading.Barrier(2), []
        threads = [threading.Thread(target=publish, args=(target, start, raised)) for _ in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(raised) == 1
        assert files_of_others(target) == FILES
        assert sorted(os.listdir(tmp_path)) == [f"step-{n}" for n in range(number + 1)]
