"""The log of the package within a rank, which no fixture of pytest reaches."""

from __future__ import annotations

import logging


def log_lines() -> list[str]:
    """Return a list that gets every message of the package from now on, from INFO upwards."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("dcp_hf_writer")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return lines
