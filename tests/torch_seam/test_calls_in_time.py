"""A call that nothing can end does not keep its caller beyond a limit."""

from __future__ import annotations

import threading
import time

import pytest

from dcp_hf_writer.torch_seam.calls_in_time import call_in_time


def test_result_and_error_of_the_call_are_passed_on() -> None:
    assert call_in_time(lambda: 7, limit_s=10) == 7
    with pytest.raises(ZeroDivisionError):
        call_in_time(lambda: 1 // 0, limit_s=10)


def test_call_that_does_not_return_is_given_up() -> None:
    go = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
        call_in_time(go.wait, limit_s=0.1)
    go.set()
    assert time.monotonic() - began >= 0.1
