"""Two hosts on one machine: network, mount and host name namespaces, joined by a veth pair.

Each host has its own boot id, because a private mount hides that of the machine. So the code under
test takes processes in different namespaces for processes on different hosts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from support.mounts import join_mounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_CLONE_NEWUTS = 0x04000000
_CLONE_NEWNET = 0x40000000

_LINK = "dcphf0"
_HOLD = """
set -e
echo {name} > /proc/sys/kernel/hostname
mount --bind {boot_id} /proc/sys/kernel/random/boot_id
ip link set lo up
echo ready
exec cat
"""


@dataclass(frozen=True)
class Host:
    """One host; plain values that pickle."""

    name: str
    """Its host name."""
    address: str
    """Its address on the link to the other host."""
    pid: int
    """A process that lives in its namespaces."""

    def join(self) -> None:
        """Move the calling thread, and the threads that it starts from now on, to this host."""
        join_mounts(self.pid)
        for kind, flag in (("uts", _CLONE_NEWUTS), ("net", _CLONE_NEWNET)):
            self._join(kind, flag)
        os.environ["GLOO_SOCKET_IFNAME"] = _LINK

    def _join(self, kind: str, flag: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(fd, flag) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), f"setns({kind})")
        finally:
            os.close(fd)

    def call(self, act: Callable[[], Any]) -> Any:
        """Call a function in a thread that uses the network of this host."""
        found: list[Any] = []

        def run() -> None:
            try:
                self._join("net", _CLONE_NEWNET)
                found.append((act(), None))
            except BaseException as error:  # noqa: BLE001 - raised in the calling thread
                found.append((None, error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        value, error = found[0]
        if error is not None:
            raise error
        return value

    def cut_link(self) -> None:
        """Take the link down: what is sent is lost, and no connection is closed."""
        _run(["nsenter", "--target", str(self.pid), "--net", "ip", "link", "set", _LINK, "down"])

    @property
    def command(self) -> list[str]:
        """What to put before a command so that it runs on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount"]


def why_no_hosts(work: Path) -> str | None:
    """Return why hosts cannot be made here; `None` if they can."""
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    try:
        with two_hosts(work):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        text = getattr(error, "stderr", None) or error
        return f"namespaces joined by a veth pair cannot be made here: {text}"


@contextlib.contextmanager
def two_hosts(work: Path) -> Iterator[tuple[Host, Host]]:
    """Make two hosts for the body of the `with` statement.

    Args:
        work: Directory for small files.

    Raises:
        OSError: If this user may not make namespaces.
        subprocess.CalledProcessError: If the link cannot be made.
    """
    with contextlib.ExitStack() as held:
        one, two = (
            Host(f"host-{letter}", f"10.213.77.{number}", _holder(held, work, f"host-{letter}"))
            for number, letter in enumerate("ab", 1)
        )
        ends = [["name", _LINK, "netns", str(host.pid)] for host in (one, two)]
        _run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]])
        for host in (one, two):
            inside = ["nsenter", "--target", str(host.pid), "--net", "ip"]
            _run([*inside, "addr", "add", f"{host.address}/24", "dev", _LINK])
            _run([*inside, "link", "set", _LINK, "up"])
        yield one, two


def _holder(held: contextlib.ExitStack, work: Path, name: str) -> int:
    """Start the process that keeps the namespaces of a host; it ends when its input does."""
    boot_id = work / f"{name}-boot-id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    script = _HOLD.format(name=name, boot_id=boot_id)
    process = held.enter_context(
        subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    held.callback(process.kill)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        assert process.stderr is not None
        raise OSError(process.stderr.read().strip())
    return process.pid


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
