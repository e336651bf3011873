"""Refuse an object of a checkpoint whose loading would run code that the object names.

torch's planners unpickle the objects of a checkpoint without any restriction, so the reader checks
the bytes before a planner gets them.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch

from dcp_hf_writer.errors import CorruptCheckpointError, PickledObjectError
from dcp_hf_writer.formats.safe_objects import check_is_plain
from dcp_hf_writer.torch_seam.object_archives import NotAnArchiveError, pickle_of_archive

if TYPE_CHECKING:
    from typing import NoReturn


def check_object(data: bytes, *, fqn: str, path: str) -> None:
    """Check that loading an object would run no code that the object names.

    An object is fit if torch considers it safe, which includes what the program passed to
    `torch.serialization.add_safe_globals`, or if `safe_objects` admits it.

    Args:
        data: What `torch.save` wrote.
        fqn: Name of the object, for error messages.
        path: The file, for error messages.

    Raises:
        PickledObjectError: If it would; the error names the classes and functions.
    """
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises errors of many types
        try:
            check_is_plain(pickle_of_archive(data), path=path)
        except (CorruptCheckpointError, NotAnArchiveError) as refusal:
            _refuse(data, error, refusal, fqn=fqn, path=path)


def _refuse(data: bytes, error: Exception, refusal: Exception, *, fqn: str, path: str) -> NoReturn:
    found = refusal.found if isinstance(refusal, CorruptCheckpointError) else refusal
    raise PickledObjectError(
        "loading an object of the checkpoint would run code that the object names",
        phase="read",
        path=path,
        fqn=fqn,
        expected="plain values, tensors, numpy arrays, dates, paths, and containers of them",
        found=f"{_named(data) or 'other data'} ({found})",
        hint="if you trust its author, call torch.serialization.add_safe_globals([...]), or "
        "pass HFDualReader(..., allow_pickled_objects=True)",
    ) from error


def _named(data: bytes) -> str:
    """Return the globals of an object that torch does not consider safe; empty if unknown."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except Exception:  # noqa: BLE001 - only the text of an error depends on it
        return ""
    return ", ".join(sorted(names))[:200]
