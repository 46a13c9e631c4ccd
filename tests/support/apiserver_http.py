# SPDX-License-Identifier: Apache-2.0
"""The API server of the tests as a conversation: HTTP/1.1 by h11, lists, watches, patches and reviews."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import h11
from support.apiserver_faults import Fault, Faults, Kind, Where
from support.apiserver_store import GROUPS, KINDS, Store, TestFailed, by_type, merged, patched
from support.apiserver_views import View, status

Json = dict[str, Any]


_APPLY = "application/apply-patch+yaml"  # whose JSON is merged here, whoever owns the fields


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str, retry_after: str = "") -> None:
        super().__init__(message)
        self.code, self.body = code, status(code, reason, message)
        self.head = {"retry-after": retry_after} if retry_after else {}


class Cut(Exception):
    """The connection is to be aborted."""


@dataclass(frozen=True)
class Asked:
    """One request, as the tests look at it afterwards."""

    method: str
    path: str
    query: dict[str, str]
    head: dict[str, str]
    body: Any
    connection: int

    @property
    def watch(self) -> bool:
        return self.query.get("watch") in ("1", "true")


@dataclass
class Rights:
    """`tokens` may talk to us; `users` are behind tokens to review; `grants`: (user, verb, namespace, resource)."""

    tokens: set[str] = field(default_factory=set)
    users: dict[str, Json] = field(default_factory=dict)
    grants: set[tuple[str, str, str, str]] = field(default_factory=set)


class Conversation:
    """Callable as asyncio's client_connected_cb."""

    def __init__(self, store: Store, faults: Faults, rights: Rights) -> None:
        self.store, self.faults, self.rights = store, faults, rights
        self.asked: list[Asked] = []
        self.open: set[asyncio.StreamWriter] = set()
        self.left = asyncio.Event()  # set when a client has gone
        self.accepted = self.watching = 0
        self.bookmark_seconds = 60.0
        self.caches = True  # a list of version "0" ignores its limit, as from a real server's cache
        self._rest: dict[str, tuple[int, list[Json]]] = {}  # of lists in pages

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        self.accepted += 1
        number, connection = self.accepted, h11.Connection(h11.SERVER)
        with contextlib.suppress(OSError, h11.ProtocolError, Cut, asyncio.CancelledError):
            try:
                while (asked := await _request(connection, reader, number)) is not None:
                    self.asked.append(asked)
                    await self._answer(asked, connection, reader, writer)
                    if connection.our_state is not h11.DONE:
                        break
                    connection.start_next_cycle()
            finally:
                self.open.discard(writer)
                self.left.set()
                writer.transport.abort()

    async def _answer(
        self, asked: Asked, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        out = _Out(connection, writer)
        try:
            if asked.head.get("authorization", "").removeprefix("Bearer ") not in self.rights.tokens:
                raise Refused(401, "Unauthorized", "Unauthorized")
            fault = await self._met(asked, out)
            if "sendInitialEvents" in asked.query:  # as a server without that feature: the client lists first
                raise Refused(422, "Invalid", "sendInitialEvents is forbidden")
            if asked.watch:
                await self._watch(asked, out, reader)
            elif (at := _Place.of(asked.path)) and asked.method == "GET" and not at.name:
                await self._list(asked, at, out, fault)
            else:
                await out.whole(200, self._single(asked))
        except Refused as refused:
            await out.whole(refused.code, refused.body, refused.head)

    async def _met(self, asked: Asked, out: _Out) -> Fault | None:
        """The fault for this request, as far as it is met before its answer."""
        kind = _where(asked)
        fault = self.faults.take(asked.path, Where.ANY, kind, *([Where.LIST] if kind is Where.PAGE else []))
        if fault is None or fault.kind in (Kind.CUT, Kind.CUT_SHORT, Kind.GONE, Kind.GARBAGE):
            return fault
        if fault.kind is Kind.STATUS:
            raise Refused(fault.code, fault.reason, "as the test wants it", fault.retry_after)
        if fault.kind is Kind.HANG_UP:
            raise Cut
        await asyncio.sleep(1e6 if fault.kind is Kind.STALL else fault.seconds)
        return None

    # Lists

    async def _list(self, asked: Asked, at: _Place, out: _Out, fault: Fault | None) -> None:
        limit = int(asked.query.get("limit", 0))
        version, items = self._selected(asked, at)
        if self.caches and asked.query.get("resourceVersion") == "0":
            limit = 0
        more = ""
        if limit and len(items) > limit:
            more = base64.b64encode(json.dumps([version, len(self._rest)]).encode()).decode()
            self._rest[more] = (version, items[limit:])
            items = items[:limit]
        view = View(asked.head.get("accept", ""))
        body = _texts(view, at.resource, version, more, items)
        await out.begin(200)
        if fault is None or fault.kind not in (Kind.CUT, Kind.CUT_SHORT):
            for text in body:
                await out.data(text.encode())
            await out.end()
            return
        await out.data("".join(body).encode()[: fault.size])
        if fault.kind is Kind.CUT:
            raise Cut
        await out.end()

    def _selected(self, asked: Asked, at: _Place) -> tuple[int, list[Json]]:
        if token := asked.query.get("continue"):
            version, items = self._rest.get(token, (0, []))
            if version < self.store.compacted or token not in self._rest:
                raise Refused(410, "Expired", "The provided continue parameter is too old")
            return version, items
        wanted = asked.query.get("resourceVersion") or "0"
        if int(wanted) > self.store.version:
            raise Refused(504, "Timeout", f"Too large resource version: {wanted}")
        return self.store.version, self.store.matching(at.resource, at.namespace, _selector(asked))

    # Watches

    async def _watch(self, asked: Asked, out: _Out, reader: asyncio.StreamReader) -> None:
        at = _Place.of(asked.path)
        assert at is not None
        version, view = int(asked.query.get("resourceVersion") or 0), View(asked.head.get("accept", ""))
        ends = time.monotonic() + float(asked.query.get("timeoutSeconds", 1800))
        await out.begin(200)
        self.watching += 1
        watch, left = asyncio.current_task(), asyncio.ensure_future(reader.read(1))
        assert watch is not None

        def cancel(_: object) -> None:
            watch.cancel()

        left.add_done_callback(cancel)  # a client that has gone watches nothing
        try:
            async for verb, value in self._lines(asked, at, version, ends):
                shown = value if verb == "ERROR" else view.one(value)
                await self._line(asked, {"type": verb, "object": shown}, out)
        finally:
            self.watching -= 1
            left.remove_done_callback(cancel)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
        await out.end()

    async def _lines(self, asked: Asked, at: _Place, version: int, ends: float) -> AsyncIterator[tuple[str, Json]]:
        marks, beat = asked.query.get("allowWatchBookmarks") == "true", time.monotonic()
        selector = _selector(asked)
        while True:
            news, until = self.store.news, min(ends, beat + self.bookmark_seconds if marks else ends)
            if version < self.store.compacted:
                yield "ERROR", status(410, "Expired", f"too old resource version: {version}")
                return
            seen = self.store.version
            for _, verb, value in list(self.store.since(version, at.resource, at.namespace, selector)):
                yield verb, value
            version = seen
            if self.store.version > seen:
                continue
            if time.monotonic() >= until:
                beat = time.monotonic()
                if marks:
                    yield "BOOKMARK", _bookmark(at.resource, version)
                if beat >= ends:
                    return
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until - time.monotonic()):
                    await news.wait()

    async def _line(self, asked: Asked, event: Json, out: _Out) -> None:
        fault = self.faults.take(asked.path, Where.EVENT)
        if fault is None:
            await out.line(event)
        elif fault.kind is Kind.DELAY:
            await asyncio.sleep(fault.seconds)
            await out.line(event)
        elif fault.kind is Kind.STALL:
            await asyncio.sleep(1e6)
        elif fault.kind is Kind.GARBAGE:
            await out.data(b'{"type":"ADDED","object":[}\n')
        elif fault.kind is Kind.GONE:
            told = status(fault.code, fault.reason, "as the test wants it")
            await out.line({"type": "ERROR", "object": told})
            raise Cut
        else:
            text = json.dumps(event).encode()
            if fault.kind is not Kind.HANG_UP:
                await out.data(text[: len(text) // 2])
            if fault.kind is Kind.CUT_SHORT:
                await out.end()
            raise Cut

    # Single objects and reviews

    def _single(self, asked: Asked) -> Json:
        if asked.path.endswith("/tokenreviews"):
            user = self.rights.users.get(asked.body["spec"]["token"])
            return {**asked.body, "status": {"authenticated": user is not None, **({"user": user} if user else {})}}
        if asked.path.endswith("/subjectaccessreviews"):
            return {**asked.body, "status": {"allowed": self._granted(asked.body["spec"])}}
        if asked.path == "/version":
            return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        at = _Place.of(asked.path)
        if at is None:
            raise Refused(404, "NotFound", f"{asked.path} is not served")
        if asked.method in ("POST", "PUT"):
            metadata = {**asked.body["metadata"], "namespace": at.namespace}
            if asked.method == "POST" and (at.namespace, metadata.get("name")) in self.store.objects[at.resource]:
                raise Refused(409, "AlreadyExists", f'{at.resource} "{metadata["name"]}" already exists')
            head = {"kind": KINDS[at.resource], "apiVersion": GROUPS.get(at.resource, "v1"), "metadata": metadata}
            return self.store.put({**asked.body, **head})
        found = self.store.objects[at.resource].get((at.namespace, at.name))
        if found is None:
            raise Refused(404, "NotFound", f'{at.resource} "{at.name}" not found')
        return found if asked.method == "GET" else self._patch(asked, found)

    def _granted(self, spec: Json) -> bool:
        what = spec.get("resourceAttributes") or {}
        resource = "/".join(filter(None, (what.get("resource", ""), what.get("subresource", ""))))
        wanted = (spec.get("user", ""), what.get("verb", ""), what.get("namespace", ""), resource)
        return wanted in self.rights.grants or (*wanted[:2], "", resource) in self.rights.grants

    def _patch(self, asked: Asked, found: Json) -> Json:
        if asked.head["content-type"] == "application/json-patch+json":
            try:
                return self.store.put(patched(found, asked.body))
            except TestFailed as error:
                raise Refused(422, "Invalid", f"the server rejected our request: {error}") from None
        kind = asked.head["content-type"]
        if kind not in (*(f"application/{one}merge-patch+json" for one in ("", "strategic-")), _APPLY):
            raise Refused(415, "UnsupportedMediaType", asked.head["content-type"])
        metadata = asked.body.get("metadata", {})
        for key in ("uid", "resourceVersion"):
            if metadata.get(key, found["metadata"].get(key)) != found["metadata"].get(key):
                raise Refused(409, "Conflict", f"Precondition failed: {key} in precondition differs")
        return self.store.put(merged(found, by_type(found, asked.body) if "strategic" in kind else asked.body))


@dataclass(frozen=True)
class _Place:
    resource: str
    namespace: str = ""
    name: str = ""

    @classmethod
    def of(cls, path: str) -> _Place | None:
        """Parses /api/v1/[namespaces/NS/]RESOURCE[/NAME[/status]], and the same below /apis/GROUP/VERSION/."""
        words = path.split("/")[1:]
        prefix, words = ("v1", words[2:]) if words[0] == "api" else ("/".join(words[1:3]), words[3:])
        namespace = ""
        if words[:1] == ["namespaces"] and len(words) > 2 and words[2] in KINDS:
            namespace, words = words[1], words[2:]
        if not words or words[0] not in KINDS or GROUPS.get(words[0], "v1") != prefix:
            return None
        return cls(words[0], namespace, words[1] if len(words) > 1 else "")


class _Out:
    """One answer."""

    def __init__(self, connection: h11.Connection, writer: asyncio.StreamWriter) -> None:
        self._h11, self._writer = connection, writer

    async def begin(self, code: int, head: dict[str, str] | None = None) -> None:
        lines = {"content-type": "application/json", **(head or {})}
        await self._send(h11.Response(status_code=code, headers=list(lines.items())))

    async def data(self, data: bytes) -> None:
        await self._send(h11.Data(data=data))

    async def line(self, value: Json) -> None:
        await self.data(json.dumps(value).encode() + b"\n")

    async def end(self) -> None:
        await self._send(h11.EndOfMessage())

    async def whole(self, code: int, value: Json, head: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        await self.begin(code, {"content-length": str(len(body)), **(head or {})})
        await self.data(body)
        await self.end()

    async def _send(self, event: h11.Event) -> None:
        self._writer.write(self._h11.send(event) or b"")
        await self._writer.drain()


async def _request(connection: h11.Connection, reader: asyncio.StreamReader, number: int) -> Asked | None:
    """The next request, whole; None when the client closed."""
    request, body = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            parts = urlsplit(request.target.decode())
            head = {name.decode(): value.decode() for name, value in request.headers}
            value = json.loads(body) if body else None
            return Asked(request.method.decode(), parts.path, dict(parse_qsl(parts.query)), head, value, number)
        else:
            return None


def _selector(asked: Asked) -> str:
    """Both selectors as one of fields."""
    labels = [f"metadata.labels.{term}" for term in asked.query.get("labelSelector", "").split(",") if term]
    return ",".join(filter(None, (asked.query.get("fieldSelector", ""), *labels)))


def _where(asked: Asked) -> Where:
    at = _Place.of(asked.path)
    if asked.method != "GET":
        return Where.WRITE
    if asked.watch:
        return Where.WATCH
    if at is not None and not at.name:
        return Where.PAGE if "continue" in asked.query else Where.LIST
    return Where.READ


def _texts(view: View, resource: str, version: int, more: str, items: list[Json]) -> Iterator[str]:
    """A list's JSON in parts, so that 20,000 objects are never one text."""
    metadata = {"resourceVersion": str(version), **({"continue": more, "remainingItemCount": 1} if more else {})}
    kind, api = KINDS[resource], GROUPS.get(resource, "v1")
    yield json.dumps(view.head(kind, metadata, api))[:-1] + f', "{view.items}": ['
    for first in range(0, len(items), 50):
        part = json.dumps([view.item(value) for value in items[first : first + 50]])[1:-1]
        yield part if not first else ", " + part
    yield "]}\n"


def _bookmark(resource: str, version: int) -> Json:
    head = {"kind": KINDS[resource], "apiVersion": GROUPS.get(resource, "v1")}
    return {**head, "metadata": {"resourceVersion": str(version)}}
