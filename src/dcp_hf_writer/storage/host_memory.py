"""How much memory this process can still fill: that of the host, and that of its cgroups.

Shared memory counts towards both. If a cgroup has no more, the kernel kills a process that touches
a new page, so look before you allocate.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


class FreeMemory(NamedTuple):
    """Memory that is left, by the tightest limit."""

    nbytes: int
    """Bytes that can still be filled, swap included."""
    limit: str
    """Where the limit is, such as `/proc/meminfo` or the directory of a cgroup."""


class _Names(NamedTuple):
    """Names of the files of a memory cgroup."""

    limit: str
    usage: str
    cache: tuple[str, ...]
    """Fields of `memory.stat` that count file pages, which the kernel drops when needed."""


_V1 = _Names(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory() -> FreeMemory | None:
    """Return the memory that is left for this process; `None` if the kernel does not tell.

    An estimate: other processes allocate at the same time.

    Source:
        proc(5), `MemAvailable`; kernel documentation of cgroup v1 (memory) and v2.
    """
    fields = _numbers("/proc/meminfo")
    swap = fields.get("SwapFree", 0) << 10
    found = []
    if "MemAvailable" in fields:
        found.append(FreeMemory((fields["MemAvailable"] << 10) + swap, "/proc/meminfo"))
    for directory, names in _memory_cgroups():
        left = _left_in(directory, names)
        if left is not None:
            found.append(FreeMemory(left + swap, directory))
    return min(found, default=None)


def _left_in(directory: str, names: _Names) -> int | None:
    """Return the bytes that a cgroup has left; `None` if it has no limit."""
    limit, usage = (_text(os.path.join(directory, one)).strip() for one in names[:2])
    if not limit.isdigit() or not usage.isdigit():
        return None
    stat = _numbers(os.path.join(directory, "memory.stat"))
    return max(int(limit) - int(usage) + sum(stat.get(name, 0) for name in names.cache), 0)


def _memory_cgroups() -> Iterator[tuple[str, _Names]]:
    """Yield the directories of the memory cgroups of this process, each with those above it."""
    mine = _own_cgroups()
    for line in _text("/proc/self/mountinfo").splitlines():
        mount, _, rest = line.partition(" - ")
        kind, options = rest.split(" ")[0], rest.rpartition(" ")[2].split(",")
        names = {"cgroup": _V1, "cgroup2": _V2}.get(kind)
        if names is None or (names is _V1 and "memory" not in options):
            continue
        root, point = mount.split(" ")[3:5]
        own = mine.get("memory" if names is _V1 else "", "/")
        # In a container, the mount often begins at the container's own cgroup.
        above = root.rstrip("/")
        below = own[len(above) :] if own == root or own.startswith(f"{above}/") else ""
        parts = [part for part in below.split("/") if part]
        for depth in range(len(parts) + 1):
            yield os.path.join(point, *parts[:depth]), names


def _own_cgroups() -> dict[str, str]:
    """Return the path of this process in each hierarchy, by controller; `""` is that of v2."""
    found: dict[str, str] = {}
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _numbers(path: str) -> dict[str, int]:
    """Read lines of a name and a number."""
    found = {}
    for line in _text(path).splitlines():
        name, *values = line.replace(":", " ").split()
        if values and values[0].isdigit():
            found[name] = int(values[0])
    return found


def _text(path: str) -> str:
    """Return the text of a file of the kernel; empty if it is not there."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""
