# SPDX-License-Identifier: Apache-2.0
"""The page of /metrics: the agent's registry, and the totals of connections, which may be megabytes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from agent.core.errors import SluiceError
from agent.core.model.pods import Pod
from agent.export import exposition
from agent.flows.label_totals import LabelTotals, Snapshot
from agent.flows.record import Delta, Quality
from agent.kernel import http
from agent.kernel.http import Request, Response

log = logging.getLogger("sluice.metrics")
_PAUSE = 4  # a page that took so long is followed by a pause of so many times as long, up to 3 s
_LONGEST = 3.0


class SharedTotals:
    """Totals of connections, shared by the threads that add to them and those that render them."""

    def __init__(self, totals: LabelTotals) -> None:
        self._totals = totals
        self._lock = threading.Lock()

    def add(
        self,
        deltas: Iterable[Delta],
        qualities: Iterable[Quality],
        identify: Callable[[int], Pod | None],
        now: float,
    ) -> None:
        """Adds counts as LabelTotals.add does; from any thread. Only waits for a copy of the numbers."""
        with self._lock:
            self._totals.add(deltas, qualities, identify, now)

    def snapshot(self) -> Snapshot:
        with self._lock:
            return self._totals.snapshot()


class ConnectionMetrics:
    """Renders the totals of connections.

    `losses` is cumulative, by cause; `refresh` adds the newest counts, and is called before rendering. Both may raise
    SluiceError.
    """

    def __init__(
        self,
        totals: SharedTotals,
        losses: Callable[[], Mapping[str, int]] = dict,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._totals = totals
        self._losses = losses
        self._refresh = refresh

    def render(self, openmetrics: bool) -> Iterator[bytes]:
        """Yields the families one by one, without "# EOF"; from any thread."""
        losses: Mapping[str, int] = {}
        try:
            self._refresh()
            losses = self._losses()
        except SluiceError as error:  # what was known before is still true
            log.warning("cannot read connection counters: %s", error)
        yield from exposition.connections(self._totals.snapshot(), losses.items(), openmetrics=openmetrics)


class Page:
    """Answers GET /metrics in the requested format.

    The registry is read on the event loop, which owns the values of its collectors; connections on a worker thread.
    Requests during the writing of a page share it, so many scrapers cost no more than one. The next page begins after a
    pause: writing pages takes at most a fifth of a core.
    """

    def __init__(self, registry: CollectorRegistry, connections: ConnectionMetrics | None = None) -> None:
        self._registry = registry
        self._connections = connections
        self._underway: dict[bool, asyncio.Task[bytes]] = {}
        self._next = 0.0  # when the next page may be begun

    async def __call__(self, request: Request) -> Response:
        openmetrics = http.wants_openmetrics(request.headers.get("accept", ""))
        writing = self._underway.get(openmetrics)
        if writing is None:
            writing = self._underway[openmetrics] = asyncio.create_task(self._write(openmetrics))
        body = await asyncio.shield(writing)  # a client that disconnects does not cancel the page of others
        return Response(200, body, http.OPENMETRICS if openmetrics else http.PLAIN)

    async def _write(self, openmetrics: bool) -> bytes:
        loop = asyncio.get_running_loop()
        started = 0.0
        try:
            await asyncio.sleep(max(0.0, self._next - loop.time()))
            started = loop.time()
            own = self.own(openmetrics)
            return own if self._connections is None else await asyncio.to_thread(self._joined, own, openmetrics)
        finally:
            del self._underway[openmetrics]
            if started:
                took = loop.time() - started
                self._next = loop.time() + min(_LONGEST, _PAUSE * took)

    def own(self, openmetrics: bool) -> bytes:
        """Returns the registry as a complete page."""
        if not openmetrics:
            return generate_latest(self._registry)
        return bytes(generate_openmetrics(self._registry))  # type: ignore[no-untyped-call]

    def _joined(self, own: bytes, openmetrics: bool) -> bytes:
        assert self._connections is not None
        return exposition.joined(own, self._connections.render(openmetrics), openmetrics=openmetrics)
