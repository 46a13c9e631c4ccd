"""A small HTTP/1.1 server: h11 parses, one request per connection, bounded in size and time."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import h11

log = logging.getLogger("sluice.http")
SECONDS = 10  # for a client to send its request and to take the answer
_WORTH_COMPRESSING = 1024  # bytes


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Response:
        return cls(status, json.dumps(value).encode() + b"\n", "application/json")

    @classmethod
    def text(cls, words: str, status: int = 200) -> Response:
        return cls(status, words.encode() + b"\n")


Handler = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """Callable as asyncio's client_connected_cb."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16384)
        with contextlib.suppress(OSError, TimeoutError, h11.ProtocolError):
            try:
                event = None
                try:
                    async with asyncio.timeout(SECONDS):
                        event = await _request(connection, reader)
                    response = await self._answer(event)
                except h11.RemoteProtocolError as error:
                    response = Response.text(f"bad request: {error}", error.error_status_hint)
                async with asyncio.timeout(SECONDS):
                    writer.write(_bytes(connection, event, response))
                    await writer.drain()
            finally:
                writer.close()

    async def _answer(self, event: h11.Request) -> Response:
        try:
            parts = urlsplit(event.target.decode("ascii", "replace"))
        except ValueError as error:
            return Response.text(f"bad request: {error}", 400)
        request = Request(event.method.decode(), parts.path, dict(parse_qsl(parts.query)))
        try:
            return await self._handler(request)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return Response.text("internal error; see the agent's log", 500)


async def _request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request:
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(16384))
        elif isinstance(event, h11.Request):
            return event
        else:
            raise h11.RemoteProtocolError("no request")


def _bytes(connection: h11.Connection, event: h11.Request | None, response: Response) -> bytes:
    body = response.body
    headers = [("content-type", response.content_type), ("connection", "close")]
    accepted = dict(event.headers).get(b"accept-encoding", b"") if event else b""
    if b"gzip" in accepted and len(body) >= _WORTH_COMPRESSING:
        body = gzip.compress(body, 1)
        headers.append(("content-encoding", "gzip"))
    headers.append(("content-length", str(len(body))))
    events: list[h11.Event] = [h11.Response(status_code=response.status, headers=headers)]
    if event is None or event.method != b"HEAD":
        events.append(h11.Data(data=body))
    return b"".join(connection.send(part) or b"" for part in (*events, h11.EndOfMessage()))
