# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1 with the API server: h11 parses; connections are kept, one request at a time on each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlencode

import h11

from agent import __version__
from agent.core.errors import KubeError
from agent.sources.kube.access import Access
from agent.sources.kube.protocol import refusal

JSON = "application/json"
_READ = 1 << 16  # bytes
_MOST = 1 << 25  # bytes of an answer that is kept whole
_AT_ONCE = 8  # requests under way, streams apart: 250 pods must not make 250 connections
_CONNECT = 10.0  # seconds


class Client:
    """Raises KubeError alone: `status` 0 when the server was not reached or its answer broke off."""

    def __init__(self, access: Access, seconds: float = 30.0, idle: float = 30.0) -> None:
        """Takes `seconds` for a request, of a stream for its head; `idle` seconds after which a connection is closed.

        The API server closes it after 90 s (server/config.go, IdleTimeout).
        """
        self._access = access
        self._seconds = seconds
        self._keeping = idle
        self._free = asyncio.Semaphore(_AT_ONCE)
        self._idle: list[_Connection] = []
        self._timer: asyncio.TimerHandle | None = None

    async def get(self, path: str, query: Mapping[str, str] | None = None, accept: str = JSON) -> dict[str, Any]:
        return await self._whole("GET", _target(path, query), None, {"accept": accept})

    async def send(self, method: str, path: str, body: Any, content_type: str = JSON) -> dict[str, Any]:
        """Sends `body` as JSON; what comes back. It is not sent again when it may have arrived."""
        head = {"accept": JSON, "content-type": content_type}
        return await self._whole(method, path, json.dumps(body).encode(), head)

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, query: Mapping[str, str], accept: str = JSON, quiet: float = 30.0
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Yields the body of a GET as it comes, entered once the server has answered 200.

        Raises KubeError also within: when no byte came for `quiet` seconds, or the answer breaks off.
        """
        pieces = self._pieces("GET", _target(path, query), None, {"accept": accept}, quiet)
        async with contextlib.aclosing(pieces):
            await anext(pieces)  # the head
            yield pieces

    async def close(self) -> None:
        """Closes idle connections; requests under way go on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._idle:
            self._idle.pop().close()

    async def _whole(self, method: str, target: str, body: bytes | None, head: Mapping[str, str]) -> dict[str, Any]:
        try:
            pieces = self._pieces(method, target, body, head, self._seconds)
            async with self._free, asyncio.timeout(self._seconds), contextlib.aclosing(pieces):
                answer = b"".join([piece async for piece in _bounded(pieces)])
            value = json.loads(answer)
        except TimeoutError:
            raise KubeError(f"{_what(method, target)}: no whole answer in {self._seconds:g} s") from None
        except (ValueError, RecursionError) as error:
            raise KubeError(f"{_what(method, target)}: the answer is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise KubeError(f"{_what(method, target)}: the answer is no object")
        return value

    async def _pieces(
        self, method: str, target: str, body: bytes | None, head: Mapping[str, str], quiet: float
    ) -> AsyncGenerator[bytes, None]:
        """Yields an empty piece for the head, then the body's. Raises KubeError for any status but 2xx."""
        tried = ""
        while True:
            token = self._access.token()
            status, answer, connection = await self._answer(method, target, body, head)
            try:
                if status < 300:
                    yield b""
                    async for piece in connection.body(quiet):
                        yield piece
                    self._keep(connection)
                    return
                message = b"".join([piece async for piece in _bounded(connection.body(quiet))])
                self._keep(connection)
            except (OSError, h11.ProtocolError, TimeoutError) as error:
                raise KubeError(f"{_what(method, target)}: the answer broke off: {_cause(error)}") from None
            finally:
                connection.close_unless_kept()
            if status == 401:
                self._access.refused()  # the token may have been renewed a moment ago
            if status != 401 or tried or self._access.token() == token:
                raise refusal(_what(method, target), status, message, answer)
            tried = token

    async def _answer(
        self, method: str, target: str, body: bytes | None, head: Mapping[str, str]
    ) -> tuple[int, dict[str, str], _Connection]:
        """Status and head. A kept connection that the server closed is replaced, where that cannot do harm."""
        kept = True
        while True:
            if (connection := self._take()) is None:
                connection = await self._connect()
                kept = False
            try:
                async with asyncio.timeout(self._seconds):
                    await connection.ask(method, target, body, {**self._head(), **head})
                    return *(await connection.head()), connection
            except (OSError, h11.ProtocolError, TimeoutError) as error:
                connection.close()
                if kept and method == "GET" and not isinstance(error, TimeoutError):
                    continue
                raise KubeError(f"{_what(method, target)}: no answer: {_cause(error)}") from None
            except BaseException:
                connection.close()
                raise

    def _head(self) -> dict[str, str]:
        head = {"host": self._access.authority, "user-agent": f"sluice/{__version__}"}
        if token := self._access.token():
            head["authorization"] = f"Bearer {token}"
        return head

    async def _connect(self) -> _Connection:
        at = self._access
        context = self._access.context()
        try:
            async with asyncio.timeout(_CONNECT):
                reader, writer = await asyncio.open_connection(at.host, at.port, ssl=context)
        except (OSError, TimeoutError) as error:
            if isinstance(error, ssl.SSLCertVerificationError):
                at.refused()
                raise KubeError(f"API server {at.authority} is not of our CA: {error}; check kube_ca_file") from None
            raise KubeError(f"API server {at.authority}: {_cause(error)}") from None
        return _Connection(reader, writer, context)

    def _take(self) -> _Connection | None:
        context = self._access.context()
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.context is context and now - connection.since < self._keeping:
                connection.kept = False
                return connection
            connection.close()
        return None

    def _keep(self, connection: _Connection) -> None:
        if connection.again() and len(self._idle) < _AT_ONCE:
            connection.kept = True
            connection.since = time.monotonic()
            self._idle.append(connection)
            self._later()

    def _later(self) -> None:
        if self._timer is None and self._idle:
            self._timer = asyncio.get_running_loop().call_later(self._keeping, self._sweep)

    def _sweep(self) -> None:
        """Closes what has been idle for long: each connection is some 300 KB."""
        now = time.monotonic()
        idle = self._idle
        self._idle = []
        self._timer = None
        for connection in idle:
            if connection.usable and now - connection.since < self._keeping:
                self._idle.append(connection)
            else:
                connection.close()
        self._later()


class _Connection:
    """One request and its answer after the other. Raises OSError and h11.ProtocolError."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext | None
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.context = context
        self._h11 = h11.Connection(h11.CLIENT)
        self.kept = False
        self.since = 0.0
        _keep_alive(writer.get_extra_info("socket"))

    @property
    def usable(self) -> bool:
        return not self._reader.at_eof() and not self._writer.is_closing()

    async def ask(self, method: str, target: str, body: bytes | None, head: Mapping[str, str]) -> None:
        lines = [*head.items(), *([] if body is None else [("content-length", str(len(body)))])]
        events: list[h11.Event] = [h11.Request(method=method, target=target, headers=lines)]
        if body is not None:
            events.append(h11.Data(data=body))
        self._writer.write(b"".join(self._h11.send(event) or b"" for event in (*events, h11.EndOfMessage())))
        await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event.status_code, {
                    name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers
                }
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("the connection was closed before an answer")

    async def body(self, quiet: float) -> AsyncIterator[bytes]:
        while True:
            async with asyncio.timeout(quiet):
                event = await self._next()
            if not isinstance(event, h11.Data):
                return
            yield bytes(event.data)

    async def _next(self) -> Any:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._h11.receive_data(await self._reader.read(_READ))
        return event

    def again(self) -> bool:
        """Returns True if it can take another request, after a complete answer."""
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE and self.usable:
            self._h11.start_next_cycle()
            return True
        return False

    def close_unless_kept(self) -> None:
        if not self.kept:
            self.close()

    def close(self) -> None:
        self._writer.transport.abort()  # a TLS farewell would wait for a server that may be gone


def _keep_alive(sock: socket.socket) -> None:
    """Sets keepalive: a server that vanished is noticed after some 30 s, also on a silent watch."""
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),  # milliseconds
    ):
        sock.setsockopt(level, option, value)


async def _bounded(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > _MOST:
            raise KubeError(f"an answer of more than {_MOST >> 20} MB was not read to its end")
        yield piece


def _target(path: str, query: Mapping[str, str] | None) -> str:
    return f"{path}?{urlencode(query)}" if query else path


def _what(method: str, target: str) -> str:
    return f"{method} {target.partition('?')[0]}"


def _cause(error: BaseException) -> str:
    return str(error) or ("it took too long" if isinstance(error, TimeoutError) else type(error).__name__)
