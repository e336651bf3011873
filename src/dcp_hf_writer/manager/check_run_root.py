"""Tell the directory of a run from that of one checkpoint, which users pass by mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME

if TYPE_CHECKING:
    from collections.abc import Collection


def check_run_root(root: str, entries: Collection[str], *, has_steps: bool) -> None:
    """Check that a directory is not itself a checkpoint: as a run, it would look empty.

    Args:
        root: Path or URL of the directory, without credentials.
        entries: Names of what lies in it.
        has_steps: Whether directories of steps are among them; then it is a run all the same.

    Raises:
        ConfigError: If it is a checkpoint.
    """
    found = [name for name in (MANIFEST_NAME, METADATA_NAME) if name in entries]
    if found and not has_steps:
        parent = root.rstrip("/").rpartition("/")[0]
        raise ConfigError(
            "this is the path of one checkpoint, not of a run",
            path=root,
            expected="a directory that holds the steps of a run",
            found=found[0],
            hint=f"pass {parent or 'the directory that holds it'}",
        )
