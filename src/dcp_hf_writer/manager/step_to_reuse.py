"""Choose the step of a run whose files a save may use again."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError, StorageError
from dcp_hf_writer.mapping.option_values import shown
from dcp_hf_writer.storage.store_urls import is_url

if TYPE_CHECKING:
    from collections.abc import Callable

    from dcp_hf_writer.manager.run_storage import RunStorage, StoredStep

_log = logging.getLogger(__name__)


def reuse_of(value: Any, run: RunStorage) -> Callable[..., str | None] | None:
    """Return what chooses the step that a save may reuse, from `has_export`.

    Args:
        value: The option `reuse` of a manager.
        run: The storage of the run.

    Returns:
        `None` if nothing is to be reused.

    Raises:
        ConfigError: If the value is neither `"auto"` nor `None`, or the run is on a store.
    """
    if value is None:
        return None
    if value != "auto":
        msg = "reuse of a manager must be a known word"
        hint = "a path to reuse is an option of HFDualWriter"
        raise ConfigError(msg, expected='"auto" or None', found=shown(value), hint=hint)
    if is_url(run.root):
        msg = "reuse is for local paths, not for object stores"
        hint = "leave it out: stores can neither link nor clone"
        raise ConfigError(msg, path=run.root, hint=hint)
    return partial(step_to_reuse, run)


def step_to_reuse(run: RunStorage, *, has_export: bool) -> str | None:
    """Return the path of the newest step that a save may reuse; `None` if there is none.

    Never raises for a run that cannot be listed: the save then writes everything.

    Args:
        run: The storage of the run.
        has_export: Whether the save has an export. Then a step with an export is better than a
            newer one without.
    """
    try:
        newest = _written_by_us(run.listing(newest_only=True))[-1:]
        if has_export and newest and not _has_export(newest[0]):
            newest = [one for one in _written_by_us(run.listing()) if _has_export(one)] or newest
    except StorageError as error:
        _log.warning("no step of %s is reused: %s", run.root, error)
        return None
    return newest[-1].path if newest else None


def _written_by_us(steps: list[StoredStep]) -> list[StoredStep]:
    return [one for one in steps if one.facts is not None and one.facts.kind == "manifest"]


def _has_export(step: StoredStep) -> bool:
    return step.facts is not None and step.facts.export_subdir is not None
