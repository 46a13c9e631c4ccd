# SPDX-License-Identifier: Apache-2.0
"""Follows one collection of the API server: lists it, watches it, and updates a sink."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from agent.core.errors import KubeError, ProtocolError
from agent.sources.kube import protocol
from agent.sources.kube.api_client import JSON, Client
from agent.sources.kube.protocol import Course, Json, Lines, Listing, Pace, Rows, WatchVerb

log = logging.getLogger("sluice.kube")
T = TypeVar("T")
C = TypeVar("C", contravariant=True)


class Sink(Protocol[C]):
    """Takes objects, on the event loop, so it must be quick; repeated objects change nothing."""

    def listed(self, objects: Sequence[C], /) -> None:
        """Takes the complete state: objects missing from it are gone."""

    def changed(self, object: C, /) -> None: ...

    def removed(self, object: C, /) -> None: ...


@dataclass(slots=True, kw_only=True)
class Since:
    """Counters since the start."""

    lists: int = 0  # complete ones
    watches: int = 0  # that the server accepted
    events: int = 0
    bookmarks: int = 0
    failures: int = 0


class Follower(Generic[T]):
    """Follows one collection. `synced` is set after the first complete list; `error` is "" on success."""

    def __init__(
        self,
        client: Client,
        path: str,
        *,
        query: Mapping[str, str],
        decode: Callable[[Json], T | None],
        sink: Sink[T],
        random: Callable[[], float],
        accept: str = JSON,
        pace: Pace = Pace(),  # noqa: B008 (frozen)
        synced: asyncio.Event | None = None,
    ) -> None:
        """Takes `query`: fieldSelector and the like; `random`: uniform in [0, 1).

        `decode` returns None for an unusable object; a Table's rows come one by one (protocol.Rows).
        """
        self.path = path
        self.synced = synced or asyncio.Event()
        self.error = ""
        self.since = Since()
        self._client = client
        self._query = dict(query)
        self._accept = accept
        self._pace = pace
        self._decode = decode
        self._sink = sink
        self._course = Course(random, pace)
        self._found: list[T] = []  # of the pages of a list that has begun

    async def run(self) -> None:
        """Runs until cancelled; no behaviour of the server ends it."""
        while True:
            await asyncio.sleep(self._course.pause(time.monotonic()))
            try:
                await (self._list() if self._course.listing else self._watch())
            except (KubeError, ProtocolError) as error:
                self._failed(error)
            except Exception as error:  # a defect in one object must not end it
                log.exception("%s: following failed", self.path)
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        self.since.failures += 1
        self._course.failed(error, now)
        if not self._course.pause(now):  # history was compacted meanwhile, as happens
            log.info("following %s: %s", self.path, error)
            return
        reported = self.error
        self.error = str(error) or type(error).__name__
        if isinstance(error, KubeError) and error.status == 403:
            self.error += f"; the agent's role has to allow list and watch of {self.path}"
        if not reported:
            log.warning("following %s: %s", self.path, self.error)

    async def _list(self) -> None:
        course = self._course
        listing = Listing()
        page = list[T]()
        if not course.more:
            self._found = []
        query = {**self._query, **course.query(time.monotonic())}
        async with self._client.stream(self.path, query, self._accept, self._pace.quiet) as pieces:
            async for piece in pieces:
                page += [value for one in listing.feed(piece) if (value := self._decode(one)) is not None]
                await asyncio.sleep(0)  # a server that is quicker than we are must not hold up the loop
        version, more = listing.end()
        self._found += page
        if course.page(version, more):
            objects = self._found
            self._found = []
            self.error = ""
            self._sink.listed(objects)
            self.since.lists += 1
            self.synced.set()

    async def _watch(self) -> None:
        course = self._course
        lines = Lines()
        rows = Rows()
        query = {**self._query, **course.query(time.monotonic())}
        async with self._client.stream(self.path, query, self._accept, course.silence) as pieces:
            self.since.watches = self.since.watches + 1
            self.error = ""
            async for piece in pieces:
                for line in lines.feed(piece):
                    self._take(line, rows)
        course.ended(time.monotonic())

    def _take(self, line: bytes, rows: Rows) -> None:
        verb, body = protocol.event(line)
        if verb is WatchVerb.BOOKMARK:
            self.since.bookmarks += 1
        else:
            self.since.events += 1
            for one in rows.unfold(body):
                if (value := self._decode(one)) is not None:
                    (self._sink.removed if verb is WatchVerb.DELETED else self._sink.changed)(value)
        self._course.received(protocol.version(body), verb is WatchVerb.BOOKMARK)
