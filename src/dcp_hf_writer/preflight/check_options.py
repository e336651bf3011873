"""Checks of the arguments of `HFDualWriter`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.storage import StorageWriter

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.formats.names_on_disk import MANIFEST_NAME, METADATA_NAME, RECORD_NAME
from dcp_hf_writer.mapping.hf_export import HFExport
from dcp_hf_writer.mapping.option_values import (
    check_flag,
    check_seconds,
    check_whole,
    check_word,
    shown,
)
from dcp_hf_writer.save.export_assets import check_kinds
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import check_scheme, is_url, shown_url
from dcp_hf_writer.storage.write_slots import WriteSlots

# Bytes. A quarter of the budget is the bounce buffer: a smaller buffer would cost many more system
# calls and save little memory.
_MIN_HOST_BUDGET = 1 << 20

# "dcp-hf" is for files beside the manifest.
_OWN_NAMES = (MANIFEST_NAME, METADATA_NAME, "dcp-hf", RECORD_NAME)


def local_path(value: str | os.PathLike[str]) -> str:
    """Return the absolute form of a local path.

    Raises:
        ConfigError: If the value is empty, or the URL of another kind of storage.
    """
    text = target_path(value)
    if is_url(text):
        msg = "this cannot write to an object store"
        raise ConfigError(
            msg,
            path=shown_url(text),
            expected="a path on a mounted file system",
            hint="HFDualWriter and CheckpointManager write to URLs",
        )
    return text


def target_path(value: str | os.PathLike[str]) -> str:
    """Return where a save goes: the absolute form of a local path, or the URL of a store.

    Raises:
        ConfigError: If the value is empty, or no file system is known or installed for the URL.
    """
    text = plain_path(value)
    if not is_url(text):
        return os.path.abspath(text)
    check_scheme(text)
    return text


def path_to_reuse(value: str | os.PathLike[str] | None) -> str | None:
    """Return the absolute path of the checkpoint that a writer may use again.

    It need not exist: a save then writes everything.

    Raises:
        ConfigError: If the value is no path of a mounted file system.
    """
    if value is None:
        return None
    if value in ("auto", "off"):
        msg = "reuse of a writer must be the path of an earlier checkpoint, or None"
        hint = 'reuse="auto" is an option of CheckpointManager, which looks for the newest step'
        raise ConfigError(msg, expected="a path", found=repr(value), hint=hint)
    text = plain_path(value, option="reuse")
    if is_url(text):
        msg = "reuse must be a path on a mounted file system"
        hint = "leave it out: object stores can neither link nor clone"
        raise ConfigError(msg, path=shown_url(text), found="the URL of a store", hint=hint)
    return os.path.abspath(text)


def check_for_target(path: str, writer: Any, storage_options: Mapping[str, Any]) -> None:
    """Check the options of a writer that depend on where it writes its checkpoint.

    Args:
        path: A path as `target_path` returns it.
        writer: The writer; only its options are read.
        storage_options: Its options for the store of this path.

    Raises:
        ConfigError: If an option does not fit the target.
    """
    if not is_url(path):
        check_no_storage_options(storage_options)
        return
    export = writer.export
    checksums = None if export is None or export.path is not None else export.checksums
    refused = {
        "overwrite=True": (writer.overwrite, "save under another name, or delete the checkpoint"),
        "reuse": (writer.reuse is not None, "leave it out: stores can neither link nor clone"),
        "dcp_writer": (writer.dcp_writer is not None, "leave it out: the DCP half goes there too"),
        "HFExport(checksums=...)": (
            checksums is not None,
            "leave it out: it would read the export back; verify(path) checks every byte",
        ),
    }
    for option, (is_given, hint) in refused.items():
        if is_given:
            msg = f"{option} is for local paths, not for object stores"
            raise ConfigError(msg, path=shown_url(path), hint=hint)


def check_writer(options: Mapping[str, Any]) -> None:
    """Check the options of `HFDualWriter`, except its path; reads no file.

    Args:
        options: Each option by its name.

    Raises:
        ConfigError: If an option cannot be used as given.
    """
    check_word("weights", options["weights"], ("both", "once"))
    check_word("staging", options["staging"], ("blocking", "overlap"))
    check_word("on_export_error", options["on_export_error"], ("raise", "warn"))
    check_word("share", options["share"], ("auto", "off"))
    check_word("page_cache", options["page_cache"], ("newest", "all"))
    check_word("strategy", options["strategy"], ("auto", "direct", "exchange"))
    check_flag("overwrite", options["overwrite"])
    check_seconds("timeout_s", options["timeout_s"])
    check_whole("host_budget_bytes", options["host_budget_bytes"], least=_MIN_HOST_BUDGET)
    if not isinstance(options["storage_options"], (Mapping, type(None))):
        msg = "storage_options must be a dict or None"
        raise ConfigError(msg, expected="as fsspec takes them", found="another type")
    _check_kind("slots", options["slots"], WriteSlots, "WriteSlots(2), or WriteSlots(0) for none")
    check_export(options["export"], options["weights"])
    if options["export"] is not None:
        check_kinds(options["export"])
    check_dcp_writer(options["dcp_writer"])
    if options["process_group"] is not None and dist.is_available():
        expected = "a group of torch.distributed.new_group that this rank belongs to, or None"
        _check_kind("process_group", options["process_group"], dist.ProcessGroup, expected)


def _check_kind(option: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        msg = f"{option} must be a {kind.__name__}"
        raise ConfigError(msg, expected=expected, found=shown(value))


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
        raise ConfigError(msg, expected="HFExport(...)", found=shown(export))
    if export is not None and (export.subdir in _OWN_NAMES or export.subdir.endswith(".distcp")):
        msg = "subdir is a name that the checkpoint itself uses"
        raise ConfigError(msg, expected='another name, such as "hf"', found=repr(export.subdir))


def check_no_storage_options(options: Mapping[str, Any] | None) -> None:
    """Refuse `storage_options`: a local path has none.

    Raises:
        ConfigError: If any are given.
    """
    if options:
        msg = "storage_options are for object stores"
        found = sorted(map(str, options)) if isinstance(options, Mapping) else shown(options)
        raise ConfigError(msg, expected="None for a local path", found=found)


def check_dcp_writer(writer: object) -> None:
    """Check that the user's `dcp_writer` makes its files durable.

    Raises:
        ConfigError: If it is no `StorageWriter`, or its `sync_files` is `False`.
    """
    if writer is not None:
        expected = "a StorageWriter of torch.distributed.checkpoint, or None"
        _check_kind("dcp_writer", writer, StorageWriter, expected)
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
