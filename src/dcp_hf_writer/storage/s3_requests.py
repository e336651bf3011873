"""Single requests to S3 through the client inside s3fs, without its retries.

s3fs makes the client, so credentials, endpoints and options work as users of fsspec pass them. This
module sends each request once (aiohttp sends a `PUT` once more when the connection breaks). It
returns a fault as a value: the errors of the client may quote URLs and headers, so no error of this
package has one as its cause or context.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import re
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dcp_hf_writer.errors import ConfigError
from dcp_hf_writer.storage.object_retries import MOST_REQUESTS, RequestFault, RequestLimit, waits
from dcp_hf_writer.storage.s3_faults import NO_ANSWER, fault_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dcp_hf_writer.storage.object_contract import Patience

# A server may think for a while before it answers `complete`. A hang ends after this time, and the
# request is sent again.
_READ_TIMEOUT_S = 60
# How long a cancelled request may hold the caller's buffers.
_CANCEL_S = 5.0

_SECRET_NAME = re.compile("key|secret|token|user|pass", re.IGNORECASE)

Answer = dict[str, Any]


class S3Requests:
    """Sends requests, each once. Thread-safe; after a fork, the child gets a client of its own."""

    def __init__(self, storage_options: Mapping[str, Any]) -> None:
        """Keep the options; the client is made for the first request of each process.

        Raises:
            ConfigError: If an option cannot work here.
        """
        if storage_options.get("asynchronous") or storage_options.get("loop"):
            raise ConfigError(
                "storage_options must not set asynchronous or loop",
                hint="remove them: saves call s3fs from threads",
            )
        self._options = dict(storage_options)
        self._clients: dict[int, _Client] = {}

    def send(self, operation: str, patience: Patience, **params: Any) -> Answer | RequestFault:
        """Send one request, and wait for its answer or the deadline.

        Args:
            operation: Name of the operation in botocore, such as `put_object`.
            patience: Limits the request. Its check is also called while the request runs.
            **params: Parameters of the operation.

        Returns:
            The answer; a `Body` in it has been read. Or why there is none.
        """
        client = self._client()
        with client.limit.one(patience) as has_place:
            if not has_place:
                return NO_ANSWER
            begun_at = time.monotonic()
            answer = client.run(operation, patience, params)
            fault = answer if isinstance(answer, RequestFault) else None
            client.limit.learn(fault, begun_at=begun_at)
        return answer

    def _client(self) -> _Client:
        """Return the client of this process. s3fs refuses to work in a forked child."""
        pid = os.getpid()
        client = self._clients.get(pid)
        if client is None:
            # Two threads may make one each; the one that is not kept has no connection yet.
            client = self._clients.setdefault(pid, _Client(self._options))
        return client

    def close(self) -> None:
        """Close the connections of this process."""
        client = self._clients.pop(os.getpid(), None)
        if client is not None:
            client.close()


class _Client:
    def __init__(self, options: Mapping[str, Any]) -> None:
        import s3fs  # noqa: PLC0415 - takes a second

        _revive_loop()
        given = {**options, "config_kwargs": _config(options.get("config_kwargs") or {})}
        # No shared instance and no cached listing: fsspec hands its instances to everybody.
        given |= {"skip_instance_cache": True, "use_listings_cache": False}
        self._secrets = frozenset(_secrets(options))
        fault = None
        try:
            self._fs = s3fs.S3FileSystem(**given)
        except Exception as error:  # noqa: BLE001 - whatever s3fs says of an option may quote it
            fault = type(error).__name__
        if fault:
            raise ConfigError("s3fs refuses the storage_options", found=fault)
        # Its own loop of tries has one.
        self._fs.retries = 1
        self.limit = RequestLimit()

    def run(
        self, operation: str, patience: Patience, params: Mapping[str, Any]
    ) -> Answer | RequestFault:
        ended = threading.Event()
        request = self._request(operation, params, ended)
        future = asyncio.run_coroutine_threadsafe(request, self._fs.loop)
        try:
            for step in waits(patience, patience.deadline):
                if concurrent.futures.wait([future], timeout=step).done:
                    return future.result()
        finally:
            if not future.done():
                future.cancel()
                # The caller may use the buffers again when this call has returned.
                ended.wait(_CANCEL_S)
        return NO_ANSWER

    async def _request(
        self, operation: str, params: Mapping[str, Any], ended: threading.Event
    ) -> Answer | RequestFault:
        max_nbytes = params.get("max_nbytes")
        given = {name: value for name, value in params.items() if name != "max_nbytes"}
        try:
            answer: Answer = await self._fs._call_s3(operation, **given)  # noqa: SLF001 - see module
            if max_nbytes is not None:
                async with answer["Body"] as stream:
                    fits = answer["ContentLength"] <= max_nbytes
                    answer["Body"] = await stream.read() if fits else None
        except Exception as error:  # noqa: BLE001 - classified by type in `s3_faults`
            return fault_of(error, self._secrets)
        else:
            return answer
        finally:
            ended.set()

    def close(self) -> None:
        client = getattr(self._fs, "_s3", None)
        if client is None:
            return
        closing = asyncio.run_coroutine_threadsafe(_close(client), self._fs.loop)
        with suppress(concurrent.futures.TimeoutError):
            closing.result(_CANCEL_S)


def _revive_loop() -> None:
    """Let fsspec make a new event loop if a fork has left the thread of the old one behind.

    Newer versions of fsspec do so themselves.
    """
    import fsspec.asyn  # noqa: PLC0415 - s3fs imports it

    thread = fsspec.asyn.iothread[0]
    if thread is not None and not thread.is_alive():
        fsspec.asyn.reset_lock()


async def _close(client: Any) -> None:
    await client.__aexit__(None, None, None)


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield the values of options that hold credentials."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _secrets(value)
        elif isinstance(value, str) and value and _SECRET_NAME.search(name):
            yield value


def _config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of botocore: those of the user, and one try."""
    from botocore.config import Config  # noqa: PLC0415 - takes long

    defaults = {
        "read_timeout": _READ_TIMEOUT_S,
        "max_pool_connections": MOST_REQUESTS,
        # What newer versions send unasked, many servers refuse.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    known = {name: value for name, value in defaults.items() if name in Config.OPTION_DEFAULTS}
    return {**known, **given, "retries": {"total_max_attempts": 1}}
