"""The place of an export that lies apart from its DCP half."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.storage.store_urls import is_url, shown_url

if TYPE_CHECKING:
    from dcp_hf_writer.save.store_access import StoreAccess


@dataclass(frozen=True, slots=True)
class ExportPlace:
    """Where `HFExport(path=...)` puts the export of one save. It pickles with its credentials."""

    path: str
    """Absolute path, or URL without credentials."""
    access: StoreAccess
    """How to reach the store of a URL."""

    def of_step(self, first: str, path: str) -> ExportPlace:
        """Return where a writer that was made for one path puts the export of another one.

        Args:
            first: Path that the writer was made with; this place belongs to it.
            path: Path of the save.

        Raises:
            ConfigError: If the name of `first` is not a part of this place, or several: then the
                place of the export of another checkpoint cannot be told. Also as `check_apart`.
        """
        if path == first:
            return self
        url, question, query = self.access.url_of(self.path).partition("?")
        parts, name = url.split("/"), os.path.basename(first)
        if parts.count(name) != 1:
            raise ConfigError(
                "a writer cannot tell where the export of another path goes",
                path=path,
                expected=f"one part of HFExport(path=...) to be {name!r}, as in {first}",
                found=self.path,
                hint="make a new writer for each step, or name the step in both paths",
            )
        parts[parts.index(name)] = os.path.basename(path)
        place = replace(self, path=self.access.note("/".join(parts) + question + query))
        place.check_apart(path)
        return place

    def check_apart(self, target: str) -> None:
        """Check that neither half lies within the other one, and that no directory holds both.

        Each half is written in a directory beside its place whose name is the id of the save.

        Raises:
            ConfigError: If one does.
        """
        one, two = f"{self.path}/", f"{shown_url(target) if is_url(target) else target}/"
        if one.startswith(two) or two.startswith(one):
            msg = "HFExport(path=...) and the path of the writer lie within each other"
            hint = "leave path out: the export goes into the checkpoint"
            raise ConfigError(msg, path=self.path, expected=f"a place apart from {two}", hint=hint)
        if is_url(self.path) or is_url(target):
            return
        mine, other = (os.path.realpath(os.path.dirname(path)) for path in (self.path, target))
        if mine == other:
            msg = "HFExport(path=...) and the path of the writer are in the same directory"
            hint = "put exports into a directory of their own, or leave path out"
            expected = f"a place outside {other}"
            raise ConfigError(msg, path=self.path, expected=expected, hint=hint)
