from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dcp_hf_writer.errors import CheckpointError, ConfigError, SlotTimeoutError, StorageError
from dcp_hf_writer.storage import slot_lock_files
from dcp_hf_writer.storage import write_slots as slots_module
from dcp_hf_writer.storage.write_slots import HALF_ENV, SHARED_ENV, SlotHold, WriteSlots

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SHARED_ENV, *HALF_ENV.values()):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's temporary directory, as the default directory of slots sees it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def hold_all(slots: WriteSlots, target: Path, half: Any = "dcp") -> SlotHold:
    with slots.hold(str(target), half, deadline=time.monotonic()) as hold:
        return hold


# Options


@pytest.mark.parametrize(
    "options",
    [
        {"slots": -1},
        {"slots": 1.5},
        {"slots": True},
        {"slots": "2"},
        {"per": "directory"},
        {"per": "rank"},
        {"directory": ""},
        {"timeout_s": 0.0},
        {"timeout_s": -1.0},
        {"timeout_s": float("nan")},
    ],
)
def test_options_are_refused_when_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=re.escape(next(iter(options)))) as caught:
        WriteSlots(**options)
    assert repr(next(iter(options.values()))) in str(caught.value)


def test_write_slots_survive_pickling() -> None:
    slots = WriteSlots(slots=3, directory="/some/where", timeout_s=1.5)
    assert pickle.loads(pickle.dumps(slots)) == slots


# Counting


def test_hold_reports_its_slot_and_no_wait_when_free(tmp_path: Path) -> None:
    slots = WriteSlots(slots=1, directory=str(tmp_path / "locks"))
    # The deadline has passed, so only the first attempt can get the slot.
    with slots.hold(str(tmp_path), "dcp", deadline=0.0) as hold:
        assert hold.index == 0
        assert hold.waited_s >= 0.0


def test_hold_locks_nothing_when_count_is_zero(tmp_path: Path) -> None:
    slots = WriteSlots(slots=0, directory=str(tmp_path / "locks"))
    with slots.hold(str(tmp_path), "dcp", deadline=0.0) as hold:
        assert hold == SlotHold(waited_s=0.0, index=None)
    assert not (tmp_path / "locks").exists()


def test_hold_takes_each_slot_once_when_nested(tmp_path: Path) -> None:
    slots = WriteSlots(slots=2, directory=str(tmp_path / "locks"))
    target = str(tmp_path)
    with (
        slots.hold(target, "dcp", deadline=soon()) as first,
        slots.hold(target, "hf", deadline=soon()) as second,
    ):
        assert {first.index, second.index} == {0, 1}
        with pytest.raises(SlotTimeoutError):
            hold_all(slots, tmp_path)
    assert hold_all(slots, tmp_path).index in {0, 1}


def test_hold_is_given_back_when_the_body_raises(tmp_path: Path) -> None:
    slots = WriteSlots(slots=1, directory=str(tmp_path / "locks"))
    with (
        pytest.raises(RuntimeError, match="body"),
        slots.hold(str(tmp_path), "dcp", deadline=soon()),
    ):
        raise RuntimeError("body")
    assert hold_all(slots, tmp_path).index == 0


def test_threads_of_one_process_count_one_by_one(tmp_path: Path) -> None:
    slots = WriteSlots(slots=2, directory=str(tmp_path / "locks"))
    inside, most, held = 0, 0, 0
    guard = threading.Lock()
    full = threading.Event()

    def write() -> None:
        nonlocal inside, most, held
        for _ in range(3):
            with slots.hold(str(tmp_path), "dcp", deadline=soon(20)):
                with guard:
                    inside += 1
                    held += 1
                    most = max(most, inside)
                    if inside == 2:
                        full.set()
                full.wait(10)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, held) == (2, 12)


def test_slot_may_be_given_back_by_another_thread(tmp_path: Path) -> None:
    slots = WriteSlots(slots=1, directory=str(tmp_path / "locks"))
    manager = slots.hold(str(tmp_path), "dcp", deadline=soon())
    manager.__enter__()
    thread = threading.Thread(target=manager.__exit__, args=(None, None, None))
    thread.start()
    thread.join(10)
    assert hold_all(slots, tmp_path).index == 0


# Which set of slots


def test_targets_share_slots_when_on_one_file_system(tmp_path: Path) -> None:
    slots = WriteSlots(slots=1, directory=str(tmp_path / "locks"))
    with (
        slots.hold(str(tmp_path / "run-1/step-100"), "dcp", deadline=soon()),
        pytest.raises(SlotTimeoutError),
    ):
        hold_all(slots, tmp_path / "run-2")


@pytest.mark.parametrize("given", [True, False])
def test_targets_have_slots_of_their_own_when_on_another_file_system(
    temporary: Path, *, given: bool
) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == temporary.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    slots = WriteSlots(slots=1, directory=str(temporary / "locks") if given else None)
    with slots.hold(str(temporary), "dcp", deadline=soon()):
        assert hold_all(slots, other / "step-100").index == 0


def test_shared_directory_names_file_systems_by_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two nodes see one file system under one mount point with different device numbers.
    mount = tmp_path / "mount"
    (mount / "run").mkdir(parents=True)

    def device_on_node(number: int) -> None:
        monkeypatch.setattr(
            slot_lock_files,
            "_device_of",
            lambda path: (
                None if "step" in path else number if path.startswith(str(mount)) else number + 1
            ),
        )

    device_on_node(40)
    first = (
        slot_lock_files.key_by_mount(str(mount / "run/step-1")),
        slot_lock_files.key_by_device(str(mount)),
    )
    device_on_node(60)
    second = (
        slot_lock_files.key_by_mount(str(mount / "step-2")),
        slot_lock_files.key_by_device(str(mount)),
    )
    assert first[0] == second[0]
    assert first[0] != slot_lock_files.key_by_mount(str(tmp_path))
    assert (first[1], second[1]) == ("28", "3c")


def test_halves_share_one_set_by_default(tmp_path: Path) -> None:
    slots = WriteSlots(slots=1, directory=str(tmp_path / "locks"))
    with slots.hold(str(tmp_path), "dcp", deadline=soon()), pytest.raises(SlotTimeoutError):
        hold_all(slots, tmp_path, "hf")


# Environment


def test_environment_overrides_the_shared_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = WriteSlots(slots=1, directory=str(tmp_path / "locks"))
    with slots.hold(str(tmp_path), "dcp", deadline=soon()):
        monkeypatch.setenv(SHARED_ENV, "2")
        assert hold_all(slots, tmp_path, "hf").index == 1
        monkeypatch.setenv(SHARED_ENV, "0")
        assert hold_all(slots, tmp_path, "hf").index is None


def test_environment_gives_a_half_its_own_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HALF_ENV["hf"], "1")
    slots = WriteSlots(slots=1, directory=str(tmp_path / "locks"))
    with slots.hold(str(tmp_path), "dcp", deadline=soon()):
        with slots.hold(str(tmp_path), "hf", deadline=soon()) as own:
            assert own.index == 0
            with pytest.raises(SlotTimeoutError):
                hold_all(slots, tmp_path, "hf")
        with pytest.raises(SlotTimeoutError):
            hold_all(slots, tmp_path, "dcp")


def test_environment_of_a_half_wins_over_the_shared_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHARED_ENV, "1")
    monkeypatch.setenv(HALF_ENV["dcp"], "0")
    slots = WriteSlots(directory=str(tmp_path / "locks"))
    assert hold_all(slots, tmp_path, "dcp").index is None
    assert hold_all(slots, tmp_path, "hf").index == 0


@pytest.mark.parametrize("name", [SHARED_ENV, *HALF_ENV.values()])
@pytest.mark.parametrize("value", ["", "-1", "1.5", "two", " 2", "²"])
def test_environment_is_refused_when_not_a_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    half = "hf" if name == HALF_ENV["hf"] else "dcp"
    with pytest.raises(ConfigError) as caught:
        hold_all(WriteSlots(directory=str(tmp_path / "locks")), tmp_path, half)
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


# Waiting


def test_timeout_names_slots_directory_target_and_holders(tmp_path: Path) -> None:
    directory = tmp_path / "locks"
    slots = WriteSlots(slots=2, directory=str(directory))
    target = tmp_path / "step-7"
    with (
        slots.hold(str(target), "dcp", deadline=soon()),
        slots.hold(str(target), "dcp", deadline=soon()),
        pytest.raises(SlotTimeoutError) as caught,
    ):
        hold_all(slots, target)
    text = str(caught.value)
    assert str(target) in text
    assert f"one of 2 slots in {directory}" in text
    assert text.count(f"pid {os.getpid()} on ") == 2


@pytest.mark.parametrize(("timeout_s", "wait_s"), [(None, 0.2), (0.1, 60.0)])
def test_wait_ends_at_the_nearer_of_deadline_and_timeout(
    tmp_path: Path, timeout_s: float | None, wait_s: float
) -> None:
    directory = str(tmp_path / "locks")
    slots = WriteSlots(slots=1, directory=directory, timeout_s=timeout_s)
    with slots.hold(str(tmp_path), "dcp", deadline=soon()):
        started = time.monotonic()
        with (
            pytest.raises(SlotTimeoutError),
            slots.hold(str(tmp_path), "dcp", deadline=started + wait_s),
        ):
            raise AssertionError
        waited_s = time.monotonic() - started
    assert min(wait_s, timeout_s or wait_s) <= waited_s < 10


def test_wait_is_reported_and_logged_when_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slots_module, "_LOG_AFTER_S", 0.05)
    caplog.set_level(logging.INFO, logger="dcp_hf_writer.storage.write_slots")
    slots = WriteSlots(slots=1, directory=str(tmp_path / "locks"))
    manager = slots.hold(str(tmp_path), "dcp", deadline=soon())
    manager.__enter__()
    timer = threading.Timer(0.3, manager.__exit__, args=(None, None, None))
    timer.start()
    with slots.hold(str(tmp_path), "hf", deadline=soon(30)) as hold:
        assert hold.waited_s >= 0.2
    timer.join(10)
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"waiting for one of 1 write slots for {tmp_path}, held by slot 0: pid")
    assert second.startswith(f"got write slot 0 for {tmp_path} after 0.")


def test_wait_is_not_logged_when_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dcp_hf_writer.storage.write_slots")
    hold_all(WriteSlots(directory=str(tmp_path / "locks")), tmp_path)
    assert caplog.records == []


# The directory


def test_default_directory_is_made_private(temporary: Path) -> None:
    hold_all(WriteSlots(), temporary)
    made = temporary / f"dcp-hf-writer-{os.geteuid()}"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    files = list(made.iterdir())
    assert len(files) == 1
    assert re.fullmatch(r"[0-9a-f]+\.[01]\.lock", files[0].name)
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o600


def test_given_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    directory = tmp_path / "a/b/locks"
    hold_all(WriteSlots(directory=str(directory)), tmp_path)
    assert len(list(directory.iterdir())) == 1


def test_given_directory_may_be_a_link_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    hold_all(WriteSlots(directory=str(tmp_path / "link")), tmp_path)
    assert len(list((tmp_path / "real").iterdir())) == 1


def _as_symlink(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


def _as_file(path: Path) -> None:
    path.write_bytes(b"precious")


def _as_group_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        (_as_symlink, "a symbolic link"),
        (_as_file, "not a directory"),
        (_as_group_writable, "mode 0770"),
    ],
)
def test_default_directory_is_refused_when_others_may_have_placed_something(
    temporary: Path, place: Any, found: str
) -> None:
    directory = temporary / f"dcp-hf-writer-{os.geteuid()}"
    place(directory)
    with pytest.raises(StorageError) as caught:
        hold_all(WriteSlots(), temporary)
    assert str(directory) in str(caught.value)
    assert found in str(caught.value)


def test_default_directory_is_refused_when_owned_by_another_user(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(StorageError, match=f"owned by user {owner}, not {owner + 1}"):
        hold_all(WriteSlots(), temporary)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_given_directory_is_refused_when_others_may_write(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "locks"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(StorageError, match=f"mode {mode:04o}"):
        hold_all(WriteSlots(directory=str(directory)), tmp_path)


@pytest.mark.parametrize("under", ["file/locks", "/proc/locks-of-slots"])
def test_directory_that_cannot_be_made_is_named(tmp_path: Path, under: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    directory = str(tmp_path / under)
    with pytest.raises(StorageError) as caught:
        hold_all(WriteSlots(directory=directory), tmp_path)
    assert directory in str(caught.value)
    assert caught.value.errno is not None


def test_read_only_directory_is_a_storage_error_for_an_ordinary_user() -> None:
    # A process of its own, so that root can become nobody.
    code = (
        "import os, sys, tempfile, time\n"
        "from dcp_hf_writer.errors import StorageError\n"
        "from dcp_hf_writer.storage.write_slots import WriteSlots\n"
        "base = tempfile.mkdtemp()\n"
        "os.chmod(base, 0o755)\n"
        "locks = os.path.join(base, 'locks')\n"
        "os.mkdir(locks)\n"
        "if os.geteuid() == 0:\n"
        "    os.chown(locks, 65534, 65534)\n"
        "os.chmod(locks, 0o500)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    if os.geteuid() == 0:\n"
        "        os.setuid(65534)\n"
        "    try:\n"
        "        with WriteSlots(directory=locks).hold(base, 'dcp', deadline=time.monotonic()):\n"
        "            os._exit(1)\n"
        "    except StorageError as error:\n"
        "        sys.stdout.write(str(error))\n"
        "        sys.stdout.flush()\n"
        "        os._exit(0)\n"
        "status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "os.chmod(locks, 0o700)\n"
        "os.rmdir(locks)\n"
        "os.rmdir(base)\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "TMPDIR": "/tmp"},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"write slot cannot be locked \(/tmp/.*\.lock\); found Perm", done.stdout)


def test_release_succeeds_when_directory_was_deleted(tmp_path: Path) -> None:
    directory = tmp_path / "locks"
    slots = WriteSlots(slots=1, directory=str(directory))
    with slots.hold(str(tmp_path), "dcp", deadline=soon()):
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
    assert hold_all(slots, tmp_path).index == 0


def test_default_directory_is_made_private_again_when_readable(temporary: Path) -> None:
    directory = temporary / f"dcp-hf-writer-{os.geteuid()}"
    directory.mkdir()
    directory.chmod(0o755)
    hold_all(WriteSlots(), temporary)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_waiter_makes_the_directory_anew_when_deleted(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = temporary / f"dcp-hf-writer-{os.geteuid()}"
    slots = WriteSlots(slots=1)
    slept: list[float] = []

    def delete_while_asleep(seconds: float) -> None:
        shutil.rmtree(directory)
        slept.append(seconds)

    with slots.hold(str(temporary), "dcp", deadline=soon()):
        monkeypatch.setattr(time, "sleep", delete_while_asleep)
        with slots.hold(str(temporary), "dcp", deadline=soon()) as hold:
            assert hold.index == 0
    assert len(slept) == 1
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


# The lock files


@pytest.fixture
def lock_path(tmp_path: Path) -> Iterator[Path]:
    """The lock file of a set of one slot, in `tmp_path / "locks"`, before it is made."""
    key = slot_lock_files.key_by_mount(str(tmp_path))
    directory = tmp_path / "locks"
    directory.mkdir(mode=0o700)
    return directory / f"{key}.0.lock"


def test_lock_path_is_refused_when_a_symlink(tmp_path: Path, lock_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    lock_path.symlink_to(victim)
    slots = WriteSlots(slots=1, directory=str(lock_path.parent))
    with pytest.raises(StorageError, match="must not be a symbolic link") as caught:
        hold_all(slots, tmp_path)
    assert str(lock_path) in str(caught.value)
    assert victim.read_bytes() == b"precious"


def test_dangling_symlink_creates_nothing_when_at_the_lock_path(
    tmp_path: Path, lock_path: Path
) -> None:
    lock_path.symlink_to(tmp_path / "absent")
    with pytest.raises(StorageError):
        hold_all(WriteSlots(slots=1, directory=str(lock_path.parent)), tmp_path)
    assert not (tmp_path / "absent").exists()


def test_lock_path_is_refused_when_a_directory(tmp_path: Path, lock_path: Path) -> None:
    lock_path.mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        hold_all(WriteSlots(slots=1, directory=str(lock_path.parent)), tmp_path)


def test_holder_is_replaced_whole_when_a_longer_one_was_noted(
    tmp_path: Path, lock_path: Path
) -> None:
    lock_path.write_text("pid 123456789 on " + "x" * 80 + "\n")
    with WriteSlots(slots=1, directory=str(lock_path.parent)).hold(
        str(tmp_path), "dcp", deadline=soon()
    ):
        text = lock_path.read_text()
    assert re.fullmatch(rf"pid {os.getpid()} on [^\n]+\n", text)


def test_slot_is_held_although_the_holder_cannot_be_noted(
    tmp_path: Path, lock_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    slots = WriteSlots(slots=1, directory=str(lock_path.parent))
    with slots.hold(str(tmp_path), "dcp", deadline=soon()):
        with pytest.raises(SlotTimeoutError, match="slot 0: unknown") as caught:
            hold_all(slots, tmp_path)
        assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    assert lock_path.read_bytes() == b""


def test_every_error_is_of_the_package(tmp_path: Path, lock_path: Path) -> None:
    lock_path.mkdir()
    with pytest.raises(CheckpointError) as caught:
        hold_all(WriteSlots(slots=1, directory=str(lock_path.parent)), tmp_path)
    assert caught.value.phase == "write"
    assert caught.value.__cause__ is not None
