"""Compare the sizes of the objects of a checkpoint with a fresh listing of its store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import CoverageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.storage.object_contract import ObjectStore, Patience


def listed_sizes(store: ObjectStore, patience: Patience) -> dict[str, int]:
    """Return the size of every object in a store in bytes, by key.

    Raises:
        StorageError: If the store refuses.
    """
    return {facts.key: facts.nbytes for facts in store.objects("", patience=patience)}


def check_sizes(
    store: ObjectStore,
    sizes: Mapping[str, int],
    patience: Patience,
    *,
    target: str,
    phase: str | None = None,
) -> None:
    """Check that every object is there with its size.

    Args:
        store: The store below the URL of the checkpoint.
        sizes: Size of each object in bytes, by key.
        patience: Limits the listing.
        target: URL of the checkpoint without credentials.
        phase: Phase that the error names.

    Raises:
        CoverageError: If an object is missing or has another size; the error names it.
        StorageError: If the store refuses.
    """
    listed = listed_sizes(store, patience)
    for key, nbytes in sizes.items():
        found = listed.get(key)
        if found != nbytes:
            raise CoverageError(
                "an object of the checkpoint is missing or has the wrong size",
                phase=phase,
                path=f"{target}/{key}",
                expected=f"{nbytes} bytes",
                found="no such object" if found is None else f"{found} bytes",
            )
