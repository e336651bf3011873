"""Two networks of a test's own, joined by a link that the test can cut."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
PORT = 29500
"""Port of the first network; nobody else is in it."""


@dataclass(frozen=True)
class Networks:
    """Names and addresses of two network namespaces."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.99.0.1", "10.99.0.2")
    device: str = "link0"

    def join(self, number: int) -> None:
        """Move the calling thread, and those that it starts, into one of the two."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/run/netns/{self.names[number]}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(fd, _CLONE_NEWNET) != 0:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), "setns(CLONE_NEWNET)")
        finally:
            os.close(fd)

    def cut(self) -> None:
        """Take the link down: what is sent is lost, and no connection is closed."""
        _ip("-n", self.names[0], "link", "set", self.device, "down")


@contextlib.contextmanager
def two_networks() -> Iterator[Networks]:
    """Make two networks with a link; they are removed at the end."""
    stem = f"dcp-hf-{uuid.uuid4().hex[:8]}"
    networks = Networks((f"{stem}-a", f"{stem}-b"))
    one, other = networks.names
    with contextlib.ExitStack() as stack:
        for name in networks.names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        device = networks.device
        _ip(
            *("link", "add", device, "netns", one, "type", "veth"),
            *("peer", "name", device, "netns", other),
        )
        for name, address in zip(networks.names, networks.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for each in ("lo", device):
                _ip("-n", name, "link", "set", each, "up")
        yield networks


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _why_not() -> str | None:
    if shutil.which("ip") is None:
        return "the command ip (iproute2) is not installed"
    try:
        with two_networks():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made here: {error.stderr.decode().strip()}"


_REASON = _why_not()
needs_networks = pytest.mark.skipif(_REASON is not None, reason=_REASON or "")
