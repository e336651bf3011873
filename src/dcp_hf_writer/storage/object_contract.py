"""The contract of an object store that saves write to: whole objects, parts, and listings.

A store is a subclass of `ObjectStore` in a module of its own. `open_store` chooses it.
`tests/support/object_conformance.py` tests every promise of this module for every store.

An object becomes visible whole or not at all. No method publishes what a failed call has sent: a
caller that fails gives its uploads up with `abort`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a store can do. What is unknown counts as missing."""

    shares_uploads: bool
    """Whether several processes can send parts of one object, in any order."""
    creates_if_absent: bool
    """Whether `put(if_absent=True)` is refused when the object is there, at the same moment too."""
    part_nbytes: int
    """Smallest size of a part, in bytes; the last part of an object may be smaller."""
    max_parts: int
    """Largest number of parts of an object."""


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What a store knows about an object."""

    key: str
    """Key of the object within the store's root, such as `hf/model.safetensors`."""
    nbytes: int
    """Its size in bytes."""
    token: str | None = None
    """The token of the call that made it; `None` if the store keeps none, or in a listing."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An object in the making, to which parts are sent. Plain values: other ranks may get it."""

    key: str
    """Key of the object."""
    upload_id: str
    """The store's name of the upload."""
    token: str
    """Token of the save; kept with the object."""


@dataclass(frozen=True, slots=True)
class SentPart:
    """A part that the store has taken, and whose digest it has confirmed."""

    number: int
    """Number of the part, from 1."""
    nbytes: int
    """Its size in bytes."""
    receipt: str
    """What the store returned for it, such as an ETag; `complete` hands it back."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a call may take. One deadline rules all requests of a save."""

    deadline: float
    """`time.monotonic()` after which no request is begun, and waiting ends."""
    check: Callable[[], None] = lambda: None
    """Called before each request, and now and then while one waits; raises if the save was given
    up."""


class ObjectStore(ABC):
    """The objects below one URL. Thread-safe, but not after a fork: make it in each process.

    A key is a path within the root, with `/` between its parts. Every method that sends a request
    tries again after errors that pass (503, 500, a lost connection or answer), with longer and
    longer waits, until `Patience.deadline`. No method retries a refusal (403, 404).

    Every method raises `WriteError` with the key's URL if the store refuses, and `SaveTimeoutError`
    at the deadline. Neither names a credential.
    """

    url: str
    """URL of the root without credentials, for messages."""
    abilities: Abilities

    @abstractmethod
    def put(
        self,
        key: str,
        data: Sequence[memoryview],
        *,
        token: str,
        patience: Patience,
        if_absent: bool = False,
    ) -> bool:
        """Make an object in one request.

        Args:
            key: Its key.
            data: Its bytes: buffers, one after another.
            token: Kept with the object, so that a lost answer can be resolved.
            patience: Limits the call.
            if_absent: Whether an object of this key that another call made must stay.

        Returns:
            Whether the object that is there now is this call's. `False` only with `if_absent`.
        """

    @abstractmethod
    def begin_upload(self, key: str, *, token: str, patience: Patience) -> Upload:
        """Begin an object that is sent in parts. If the answer is lost, aborts what was begun."""

    @abstractmethod
    def send_part(
        self, upload: Upload, number: int, data: Sequence[memoryview], *, patience: Patience
    ) -> SentPart:
        """Send one part, and compare the digest that the store returns with that of `data`.

        Args:
            upload: The object in the making. With `shares_uploads`, any process may send.
            number: Number of the part, from 1. Without `shares_uploads`, parts come in order.
            data: Its bytes: buffers, one after another.
            patience: Limits the call.
        """

    @abstractmethod
    def complete(self, upload: Upload, parts: Sequence[SentPart], *, patience: Patience) -> None:
        """Make the object visible.

        Args:
            upload: The object in the making.
            parts: All its parts; numbers from 1 without a gap.
            patience: Limits the call.

        Raises:
            WriteError: Also if the object that is there then is not this upload's, or has another
                size than the sum of the parts.
        """

    @abstractmethod
    def abort(self, upload: Upload, *, patience: Patience) -> None:
        """Give an upload up, and free its parts. Does nothing if it is gone already."""

    @abstractmethod
    def facts_of(self, key: str, *, patience: Patience) -> ObjectFacts | None:
        """Return the facts of an object, by a fresh request; `None` if there is none."""

    @abstractmethod
    def read(self, key: str, *, max_nbytes: int, patience: Patience) -> bytes | None:
        """Return the bytes of a small object, by a fresh request; `None` if there is none.

        Raises:
            WriteError: Also if the object has more than `max_nbytes` bytes.
        """

    @abstractmethod
    def objects(self, prefix: str, *, patience: Patience) -> Iterator[ObjectFacts]:
        """Yield all objects whose key begins with `prefix`, by a fresh listing, page after page."""

    @abstractmethod
    def uploads(self, prefix: str, *, patience: Patience) -> Iterator[Upload]:
        """Yield all open uploads whose key begins with `prefix`, page after page.

        Their tokens are empty: stores list none.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str], *, patience: Patience) -> None:
        """Delete objects; those that are gone already do not matter.

        Raises:
            WriteError: Also if the store deleted only some of them; names the first that is left.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back connections and threads. The store cannot be used afterwards."""
