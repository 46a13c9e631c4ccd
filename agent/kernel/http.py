# SPDX-License-Identifier: Apache-2.0
"""A small HTTP/1.1 server: h11 parses; one request per connection, limited in size and time."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import h11

from agent.kernel.accepting import Limits, reset_at_close, strangers

log = logging.getLogger("sluice.http")
SECONDS = 10  # for a client to send its request and to take the answer
_WORTH_COMPRESSING = 1024  # bytes
_WORTH_A_THREAD = 1 << 16  # bytes; less is compressed in less time than the hop takes
_HEAD = 16384  # bytes of a request
# Of Prometheus (exposition_formats.md) and OpenMetrics.
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_MOST, _EACH = 256, 8  # connections in all, and of one address: a scraper needs one
_SLICE = 1 << 18  # bytes; a client that is slow to read keeps no more of them in memory than this


@dataclass(frozen=True, slots=True)
class Request:
    """A request. Names of `headers` are lower case; repeated headers are joined with commas."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Response:
        return cls(status, json.dumps(value).encode() + b"\n", "application/json")

    @classmethod
    def text(cls, content: str, status: int = 200) -> Response:
        return cls(status, content.encode() + b"\n")


Handler = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """An HTTP server, callable as asyncio's client_connected_cb."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def serve(self, listener: socket.socket, most: int = _MOST, each: int = _EACH) -> None:
        """Serves until cancelled. At most `most` connections in all, `each` per address; others are reset."""
        await strangers(listener, Limits(most, each), self._streams)

    async def _streams(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock, limit=_HEAD)
        await self(reader, writer)
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD)
        with contextlib.suppress(OSError, TimeoutError, h11.ProtocolError):
            try:
                event = None
                try:
                    async with asyncio.timeout(SECONDS):
                        event = await _request(connection, reader)
                    response = await self._answer(event)
                except h11.RemoteProtocolError as error:
                    response = Response.text(f"bad request: {error}", error.error_status_hint)
                pieces = await _pieces(connection, event, response)
                async with asyncio.timeout(SECONDS):
                    await _send(writer, pieces)
            except (OSError, TimeoutError):  # what a client does not take is not kept for it
                reset_at_close(writer.get_extra_info("socket"))
                raise
            finally:
                writer.transport.abort()

    async def _answer(self, event: h11.Request) -> Response:
        try:
            parts = urlsplit(event.target.decode("ascii", "replace"))
        except ValueError as error:
            return Response.text(f"bad request: {error}", 400)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        request = Request(event.method.decode(), parts.path, query, _headers(event))
        try:
            return await self._handler(request)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return Response.text("internal error; see the agent's log", 500)


async def _request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request:
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_HEAD))
        elif isinstance(event, h11.Request):
            return event
        else:
            raise h11.RemoteProtocolError("no request")


def _headers(event: h11.Request) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw, value in event.headers:
        name = raw.decode("latin-1")
        text = value.decode("latin-1")
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return headers


async def _pieces(connection: h11.Connection, event: h11.Request | None, response: Response) -> list[bytes]:
    body = response.body
    headers = [("content-type", response.content_type), ("connection", "close")]
    if event is not None and len(body) >= _WORTH_COMPRESSING and takes_gzip(_headers(event).get("accept-encoding", "")):
        large = len(body) >= _WORTH_A_THREAD
        body = await asyncio.to_thread(gzip.compress, body, 1) if large else gzip.compress(body, 1)
        headers.append(("content-encoding", "gzip"))
    headers.append(("content-length", str(len(body))))
    events: list[h11.Event] = [h11.Response(status_code=response.status, headers=headers)]
    if event is None or event.method != b"HEAD":
        events.append(h11.Data(data=body))
    return [connection.send(part) or b"" for part in (*events, h11.EndOfMessage())]


async def _send(writer: asyncio.StreamWriter, pieces: list[bytes]) -> None:
    """Sends all pieces; returns when the kernel has taken them."""
    writer.transport.set_write_buffer_limits(high=0)
    for piece in pieces:
        view = memoryview(piece)
        for start in range(0, len(view), _SLICE):
            writer.write(view[start : start + _SLICE])
            await writer.drain()


def takes_gzip(accept_encoding: str) -> bool:
    """Returns whether gzip is accepted (RFC 9110, 12.5.3): "*" covers unnamed codings, weight 0 refuses."""
    weights = {coding: weight for coding, _, weight in choices(accept_encoding)}
    return next((weights[name] for name in ("gzip", "x-gzip", "*") if name in weights), 0.0) > 0


def choices(header: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yields each option of a content negotiation header in lower case, its parameters, and its weight, 0 to 1.

    RFC 9110, 12.4.2. An invalid weight refuses, since its meaning is unknown.
    """
    for part in header.lower().split(","):
        what, *attributes = (word.strip() for word in part.split(";"))
        parameters = {key.strip(): value.strip() for key, _, value in (word.partition("=") for word in attributes)}
        try:
            weight = float(parameters.pop("q", "1"))
        except ValueError:
            weight = 0.0
        yield what, parameters, weight if 0 <= weight <= 1 else 0.0


def wants_openmetrics(accept: str) -> bool:
    """Returns whether a request's Accept header names OpenMetrics and prefers it to plain text, or equally."""
    best = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for kind, parameters, weight in choices(accept):
        if kind in best and (kind == "text/plain" or parameters.get("version", "1.0.0") == "1.0.0"):
            best[kind] = max(best[kind], weight)
    return 0 < best["application/openmetrics-text"] >= best["text/plain"]
