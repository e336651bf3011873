"""A proxy in front of an S3 server that injects faults, and logs each request.

One request a connection: the proxy closes a connection when it has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Act = Literal["answer", "abort", "lose_answer", "hang", "slow", "flip", "call"]

_STEP = 64 * 1024
_MAX_HEAD = 256 * 1024


@dataclass(slots=True)
class Fault:
    """What the proxy does to some requests. The first fault that matches a request acts."""

    act: Act
    """What happens.

    - `answer`: answer with `status` and `body` without asking the server;
    - `abort`: reset the connection after `after_nbytes` of the request's body;
    - `lose_answer`: forward the request, then reset the connection;
    - `hang`: read the request, and never answer;
    - `slow`: wait `delay_s` for each 64 KiB of the request's body and of the answer;
    - `flip`: flip one bit of the request's body, and forward it;
    - `call`: call `then`, and forward the request.
    """
    method: str = ""
    """Regular expression, matched against the whole method; empty for all."""
    target: str = ""
    """Regular expression, searched in path and query; empty for all."""
    skip: int = 0
    """Number of matching requests to let through first."""
    times: float = 1
    """Number of requests to act on; `math.inf` for all."""
    status: int = 503
    code: str = "SlowDown"
    """Error code for `answer`, if there is no `body`."""
    body: bytes | None = None
    after_nbytes: int = 0
    delay_s: float = 0.0
    then: Callable[[], object] = lambda: None
    seen: int = 0
    """Number of requests that matched."""
    hits: int = 0
    """Number of requests that the fault acted on: a test asserts that it happened."""

    def takes(self, method: str, target: str) -> bool:
        """Whether the fault acts on this request; counts it."""
        if self.method and not re.fullmatch(self.method, method):
            return False
        if not re.search(self.target, target):
            return False
        self.seen += 1
        if self.seen <= self.skip or self.hits >= self.times:
            return False
        self.hits += 1
        return True


@dataclass(frozen=True, slots=True)
class Logged:
    """A request that arrived."""

    method: str
    target: str
    """Path and query."""
    nbytes: int
    """Length of the body that the request declares."""
    authorization: str = ""
    """The header that signs the request."""


@dataclass(slots=True)
class FaultProxy:
    """A running proxy; use `fault_proxy`. Its lists may be changed between requests."""

    endpoint: str
    """Its URL."""
    faults: list[Fault] = field(default_factory=list)
    log: list[Logged] = field(default_factory=list)

    def add(self, act: Act, method: str = "", target: str = "", **more: object) -> Fault:
        """Add a fault; see `Fault`."""
        fault = Fault(act, method, target, **more)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def count(self, method: str = "", target: str = "") -> int:
        """Return how many requests arrived that match."""
        return sum(
            bool(re.fullmatch(method or ".*", one.method) and re.search(target, one.target))
            for one in self.log
        )


@contextlib.contextmanager
def fault_proxy(endpoint: str) -> Iterator[FaultProxy]:
    """Run a proxy in front of a server, in a thread, for the body of the `with` statement."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fault-proxy")
    thread.start()

    def run(coroutine: object) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)  # type: ignore[arg-type]

    host = urlsplit(endpoint)
    proxy = FaultProxy("")
    serving = _Serving(proxy, host.hostname or "", host.port or 80)
    try:
        port = run(serving.start())
        proxy.endpoint = f"http://127.0.0.1:{port}"
        yield proxy
    finally:
        run(serving.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _Serving:
    def __init__(self, proxy: FaultProxy, host: str, port: int) -> None:
        self._proxy, self._host, self._port = proxy, host, port
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_MAX_HEAD)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The other side may leave at any time: then there is nobody to tell.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                await self._handle(reader, writer)
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = head.split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if line)}
        nbytes = int(headers.get("content-length", 0))
        signed = headers.get("authorization", "")
        self._proxy.log.append(Logged(method, target, nbytes, signed))
        faults = self._proxy.faults
        fault = next((one for one in faults if one.takes(method, target)), None) or Fault("call")
        if "expect" in headers:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault.act == "abort":
            await reader.readexactly(min(fault.after_nbytes, nbytes))
            _reset(writer)
            return
        pause = fault.delay_s if fault.act == "slow" else 0.0
        body = await _read(reader, nbytes, pause)
        if fault.act == "hang":
            await reader.read()  # until the client leaves
        elif fault.act == "answer":
            writer.write(_answer(fault, method))
        else:
            await self._forward(fault, lines, body, writer)

    async def _forward(
        self, fault: Fault, lines: list[str], body: bytearray, writer: asyncio.StreamWriter
    ) -> None:
        if fault.act == "flip":
            body[len(body) // 2] ^= 1
        await asyncio.get_running_loop().run_in_executor(None, fault.then)
        kept = [line for line in lines if line and not line.lower().startswith("connection:")]
        head = "\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1")
        upstream, sink = await asyncio.open_connection(self._host, self._port)
        try:
            answer = await _ask(head, body, upstream, sink)
        finally:
            sink.close()
        if fault.act == "lose_answer":
            _reset(writer)
            return
        step = _STEP if fault.act == "slow" else len(answer)
        for start in range(0, len(answer), step or 1):
            await asyncio.sleep(fault.delay_s if fault.act == "slow" else 0)
            writer.write(answer[start : start + step])
            await writer.drain()


async def _ask(
    head: bytes, body: bytearray, upstream: asyncio.StreamReader, sink: asyncio.StreamWriter
) -> bytes:
    """Return the server's answer. A server may refuse before it reads a body."""
    sink.write(head)
    if b"\r\nexpect:" in head.lower():
        first = await upstream.readuntil(b"\r\n\r\n")
        if b" 100 " not in first.partition(b"\r\n")[0]:
            return first + await upstream.read()
    sink.write(body)
    await sink.drain()
    return await upstream.read()


async def _read(reader: asyncio.StreamReader, nbytes: int, pause: float) -> bytearray:
    body = bytearray()
    while len(body) < nbytes:
        if pause:
            await asyncio.sleep(pause)
        body += await reader.readexactly(min(_STEP, nbytes - len(body)))
    return body


def _answer(fault: Fault, method: str) -> bytes:
    text = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>"
    body = text.encode() if fault.body is None else fault.body
    head = (
        f"HTTP/1.1 {fault.status} Injected\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else body)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, as a machine does that has lost the connection."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
