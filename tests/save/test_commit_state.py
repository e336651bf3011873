"""The states of a save: one that was given up does not commit, one that commits is open."""

from __future__ import annotations

import threading

from dcp_hf_writer.save.commit_state import CommitState


def test_save_that_runs_may_commit() -> None:
    state = CommitState()
    assert not state.is_given_up
    assert state.begin_commit()
    assert not state.is_given_up


def test_save_that_was_given_up_never_commits() -> None:
    state = CommitState()
    assert state.give_up()
    assert state.is_given_up
    assert not state.begin_commit()
    assert state.give_up()


def test_save_that_commits_cannot_be_given_up_any_more() -> None:
    state = CommitState()
    assert state.begin_commit()
    assert not state.give_up()
    assert state.is_given_up
    assert not state.give_up()
    assert not state.begin_commit()


def test_commit_begins_once() -> None:
    state = CommitState()
    assert state.begin_commit()
    assert not state.begin_commit()


def test_save_ends_once() -> None:
    state = CommitState()
    assert not state.is_ended
    assert state.end()
    assert state.is_ended
    assert not state.end()


def test_either_the_commit_or_giving_up_wins_when_threads_race() -> None:
    for _ in range(200):
        state, meeting = CommitState(), threading.Barrier(2)
        gave_up: list[bool] = []

        def give_up(state: CommitState = state, meeting: threading.Barrier = meeting) -> None:
            meeting.wait()
            gave_up.append(state.give_up())  # noqa: B023 - joined before the next round

        thread = threading.Thread(target=give_up)
        thread.start()
        meeting.wait()
        commits = state.begin_commit()
        thread.join()
        assert commits != gave_up[0]
