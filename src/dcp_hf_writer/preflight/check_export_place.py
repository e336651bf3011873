"""Checks of `HFExport(path=...)`, which puts the export apart from the DCP half."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.preflight.check_options import check_no_storage_options, target_path
from dcp_hf_writer.save.export_place import ExportPlace
from dcp_hf_writer.save.store_access import StoreAccess
from dcp_hf_writer.storage.output_place import check_output_place
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.mapping.hf_export import HFExport


def export_place(options: Mapping[str, Any]) -> ExportPlace | None:
    """Return where `HFDualWriter` puts its export; `None` if that is the checkpoint itself.

    Args:
        options: Each option of the writer by its name.

    Raises:
        ConfigError: If the path cannot be used as given, or with another option.
        StorageError: If a local path or a parent of it is a file, or may not be written to.
    """
    export: HFExport | None = options["export"]
    if export is None or export.path is None:
        return None
    path, target = target_path(export.path), target_path(options["path"])
    given = export.storage_options
    if given is None:
        given = options["storage_options"] if is_url(path) else None
    access = StoreAccess(given)
    place = ExportPlace(access.note(path), access)
    _check_others(options, place.path)
    place.check_apart(target)
    if not is_url(path):
        check_no_storage_options(given)
        check_output_place(path)
    elif export.checksums is not None:
        msg = "HFExport(checksums=...) is for local paths, not for object stores"
        hint = "leave it out: it would read the export back; verify(path) checks every byte"
        raise ConfigError(msg, path=place.path, hint=hint)
    return place


def stores_of(options: Mapping[str, Any], place: ExportPlace | None) -> StoreAccess:
    """Return how a writer reaches the store of its path, and that of its export.

    If the path is local, the options of the writer belong to its mirror, or to its export.

    Args:
        options: Each option of the writer by its name.
        place: The place of its export, as `export_place` returns it.
    """
    is_remote = place is not None and is_url(place.path)
    is_local = not is_url(plain_path(options["path"]))
    is_for_others = isinstance(options["mirror"], str) or (is_remote and is_local)
    stores = StoreAccess(None if is_for_others else options["storage_options"])
    stores.of_export = None if place is None else place.access
    return stores


def _check_others(options: Mapping[str, Any], path: str) -> None:
    refused = {
        "overwrite=True": (
            options["overwrite"],
            "save under another name: two places cannot be replaced in one step",
        ),
        'weights="once"': (
            options["weights"] == "once",
            "leave it out: the DCP half must be whole without the export",
        ),
        "mirror": (options["mirror"] is not None, "leave one of them out"),
        "reuse": (options["reuse"] is not None, "leave one of them out"),
    }
    for option, (is_given, hint) in refused.items():
        if is_given:
            msg = f"{option} cannot be used with HFExport(path=...)"
            raise ConfigError(msg, path=path, hint=hint)


def refuse_export_path(export: HFExport | None, *, what: str, hint: str) -> None:
    """Refuse an export with a place of its own, where that is not supported.

    Raises:
        ConfigError: If the export has one.
    """
    if export is not None and export.path is not None:
        msg = f"HFExport(path=...) cannot be used with {what}"
        raise ConfigError(msg, hint=hint)
