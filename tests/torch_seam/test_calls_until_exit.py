"""A process ends in peace while one of its daemon threads calls torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dcp_hf_writer.torch_seam.calls_until_exit import CallsUntilExit

STORE = """
import threading, time
from datetime import timedelta
from torch.distributed import TCPStore
from dcp_hf_writer.save.failure_explanations import _ask
from dcp_hf_writer.torch_seam.calls_until_exit import CALLS_UNTIL_EXIT

store = TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(seconds=5))

def requests():
    until = time.monotonic() + 1
    while time.monotonic() < until:
        store.check(["key"])
"""

HOW = {
    "a question that takes too long": "print(_ask(requests, otherwise='none', limit_s=0.2))",
    "one request after another": """
def requests_for_ever():
    while True:
        with CALLS_UNTIL_EXIT.call():
            store.check(["key"])
threading.Thread(target=requests_for_ever, daemon=True).start()
time.sleep(0.2)
print("none")
""",
}


@pytest.mark.parametrize("how", HOW)
def test_process_ends_well_while_a_daemon_thread_asks_the_store(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STORE + HOW[how]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "none"), done.stderr


def test_no_call_begins_after_the_end() -> None:
    calls = CallsUntilExit()
    with calls.call():
        calls.end(most_s=0.01)
    with pytest.raises(SystemExit), calls.call():
        pass
    calls.end()
