"""Processes that may open few more files."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def free_files(count: int) -> Iterator[int]:
    """Leave this process `count` free descriptors; yields the limit."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(fd) for fd in os.listdir("/proc/self/fd")}
    used = {fd for fd in used if os.path.lexists(f"/proc/self/fd/{fd}")}
    free = (number for number in itertools.count() if number not in used)
    # The limit is on the numbers, and the kernel takes the lowest that is free.
    limit = next(itertools.islice(free, count, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
