"""Saves whose halves lie apart, by real ranks: each half in a directory or in a bucket."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed.checkpoint as dcp

from dcp_hf_writer import HFDualWriter, HFExport
from support.faults import Strike
from support.store_saves import CONFIG, Store, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from support.s3_servers import S3Bucket

KINDS = ("local-s3", "s3-local", "s3-s3")
"""Where the DCP half lies, and where the export."""


@dataclass(frozen=True)
class Halves:
    """The two places of a run; plain values that pickle."""

    dcp: str
    """Directory or URL that holds the DCP halves."""
    hf: str
    """Directory or URL that holds the exports."""
    storage_options: Mapping[str, Any]
    root: Path
    """Directory for the notes of faults; the local places lie in it."""

    @classmethod
    def of_kind(cls, kind: str, root: Path, bucket: S3Bucket) -> Halves:
        """Return the places of one of `KINDS`."""
        dcp, hf = (
            str(root / name) if where == "local" else f"{bucket.url}/{name}"
            for where, name in zip(kind.split("-"), ("train", "serve"), strict=True)
        )
        return cls(dcp, hf, bucket.storage_options, root)

    def options_of(self, place: str) -> dict[str, Any] | None:
        """Return the storage options for one of the places."""
        return dict(self.storage_options) if "://" in place else None

    def files(self, place: str, name: str) -> dict[str, bytes]:
        """Return what is below one of the places, past the code under test."""
        if "://" in place:
            return Store(place, self.storage_options).files(name)
        below = Path(place, name)
        found = (path for path in below.rglob("*") if path.is_file())
        return {str(path.relative_to(below)): path.read_bytes() for path in found}

    def writer(self, name: str, **options: Any) -> HFDualWriter:
        """Return the writer of a step."""
        given = {"assets": {"config.json": CONFIG}, **options.pop("export", {})}
        return HFDualWriter(
            f"{self.dcp}/{name}",
            export=HFExport(path=f"{self.hf}/{name}", **given),
            storage_options=dict(self.storage_options),
            host_budget_bytes=1 << 20,
            **{"timeout_s": 30, **options},
        )


def save_apart(  # noqa: PLR0917 - rank functions take what they need by position
    rank: int,
    world_size: int,
    halves: Halves,
    name: str,
    step: int,
    strike: Strike | None = None,
    **options: Any,
) -> str | None:
    """Save a step in the background; return the type and text of the error."""
    state = state_of(step, is_sharded=world_size > 1)
    strike = strike or Strike(rank=-1, point="staged", action="raise")
    try:
        with strike.installed(rank, halves.root):
            writer = halves.writer(name, **options)
            dcp.async_save(state, storage_writer=writer).result(timeout=60)
    except BaseException as error:  # noqa: BLE001 - torch's exception is no Exception
        return f"{type(error).__name__}: {error}"
    return None
