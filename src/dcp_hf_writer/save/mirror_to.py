"""Where the mirror of a local checkpoint goes, and the report of one that has ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.mapping.option_values import check_seconds, shown
from dcp_hf_writer.storage.paths_as_written import plain_path
from dcp_hf_writer.storage.store_urls import check_scheme, is_url, shown_url

if TYPE_CHECKING:
    from dcp_hf_writer.storage.object_contract import ObjectStore


@dataclass(frozen=True, slots=True)
class FinishedMirror:
    """A mirror whose upload has ended, as the process that published it saw it."""

    path: str
    """The local checkpoint."""
    url: str
    """Its mirror, without credentials."""
    outcome: Literal["published", "failed"]
    """`failed`: the mirror is no checkpoint. The next process can go on with it."""
    error: str | None
    """What went wrong, in one text; `None` if nothing did."""
    nbytes: int
    """Bytes that this process sent; what was there already does not count."""
    total_s: float
    """Seconds from the beginning of the upload to its end."""
    ended: float = field(default_factory=time.time)
    """When the upload ended, in seconds since 1970."""


@dataclass(frozen=True)
class MirrorTo:
    """Where `HFDualWriter(path, mirror=...)` uploads a checkpoint once it is committed.

    A text in its place means `MirrorTo(text)` with the `storage_options` of the writer.
    """

    url: str
    """URL of the mirror of the checkpoint, such as `s3://bucket/run/step-100`."""
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    """Options of the URL, as fsspec takes them, such as credentials."""
    timeout_s: float = 7200
    """Deadline of one upload in seconds, all its retries included."""
    exit_wait_s: float = 600
    """How long the end of the process waits for an upload, in seconds."""
    report_to: Callable[[FinishedMirror], Any] | None = None
    """Called on rank 0 with a `FinishedMirror` when an upload has ended, in another thread."""

    def __post_init__(self) -> None:
        """Check the fields; sends no request.

        Raises:
            ConfigError: If a field cannot be used as given.
        """
        text = plain_path(self.url)
        if not is_url(text):
            raise ConfigError(
                "a mirror must be the URL of a store",
                path=text,
                expected="such as s3://bucket/run/step-100",
                hint="save to a URL without a mirror, or to a local path with one",
            )
        check_scheme(text)
        check_seconds("timeout_s", self.timeout_s)
        check_seconds("exit_wait_s", self.exit_wait_s)
        options: Any = self.storage_options
        if not isinstance(options, (Mapping, type(None))):
            msg = "storage_options must be a dict or None"
            raise ConfigError(msg, expected="as fsspec takes them", found="another type")
        report_to: Any = self.report_to
        if report_to is not None and not callable(report_to):
            msg = "report_to of a mirror must be a function"
            found = shown(report_to)
            raise ConfigError(msg, expected="function(finished_mirror)", found=found)
        object.__setattr__(self, "url", text.rstrip("/"))

    def __repr__(self) -> str:
        """Show no credentials."""
        return f"MirrorTo({self.shown_url!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Pickle for a checkpointer process, without the function of the user."""
        return {**self.__dict__, "report_to": None}

    @property
    def shown_url(self) -> str:
        """The URL without credentials, for messages and records."""
        return shown_url(self.url)

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return self.shown_url.rpartition("/")[2]

    def beside(self, name: str) -> MirrorTo:
        """Return the same with another last part of the URL."""
        head, question, query = self.url.partition("?")
        return replace(self, url=f"{head.rstrip('/').rpartition('/')[0]}/{name}{question}{query}")

    def of_step(self, first: str, path: str) -> MirrorTo:
        """Return where a writer that was made for one path mirrors another one.

        Args:
            first: Path that the writer was made with; this mirror is its mirror.
            path: Path of the save.

        Raises:
            ConfigError: If `path` is a URL, or if `first` and its mirror end in different names:
                then the place of another checkpoint cannot be told.
        """
        if path == first:
            return self
        if is_url(path):
            raise _no_mirror(path)
        if os.path.basename(first) != self.name:
            raise ConfigError(
                "a writer with a mirror cannot tell where the mirror of another path goes",
                path=path,
                expected=f"a mirror of {first} whose URL ends in {os.path.basename(first)}",
                found=self.shown_url,
                hint="make a new writer for each step, or give both the name of the step",
            )
        return self.beside(os.path.basename(path))

    def open(self) -> ObjectStore:
        """Open the store below the URL; sends no request.

        Raises:
            ConfigError: If the store cannot be opened.
        """
        # Late: the S3 store imports its client, which the other savers do not need.
        from dcp_hf_writer.storage.open_store import open_store  # noqa: PLC0415

        return open_store(self.url, self.storage_options)


def as_mirror(
    value: Any, *, path: str, storage_options: Mapping[str, Any] | None
) -> MirrorTo | None:
    """Return what `mirror=` of a writer stands for.

    Args:
        value: A URL, a `MirrorTo`, or `None`.
        path: Path of the writer.
        storage_options: Options of the writer.

    Raises:
        ConfigError: If it cannot be used as given, or the path is a URL itself.
    """
    if value is None:
        return None
    if is_url(path):
        raise _no_mirror(path)
    if isinstance(value, MirrorTo):
        return value
    if not isinstance(value, (str, os.PathLike)):
        expected = "a URL, MirrorTo(...), or None"
        msg = "mirror must be the URL of a store"
        raise ConfigError(msg, expected=expected, found=shown(value))
    return MirrorTo(os.fspath(value), storage_options)


def _no_mirror(path: str) -> ConfigError:
    msg = "a save to an object store has no mirror"
    return ConfigError(msg, path=path, hint="pass a local path, or leave mirror out")
