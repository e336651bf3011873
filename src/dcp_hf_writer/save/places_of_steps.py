"""Where a writer that was made for one path puts what belongs to another one: mirror and export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcp_hf_writer.save.export_place import ExportPlace
    from dcp_hf_writer.save.mirror_to import MirrorTo


@dataclass(frozen=True, slots=True)
class PlacesOfSteps:
    """The places beside the path of a writer. It pickles for a checkpointer process."""

    first: str
    """Path that the writer was made with."""
    mirror: MirrorTo | None = None
    """Where the checkpoint of this path is uploaded."""
    export: ExportPlace | None = None
    """Where its export goes, if the halves lie apart."""

    def of_step(self, path: str) -> PlacesOfSteps:
        """Return the places that belong to a path.

        Raises:
            ConfigError: If they cannot be told; see `MirrorTo.of_step` and `ExportPlace.of_step`.
        """
        return replace(
            self,
            mirror=self.mirror and self.mirror.of_step(self.first, path),
            export=self.export and self.export.of_step(self.first, path),
        )
