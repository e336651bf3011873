"""A stand-in for `fcntl.ioctl` that refuses clones, for tests of what a save does then."""

from __future__ import annotations

import fcntl
import os
from typing import Any


class RefusingClones:
    """Lets the first clones pass and refuses the next one, as a file system may."""

    def __init__(self, number: int, *, after: int) -> None:
        self.calls, self._number, self._after = 0, number, after
        self._ioctl = fcntl.ioctl

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls > self._after:
            raise OSError(self._number, os.strerror(self._number))
        return self._ioctl(*args)
