"""How many threads of a rank read at once, from local disks and from remote stores."""

from __future__ import annotations

import os

REMOTE_READER_THREADS = 16
"""Many, because a read from a remote store spends most of its time waiting."""

# At least two: one copies while the other waits for the disk. A rank with more processors uses
# more, but at most four: each thread reads its own stream, and many streams slow each other down.
_LEAST, _MOST = 2, 4


def local_reader_threads() -> int:
    """Return the number of threads that read files of this host, for one rank."""
    return max(_LEAST, min(_MOST, _cores() // _local_ranks()))


def _cores() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _local_ranks() -> int:
    """Return how many ranks share the processors, as torchrun reports it; 1 if unknown."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(told)) if told.isdecimal() else 1
