"""How an object is cut into parts, and one object that a rank sends in order of its bytes."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dcp_hf_writer.storage.object_contract import (
        Abilities,
        ObjectStore,
        Patience,
        SentPart,
        Upload,
    )

# Bytes. Large enough that the answer of a store takes a small part of the time of a request.
PART_NBYTES = 64 << 20

# Parts grow in steps, so that their sizes stay readable.
_STEP_NBYTES = 1 << 20

# Requests for one object at the same time: enough to hide the time that a store takes to answer.
_IN_FLIGHT = 4


def part_nbytes_of(nbytes: int, abilities: Abilities, *, usual_nbytes: int = PART_NBYTES) -> int:
    """Return the size of the parts of an object in bytes; the last part may be smaller.

    Pure.

    Args:
        nbytes: Size of the object, or a bit more.
        abilities: What the store can do.
        usual_nbytes: Size of a part if the object does not have too many of them.
    """
    least = max(usual_nbytes, abilities.part_nbytes)
    needed = -(-nbytes // abilities.max_parts)
    return least if needed <= least else -(-needed // _STEP_NBYTES) * _STEP_NBYTES


def in_flight_of(abilities: Abilities) -> int:
    """Return how many parts of an object a rank sends at the same time."""
    return _IN_FLIGHT if abilities.shares_uploads else 1


class SentObject:
    """One object that this rank sends alone: whole if it is small, else in parts on a grid.

    It takes buffers in the order of their bytes, as `OutputFile.write_many` does, and keeps them
    until they are sent. So nobody may change them before `finish` returns.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        token: str,
        patience: Patience,
        part_nbytes: int,
        in_flight: int,
    ) -> None:
        """Begin without a request.

        Args:
            store: The store.
            key: Key of the object.
            token: Token of the save.
            patience: Limits each request.
            part_nbytes: Size of each part but the last.
            in_flight: Parts that are sent at the same time; 1 sends them in order.
        """
        self.key, self.nbytes = key, 0
        self.count: Callable[[int], object] = lambda _: None
        """Called with the number of bytes after each write."""
        self._store, self._token, self._patience = store, token, patience
        self._part_nbytes = part_nbytes
        self._buffers: list[memoryview] = []
        self._gathered = 0
        self._upload: Upload | None = None
        self._sent: list[Future[SentPart]] = []
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="dcp-hf-parts")
        self._in_flight = in_flight

    def write_many(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Take buffers that follow one another from `offset` on; return the offset after them.

        Raises:
            WriteError: If an earlier part could not be sent.
        """
        if offset != self.nbytes:
            msg = "an object is written in the order of its bytes"
            raise WriteError(
                msg, path=self.key, expected=f"offset {self.nbytes}", found=f"{offset}"
            )
        for buffer in buffers:
            self._take(buffer)
            self.count(buffer.nbytes)
        return self.nbytes

    def _take(self, buffer: memoryview) -> None:
        while buffer.nbytes:
            # One byte more must come before a part is sent: an object of one part is sent whole.
            if self._gathered == self._part_nbytes:
                self._send()
            taken = buffer[: self._part_nbytes - self._gathered]
            self._buffers.append(taken)
            self._gathered += taken.nbytes
            self.nbytes += taken.nbytes
            buffer = buffer[taken.nbytes :]

    def _send(self) -> None:
        if self._upload is None:
            self._upload = self._store.begin_upload(
                self.key, token=self._token, patience=self._patience
            )
        running = [one for one in self._sent if not one.done()]
        if len(running) >= 2 * self._in_flight:
            wait(running, return_when=FIRST_COMPLETED)
        for one in self._sent:
            if one.done():
                one.result()
        number = len(self._sent) + 1
        self._sent.append(
            self._pool.submit(
                self._store.send_part,
                self._upload,
                number,
                self._buffers,
                patience=self._patience,
            )
        )
        self._buffers, self._gathered = [], 0

    def finish(self) -> None:
        """Send the rest, and make the object visible.

        Raises:
            WriteError: If the store refuses.
        """
        if self._upload is None:
            self._store.put(self.key, self._buffers, token=self._token, patience=self._patience)
        else:
            if self._gathered:
                self._send()
            sent = [one.result() for one in self._sent]
            self._store.complete(self._upload, sent, patience=self._patience)
        self._upload, self._buffers = None, []
        self._pool.shutdown(wait=False)

    def discard(self, patience: Patience) -> None:
        """Give up an object that is not finished.

        Raises:
            StorageError: If the store refuses.
            SaveTimeoutError: If the store does not answer in time.
        """
        self._pool.shutdown(wait=True, cancel_futures=True)
        upload, self._upload, self._buffers = self._upload, None, []
        if upload is not None:
            self._store.abort(upload, patience=patience)
