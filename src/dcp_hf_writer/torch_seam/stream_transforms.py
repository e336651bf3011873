"""Undo the stream transforms of torch's writer, such as compression.

torch's `FileSystemWriter(_extensions=[...])` transforms the bytes of every item, and records in the
metadata which extensions did it. `FileSystemReader(_extension_registry=...)` looks them up.

Mechanism: `ExtensionRegistry.from_descriptor_list` returns the extensions, and each
`StreamTransformExtension` wraps a stream of transformed bytes.

Looked at: torch 2.10 to 2.15, `_extension.py` and `_StorageReaderTransforms`. When torch changes:
the import fails, or the load is refused.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NoReturn

from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

from dcp_hf_writer.errors import ConfigError, CorruptCheckpointError
from dcp_hf_writer.formats.strict_json import shortened

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO


# Each extension wraps a stream in another one.
_MAX_EXTENSIONS = 16


class StreamTransforms:
    """The transforms that a reader can undo; thread-safe if the registered extensions are."""

    def __init__(self, registry: ExtensionRegistry | None) -> None:
        """Use the extensions of `registry`; `None` uses those that torch registers itself.

        Raises:
            ConfigError: If `registry` is not a registry of torch.
        """
        if registry is not None and not hasattr(registry, "from_descriptor_list"):
            raise ConfigError(
                "_extension_registry must be a registry of torch",
                expected="an ExtensionRegistry of torch.distributed.checkpoint._extension, or None",
                found=type(registry).__name__,
            )
        self._registry = ExtensionRegistry() if registry is None else registry

    def check(self, descriptors: Sequence[str], *, fqn: str, path: str) -> None:
        """Check that the transforms of an item can be undone.

        Args:
            descriptors: The extensions, as the metadata names them.
            fqn: Name of the item, for error messages.
            path: The file, for error messages.

        Raises:
            ConfigError: If an extension is not registered, does not support the version that wrote
                the item, or lacks a package.
        """
        self._extensions(descriptors, fqn=fqn, path=path)

    def undo(
        self, data: bytes, descriptors: Sequence[str], *, max_nbytes: int, fqn: str, path: str
    ) -> bytes:
        """Return the bytes of an item as they were before the transforms.

        Args:
            data: The bytes in the file.
            descriptors: The extensions, as the metadata names them.
            max_nbytes: Most bytes that the item may have.
            fqn: Name of the item, for error messages.
            path: The file, for error messages.

        Raises:
            ConfigError: As `check`.
            CorruptCheckpointError: If an extension cannot undo its transform, or the item is larger
                than `max_nbytes`.
        """
        stream: IO[bytes] = io.BytesIO(data)
        try:
            for extension in self._extensions(descriptors, fqn=fqn, path=path):
                stream = extension.transform_from(stream)
            found = _read(stream, max_nbytes + 1)
        except ConfigError:
            raise
        except Exception as error:
            # A compressor raises errors of its own types.
            text = f"{type(error).__name__}: {str(error)[:200]}"
            raise _damaged("cannot be restored", text, descriptors, fqn, path) from error
        if len(found) > max_nbytes:
            text = f"more than {max_nbytes} bytes"
            raise _damaged("is larger than it can be", text, descriptors, fqn, path)
        return found

    def _extensions(
        self, descriptors: Sequence[str], *, fqn: str, path: str
    ) -> Sequence[StreamTransformExtension]:
        if len(descriptors) > _MAX_EXTENSIONS:
            count = f"{len(descriptors)} of them"
            raise _damaged("has too many transforms", count, descriptors, fqn, path)
        try:
            found = self._registry.from_descriptor_list(descriptors)
        except Exception as error:  # noqa: BLE001 - extensions raise errors of any type
            _refuse(descriptors, fqn, path, error)
        # torch ignores extensions of other kinds, and would return the bytes as they are.
        if len(found) != len(descriptors) or not all(
            isinstance(one, StreamTransformExtension) for one in found
        ):
            _refuse(descriptors, fqn, path, None)
        return [one for one in found if isinstance(one, StreamTransformExtension)]


def _read(stream: IO[bytes], most: int) -> bytes:
    """Read to the end, or `most` bytes. A raw stream may return fewer bytes than asked for."""
    parts: list[bytes] = []
    while most > 0:
        part = stream.read(most)
        if not part:
            break
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def _refuse(descriptors: Sequence[str], fqn: str, path: str, error: Exception | None) -> NoReturn:
    raise ConfigError(
        "extensions of torch's writer have transformed the bytes of an item, and the reader cannot "
        "undo it",
        phase="read",
        path=path,
        fqn=fqn,
        expected=f"registered extensions for {shortened(list(descriptors))}",
        found="an extension that transforms no stream" if error is None else str(error)[:200],
        hint="register them in an ExtensionRegistry and pass it as "
        "HFDualReader(..., _extension_registry=registry)",
    ) from error


def _damaged(
    problem: str, found: str, descriptors: Sequence[str], fqn: str, path: str
) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"an item that extensions of torch's writer have transformed {problem}",
        phase="read",
        path=path,
        fqn=fqn,
        expected=f"what {shortened(list(descriptors))} wrote",
        found=found,
    )
