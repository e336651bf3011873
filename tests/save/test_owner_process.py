"""Who makes a checkpoint, and whether that process is gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from dcp_hf_writer.save import owner_process
from dcp_hf_writer.save.owner_process import (
    Owner,
    is_abandoned,
    is_over_here,
    mark_active,
    mark_ended,
    new_save_id,
)

OTHER_HOST = {"host": "elsewhere", "boot_id": "00000000-0000"}


def test_owner_survives_json() -> None:
    assert Owner.from_json(Owner.me().to_json()) == Owner.me()


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {**Owner.me().to_json(), "more": 1},
        {**Owner.me().to_json(), "pid": "1"},
        {**Owner.me().to_json(), "host": None},
    ],
)
def test_record_that_is_none_is_told_apart(record: object) -> None:
    assert Owner.from_json(record) is None


def test_this_process_is_alive() -> None:
    assert Owner.me().is_dead() is False


def started(code: str = "import sys; sys.stdin.read()") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)


def owner_of(process: subprocess.Popen[bytes]) -> Owner:
    return replace(Owner.me(), pid=process.pid, started=owner_process._started(process.pid)[1])


def test_process_is_dead_once_it_is_killed_also_while_nobody_waited_for_it() -> None:
    process = started()
    owner = owner_of(process)
    assert owner.is_dead() is False
    process.send_signal(signal.SIGSTOP)
    assert owner.is_dead() is False
    process.kill()
    # Not reaped: a zombie has an entry in /proc, and writes nothing.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_dead() is True
    process.communicate()
    assert owner.is_dead() is True


def test_later_process_with_the_same_number_is_not_the_owner() -> None:
    assert replace(Owner.me(), started=Owner.me().started - 1).is_dead() is True


def test_process_of_a_boot_before_is_dead() -> None:
    assert replace(Owner.me(), boot_id="00000000-0000").is_dead() is True


@pytest.mark.parametrize("other", [OTHER_HOST, {"pid_namespace": "pid:[1]"}], ids=["host", "pids"])
def test_process_that_cannot_be_seen_from_here_is_neither(other: dict[str, str]) -> None:
    assert replace(Owner.me(), **other).is_dead() is None


def test_owner_is_told_by_name_with_spaces_and_parentheses() -> None:
    code = (
        "import ctypes, sys\n"
        "ctypes.CDLL(None).prctl(15, b'a) Z 1 (b', 0, 0, 0)\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert owner_of(process).is_dead() is False
    process.communicate()


# Save ids


def test_save_ids_are_unique_sort_by_time_and_name_their_process() -> None:
    ids = [new_save_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert [one[:15] for one in ids] == sorted(one[:15] for one in ids)
    assert all(
        re.fullmatch(rf"\d{{8}}T\d{{6}}-[0-9a-f]{{8}}-{os.getpid()}-[0-9a-f]{{12}}", one)
        for one in ids
    )
    # Trainers look for the step in names.
    assert not any("step" in one for one in ids)


def test_id_tells_that_its_save_is_over_once_its_process_is_gone() -> None:
    process = started()
    theirs = new_save_id().replace(f"-{os.getpid()}-", f"-{process.pid}-")
    assert not is_over_here(theirs)
    process.communicate()
    assert is_over_here(theirs)


def test_id_of_this_process_tells_that_its_save_is_over_once_it_has_ended() -> None:
    save_id = new_save_id()
    mark_active(save_id, "run")
    assert not is_over_here(save_id)
    mark_ended(save_id)
    assert is_over_here(save_id)


@pytest.mark.parametrize("save_id", ["", "a", "20260101T000000-00000000-1-ab", "x-y-z-w"])
def test_id_of_elsewhere_tells_nothing(save_id: str) -> None:
    assert not is_over_here(save_id)


def test_save_of_this_process_is_abandoned_once_it_has_ended() -> None:
    save_id = new_save_id()
    mark_active(save_id, "run")
    assert is_abandoned(save_id, Owner.me()) is False
    mark_ended(save_id)
    mark_ended(save_id)
    assert is_abandoned(save_id, Owner.me()) is True


def test_save_whose_halves_lie_apart_is_over_when_both_have_ended() -> None:
    save_id = new_save_id()
    mark_active(save_id, "run")
    mark_active(save_id, "exports")
    for _ in range(2):
        mark_ended(save_id, "exports")
        assert is_abandoned(save_id, Owner.me()) is False
        assert not is_over_here(save_id)
    mark_ended(save_id, "run")
    assert is_abandoned(save_id, Owner.me()) is True
    assert is_over_here(save_id)


def test_save_of_another_process_is_abandoned_when_that_is_dead() -> None:
    save_id = new_save_id()
    assert is_abandoned(save_id, replace(Owner.me(), started=1)) is True
    assert is_abandoned(save_id, replace(Owner.me(), **OTHER_HOST)) is None
    process = started()
    assert is_abandoned(save_id, owner_of(process)) is False
    process.communicate()
