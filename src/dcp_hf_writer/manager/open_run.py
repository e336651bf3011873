"""Which storage serves a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.manager.run_directory import RunDirectory
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dcp_hf_writer.manager.run_storage import RunStorage
    from dcp_hf_writer.manager.step_names import StepNames


def open_run(
    root: str | os.PathLike[str],
    names: StepNames,
    storage_options: Mapping[str, Any] | None = None,
) -> RunStorage:
    """Return the storage of a run; touches nothing.

    Args:
        root: A local path, or a URL such as `s3://bucket/run`.
        names: Names of the step directories.
        storage_options: Options of a URL, as fsspec takes them.

    Raises:
        ConfigError: If the path cannot be used, if no file system is known for the URL, if a
            package for it is missing, or if a local path comes with options.
    """
    text = plain_path(root)
    if is_url(text):
        # Not at the top: a local run needs none of it.
        from dcp_hf_writer.manager.run_on_store import RunOnStore  # noqa: PLC0415

        return RunOnStore(text, names, storage_options)
    if storage_options:
        raise ConfigError(
            "storage_options are for object stores",
            expected="None for a local path",
            found=sorted(map(str, storage_options)),
        )
    return RunDirectory(os.path.abspath(text), names)
