"""Find the prefix by which the names of a checkpoint differ from those of a state dict.

Pure: no I/O.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


def prefix_difference(missing: Collection[str], unexpected: Collection[str]) -> str | None:
    """Say by which prefix most missing names differ from unexpected ones.

    Args:
        missing: Names that only the state dict has.
        unexpected: Names that only the checkpoint has.

    Returns:
        A clause for a message; `None` if no prefix explains at least half of the names of the
        smaller side.
    """
    most = min(len(missing), len(unexpected))
    kinds = {
        "its names lack the prefix {!r} of the state dict": _prefixes(missing, set(unexpected)),
        "its names have the prefix {!r}, which the state dict lacks": _prefixes(
            unexpected, set(missing)
        ),
    }
    for text, prefixes in kinds.items():
        counts = Counter(prefixes)
        if counts:
            # Of two prefixes that explain as many names, take the shorter one.
            prefix, count = max(counts.items(), key=lambda one: (one[1], -len(one[0])))
            if 2 * count >= most:
                return text.format(prefix)
    return None


def _prefixes(names: Collection[str], others: set[str]) -> Iterator[str]:
    """Yield each prefix that turns a name of `names` into a name of `others` when it is removed."""
    for name in names:
        position = name.find(".") + 1
        while position:
            if name[position:] in others:
                yield name[:position]
            position = name.find(".", position) + 1
