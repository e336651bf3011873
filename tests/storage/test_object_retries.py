"""How long calls to an object store wait between tries, and how many requests are in flight."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from dcp_hf_writer.errors import SaveTimeoutError, WriteError
from dcp_hf_writer.storage import object_retries
from dcp_hf_writer.storage.object_contract import Patience
from dcp_hf_writer.storage.object_retries import RequestFault, RequestLimit, Retries

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOW_DOWN = RequestFault(passes=True, text="503 SlowDown", asks_for_less=True)
REFUSED = RequestFault(passes=False, text="403 AccessDenied", errno=13, hint="check them")


def patience(seconds: float = 60) -> Patience:
    return Patience(time.monotonic() + seconds)


def test_waits_grow_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(patience: Patience, until: float) -> Iterator[float]:
        asked.append(until - time.monotonic())
        return iter(())

    monkeypatch.setattr(object_retries, "waits", noted)
    retries = Retries(patience(3600), path="s3://b/k", what="put")
    for _ in range(12):
        retries.wait_after(SLOW_DOWN)
    full = [min(0.1 * 2**n, 15) for n in range(12)]
    # Jitter takes up to half away; the clock has gone on a little.
    assert all(0.4 * most <= wait <= most for wait, most in zip(asked, full, strict=True))


def test_wait_ends_early_when_the_save_is_given_up() -> None:
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("given up")

    with pytest.raises(RuntimeError, match="given up"):
        for _ in object_retries.waits(
            Patience(time.monotonic() + 60, check), time.monotonic() + 50
        ):
            pass


def test_wait_fails_at_once_when_the_deadline_would_pass() -> None:
    retries = Retries(patience(0.01), path="s3://b/k", what="put")
    with pytest.raises(SaveTimeoutError, match="1 failed tries; the last answer was: 503 SlowDown"):
        retries.wait_after(SLOW_DOWN)


def test_refusal_is_raised_with_its_facts() -> None:
    retries = Retries(patience(), path="s3://b/k", what="put")
    with pytest.raises(WriteError, match=r"put \(s3://b/k\); found 403 AccessDenied") as raised:
        retries.wait_after(REFUSED)
    assert (raised.value.errno, raised.value.hint) == (13, "check them")


def test_limit_halves_once_for_the_requests_of_one_moment() -> None:
    limit = RequestLimit()
    begun = time.monotonic()
    for _ in range(10):
        limit.learn(SLOW_DOWN, begun_at=begun)
    assert limit.limit == limit.most / 2
    limit.learn(SLOW_DOWN, begun_at=time.monotonic())
    assert limit.limit == limit.most / 4


def test_limit_never_falls_below_one_and_grows_back() -> None:
    limit = RequestLimit(most=4, limit=4)
    for _ in range(10):
        limit.learn(SLOW_DOWN, begun_at=time.monotonic())
    assert limit.limit == 1
    for _ in range(100):
        limit.learn(None, begun_at=time.monotonic())
    assert limit.limit == 4


def test_other_faults_leave_the_limit() -> None:
    limit = RequestLimit()
    limit.learn(RequestFault(passes=True, text="500"), begun_at=time.monotonic())
    assert limit.limit == limit.most


def test_request_waits_when_the_limit_is_reached() -> None:
    limit = RequestLimit(most=1, limit=1)
    entered = threading.Event()

    def second() -> None:
        with limit.one(patience()) as has_place:
            assert has_place
            entered.set()

    with limit.one(patience()) as has_place:
        assert has_place
        thread = threading.Thread(target=second)
        thread.start()
        with limit.one(patience(0.05)) as third:
            assert not third
        assert not entered.is_set()
    assert entered.wait(60)
    thread.join()
    assert limit.in_flight == 0
