"""The export of a writer as a checkpointer process gets it: its content is sent once.

torch pickles the writer for each save of a checkpointer process. The specs of a large model and a
tokenizer take megabytes. So this process puts them into shared memory, once for each `HFExport`.
Each save then sends a descriptor of that memory and the digest of its content. The other process
reads the memory if it does not know the digest. So nobody has to know what a process has received
before: a new process finds all that it needs.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import threading
import weakref
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import SaveAbortedError
from dcp_hf_writer.staging.memory_files import memory_file

if TYPE_CHECKING:
    from dcp_hf_writer.mapping.hf_export import HFExport
    from dcp_hf_writer.save.export_assets import Assets

# A run may use two or three exports in turn.
_MOST_KEPT = 4


class SentExport:
    """An export and its assets. An ordinary pickle holds both; one to a process holds neither."""

    def __init__(self, export: HFExport, assets: Assets | None) -> None:
        """Wrap them.

        Args:
            export: The export, without assets if `assets` holds them.
            assets: What was read of its assets; `None` if the other process reads them.
        """
        self.export, self.assets = export, assets
        self._lock = threading.Lock()
        self._memory: tuple[int, int, str] | None = None

    def in_memory(self) -> tuple[int, int, str]:
        """Return descriptor, size in bytes and digest of the memory file with the content.

        Raises:
            OSError: If there is no memory for it.
        """
        with self._lock:
            if self._memory is None:
                data = pickle.dumps((self.export, self.assets))
                fd = memory_file("dcp-hf-export", data)
                weakref.finalize(self, os.close, fd)
                self._memory = fd, len(data), hashlib.sha256(data).hexdigest()
            return self._memory

    def __reduce__(self) -> tuple[Any, ...]:
        return SentExport, (self.export, self.assets)


class ExportParcels:
    """Makes one `SentExport` for each export. Thread-safe."""

    def __init__(self) -> None:
        """Start with none."""
        self._lock = threading.Lock()
        self._made: weakref.WeakKeyDictionary[HFExport, tuple[bool, SentExport]] = (
            weakref.WeakKeyDictionary()
        )

    def parcel(self, export: HFExport, sent: HFExport, assets: Assets | None) -> SentExport:
        """Return what to send of an export: the same object while the content is the same.

        Args:
            export: The export.
            sent: The export as it is sent: the same object, or a copy without its assets.
            assets: What was read of its assets, if this is sent.
        """
        is_whole = sent is export
        with self._lock:
            made = self._made.get(export)
            if made is None or made[0] != is_whole or made[1].assets is not assets:
                # A copy: as a value of the dictionary, the export would keep itself alive.
                made = is_whole, SentExport(copy.copy(sent), assets)
                self._made[export] = made
            return made[1]


PARCELS = ExportParcels()
"""The one object of this process."""

_kept: dict[str, SentExport] = {}
"""By digest, what this process has received."""
_kept_lock = threading.Lock()


def _to_process(sent: SentExport) -> tuple[Any, ...]:
    fd, nbytes, digest = sent.in_memory()
    return _received, (digest, nbytes, DupFd(fd))


ForkingPickler.register(SentExport, _to_process)


def _received(digest: str, nbytes: int, shared: Any) -> SentExport:
    """Return what another process sent; read it if this process has not received it before.

    Raises:
        SaveAbortedError: If the memory holds something else.
    """
    # Always: the sender keeps a copy of the descriptor until somebody takes it.
    fd = shared.detach()
    try:
        with _kept_lock:
            found = _kept.pop(digest, None)
            if found is None:
                found = SentExport(*_read(fd, nbytes, digest))
            _kept[digest] = found
            while len(_kept) > _MOST_KEPT:
                del _kept[next(iter(_kept))]
            return found
    finally:
        os.close(fd)


def _read(fd: int, nbytes: int, digest: str) -> tuple[HFExport, Assets | None]:
    data = bytearray()
    while part := os.pread(fd, nbytes - len(data), len(data)):
        data += part
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise SaveAbortedError(
            "the export that was sent to the checkpointer process is damaged",
            phase="plan",
            expected=f"{nbytes} bytes with digest {digest}",
            found=f"{len(data)} bytes with digest {found}",
            hint="save again",
        )
    export, assets = pickle.loads(data)  # noqa: S301 - from the parent process, as the save itself
    return export, assets
