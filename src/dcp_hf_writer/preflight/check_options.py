"""Checks of the arguments of `HFDualWriter`."""

from __future__ import annotations

import math
import os
from typing import Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.mapping.hf_export import HFExport

# Bytes. A quarter of the budget is the bounce buffer: a smaller buffer would cost many more system
# calls and save little memory.
_MIN_HOST_BUDGET = 1 << 20


def local_path(value: str | os.PathLike[str]) -> str:
    """Return the absolute form of a local path.

    Raises:
        ConfigError: If the value is empty, or the URL of another kind of storage.
    """
    text = os.fspath(value)
    if isinstance(text, str) and text.startswith("file://"):
        text = text.removeprefix("file://")
    if not isinstance(text, str) or not text or "\0" in text:
        msg = "path must be a local path"
        raise ConfigError(msg, expected="the name of a directory", found=repr(value))
    if "://" in text:
        msg = "this version cannot write to object stores"
        raise ConfigError(
            msg,
            path=text,
            expected="a path on a mounted file system",
            hint="save to a local or shared file system and copy the committed directory",
        )
    return os.path.abspath(text)


def one_of(name: str, value: Any, allowed: tuple[str, ...], *, hint: str | None = None) -> None:
    """Check that the value of an option is one of the allowed words.

    Raises:
        ConfigError: If it is not.
    """
    if value not in allowed:
        msg = f"{name} has an unknown value"
        raise ConfigError(
            msg, expected=" or ".join(map(repr, allowed)), found=repr(value), hint=hint
        )


def check_numbers(*, timeout_s: float, host_budget_bytes: int) -> None:
    """Check the numeric options.

    Raises:
        ConfigError: If one is out of range.
    """
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if not is_number or not timeout_s > 0 or math.isinf(timeout_s):
        msg = "timeout_s must be a finite number of seconds above zero"
        raise ConfigError(msg, expected="for example 1800", found=repr(timeout_s))
    if not isinstance(host_budget_bytes, int) or host_budget_bytes < _MIN_HOST_BUDGET:
        msg = "host_budget_bytes is too small, or not a whole number"
        raise ConfigError(
            msg, expected=f"at least {_MIN_HOST_BUDGET}", found=repr(host_budget_bytes)
        )


def check_export(export: Any, weights: str) -> None:
    """Check that `export` is an `HFExport`, or `None` if the DCP half stores the weights.

    Raises:
        ConfigError: If it is neither.
    """
    if export is None and weights == "once":
        msg = 'weights="once" stores the weights in the export, so it needs one'
        raise ConfigError(msg, expected="export=HFExport(...)", found="export=None")
    if export is not None and not isinstance(export, HFExport):
        msg = "export must be an HFExport or None"
        raise ConfigError(msg, expected="HFExport(...)", found=type(export).__name__)


def check_no_storage_options(options: dict[str, Any] | None) -> None:
    """Refuse `storage_options`: a local path has none.

    Raises:
        ConfigError: If any are given.
    """
    if options:
        msg = "storage_options are for object stores"
        raise ConfigError(msg, expected="None for a local path", found=sorted(options))


def check_dcp_writer(writer: object) -> None:
    """Check that the user's `dcp_writer` makes its files durable.

    Raises:
        ConfigError: If its `sync_files` is `False`.
    """
    if getattr(writer, "sync_files", True) is False:
        msg = "dcp_writer must make its files durable before the commit"
        raise ConfigError(msg, expected="sync_files=True", found="sync_files=False")


def check_collectives(*, is_used: bool) -> None:
    """Refuse `use_collectives=False`.

    Raises:
        ConfigError: If the save does not use collectives.
    """
    if not is_used:
        msg = "use_collectives=False is not supported"
        raise ConfigError(
            msg,
            phase="plan",
            expected="one plan for all ranks, because the offsets in the files depend on it",
            hint="drop use_collectives=False; to save from a single rank, pass no_dist=True",
        )
