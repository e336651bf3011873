"""The cells of the export that a rank owns, sent to a store as parts of objects."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import CheckpointError
from dcp_hf_writer.save.object_parts import in_flight_of
from dcp_hf_writer.storage.object_contract import SentPart, Upload

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dcp_hf_writer.storage.object_contract import Abilities, ObjectStore, Patience

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportUpload:
    """One file of the export, as the coordinator announces it; equal on all ranks."""

    key: str
    """Key of the object."""
    nbytes: int
    """Its size in bytes."""
    part_nbytes: int
    """Size of its parts, which are the cells of the exchange; the last one may be smaller."""
    upload_id: str
    """Id of the upload that all ranks share; empty if the owner of the file begins its own."""

    def upload(self, token: str) -> Upload:
        """Return the shared upload."""
        return Upload(self.key, self.upload_id, token)


class ExportCells:
    """Takes the cells of one rank from the exchange, and sends them; a `CellSink`.

    After an error it takes cells and drops them, because the other ranks wait for this one in the
    exchange. `finish` raises the error.
    """

    def __init__(
        self,
        store: ObjectStore,
        files: Sequence[ExportUpload],
        *,
        abilities: Abilities,
        token: str,
        patience: Patience,
        count: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Begin without a request.

        Args:
            store: The store.
            files: All files of the export, in the order of the layout.
            abilities: What the store can do, as the coordinator found out.
            token: Token of the save.
            patience: Limits each request.
            count: Called with the bytes of each cell that is sent.
        """
        self._count = count
        self._store, self._files = store, files
        self._token, self._patience = token, patience
        self._is_shared = abilities.shares_uploads
        # Without shared uploads, one thread keeps the parts in order.
        threads = in_flight_of(abilities)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dcp-hf-cells")
        self._sent: dict[int, list[Future[SentPart | None]]] = {}
        self._begun: dict[int, Upload] = {}
        self._error: BaseException | None = None

    def put(self, file: int, cell: int, data: memoryview) -> Future[Any]:
        """Send a cell of this rank; its buffer may change once the returned future is done."""
        future = self._pool.submit(self._send, file, cell, data)
        self._sent.setdefault(file, []).append(future)
        return future

    def _send(self, file: int, cell: int, data: memoryview) -> SentPart | None:
        if self._error is not None:
            return None
        try:
            upload = self._upload(file)
            sent = self._store.send_part(upload, cell + 1, [data], patience=self._patience)
            self._count(data.nbytes)
        except BaseException as error:  # noqa: BLE001 - `finish` raises it
            self._error = self._error or error
            return None
        return sent

    def _upload(self, file: int) -> Upload:
        of = self._files[file]
        if self._is_shared:
            return of.upload(self._token)
        if file not in self._begun:
            self._begun[file] = self._store.begin_upload(
                of.key, token=self._token, patience=self._patience
            )
        return self._begun[file]

    def finish(self) -> Mapping[str, tuple[SentPart, ...]]:
        """Wait until everything is sent; complete the uploads that only this rank can complete.

        Returns:
            The parts that this rank sent, by key of the object.

        Raises:
            CheckpointError: What went wrong first.
        """
        parts: dict[str, tuple[SentPart, ...]] = {}
        for file, futures in self._sent.items():
            found = [one.result() for one in futures]
            parts[self._files[file].key] = tuple(one for one in found if one is not None)
        self._pool.shutdown(wait=False)
        if self._error is not None:
            raise self._error
        for file in list(self._begun):
            sent = parts[self._files[file].key]
            self._store.complete(self._begun[file], sent, patience=self._patience)
            del self._begun[file]
        return parts

    def discard(self, patience: Patience) -> None:
        """Give up the uploads that only this rank can give up; logs what the store refuses."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        while self._begun:
            _, upload = self._begun.popitem()
            try:
                self._store.abort(upload, patience=patience)
            except CheckpointError as error:
                _log.warning("could not abort the upload of %s: %s", upload.key, error)
