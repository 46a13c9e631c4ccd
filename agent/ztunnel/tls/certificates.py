# SPDX-License-Identifier: Apache-2.0
"""The certificates of this node's identities: requested once per identity, renewed at half of their life.

A certificate that is still valid is kept while the CA does not answer. Failures back off per identity; at most
CONCURRENT requests run at once, those that a connection waits for first.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from agent.core.errors import SluiceError
from agent.ztunnel.tls.contexts import Credentials
from agent.ztunnel.tls.keys import Validity, validity
from agent.ztunnel.tls.spiffe import SpiffeId

CONCURRENT: Final = 8
FIRST_BACKOFF: Final = 0.5  # seconds; doubles up to LAST_BACKOFF
LAST_BACKOFF: Final = 150.0

log = logging.getLogger(__name__)
Issue = Callable[[SpiffeId], Awaitable[Credentials]]


class CertificateState(Enum):
    """The state of an identity, as config_dump shows it."""

    REQUESTED = "Initializing"
    AVAILABLE = "Available"
    UNAVAILABLE = "Unavailable"


@dataclass(slots=True, kw_only=True)
class _Held:
    credentials: Credentials | None = None
    validity: Validity | None = None
    backoff: float = 0.0
    error: str = ""
    requested: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateStatus:
    """State of an identity's certificate; `error` is that of the last request."""

    identity: SpiffeId
    state: CertificateState
    credentials: Credentials | None
    validity: Validity | None
    error: str


class Certificates:
    """Belongs to one event loop. `deliver` gets each new certificate."""

    def __init__(
        self, issue: Issue, deliver: Callable[[Credentials], None], wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._issue = issue
        self._deliver = deliver
        self._wall_clock = wall_clock
        self._held: dict[SpiffeId, _Held] = {}
        self._queue: list[tuple[int, int, SpiffeId]] = []  # (0 = awaited, 1 = renewal; order; identity)
        self._order = itertools.count()
        self._timers: dict[SpiffeId, asyncio.TimerHandle] = {}
        self._running: set[asyncio.Task[None]] = set()

    def want(self, identity: SpiffeId) -> None:
        """Requests the identity's certificate, or delivers the one that is held."""
        held = self._held.setdefault(identity, _Held())
        if held.credentials is not None and self._valid(held):
            self._deliver(held.credentials)
        elif not held.requested and identity not in self._timers:
            self._request(identity, held, 0)

    def forget(self, identity: SpiffeId) -> None:
        """Drops an identity that no pod has any more; a request under way changes nothing then."""
        self._held.pop(identity, None)
        if timer := self._timers.pop(identity, None):
            timer.cancel()

    def renew(self, identity: SpiffeId) -> None:
        """Requests a new certificate now, as when the files have changed."""
        held = self._held.get(identity)
        if held is not None and not held.requested:
            if timer := self._timers.pop(identity, None):
                timer.cancel()
            self._request(identity, held, 0)

    def statuses(self) -> list[CertificateStatus]:
        return [self._status(identity, held) for identity, held in self._held.items()]

    def _status(self, identity: SpiffeId, held: _Held) -> CertificateStatus:
        state = CertificateState.AVAILABLE if self._valid(held) else CertificateState.REQUESTED
        if held.error and state is not CertificateState.AVAILABLE:
            state = CertificateState.UNAVAILABLE
        return CertificateStatus(
            identity=identity, state=state, credentials=held.credentials, validity=held.validity, error=held.error
        )

    async def close(self) -> None:
        """Ends requests and timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._queue.clear()
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _valid(self, held: _Held) -> bool:
        return held.validity is not None and self._wall_clock() < held.validity.end

    def _request(self, identity: SpiffeId, held: _Held, priority: int) -> None:
        held.requested = True
        heapq.heappush(self._queue, (priority, next(self._order), identity))
        self._next()

    def _next(self) -> None:
        while self._queue and len(self._running) < CONCURRENT:
            identity = heapq.heappop(self._queue)[2]
            held = self._held.get(identity)
            if held is not None:
                task = asyncio.get_running_loop().create_task(self._run(identity, held))
                self._running.add(task)
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            self._next()

    async def _run(self, identity: SpiffeId, held: _Held) -> None:
        try:
            credentials = await self._issue(identity)
            valid = validity(credentials)
            if self._wall_clock() >= valid.end:
                raise SluiceError(f"the certificate of {identity} has expired already")
            if self._held.get(identity) is held:
                self._deliver(credentials)
        except SluiceError as error:
            self._failed(identity, held, error)
            return
        except Exception as error:  # a defect of one identity must not stop the others
            log.exception("certificate of %s", identity)
            self._failed(identity, held, error)
            return
        if held.error:
            log.info("certificate of %s: issued again", identity)
        held.credentials = credentials
        held.validity = valid
        held.backoff = 0.0
        held.error = ""
        held.requested = False
        self._later(identity, held, max(FIRST_BACKOFF, valid.half - self._wall_clock()))

    def _failed(self, identity: SpiffeId, held: _Held, error: Exception) -> None:
        if str(error) != held.error:  # once, not at each try
            kept = "; the previous one is kept" if self._valid(held) else ""
            log.warning("no new certificate of %s, retrying: %s%s", identity, error, kept)
        held.error = str(error)
        held.requested = False
        held.backoff = min(held.backoff * 2 or FIRST_BACKOFF, LAST_BACKOFF)
        self._later(identity, held, held.backoff)

    def _later(self, identity: SpiffeId, held: _Held, seconds: float) -> None:
        if self._held.get(identity) is held:
            loop = asyncio.get_running_loop()
            self._timers[identity] = loop.call_later(seconds, self._due, identity, held)

    def _due(self, identity: SpiffeId, held: _Held) -> None:
        del self._timers[identity]
        self._request(identity, held, 1 if self._valid(held) else 0)
