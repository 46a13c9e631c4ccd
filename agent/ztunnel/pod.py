"""What every connection of one pod shares."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from agent.core.model.sockets import Endpoint
from agent.kernel.accepting import Seldom
from agent.kernel.netlink.sock_diag import SockDiag
from agent.ztunnel.dns_origin import Asked
from agent.ztunnel.original_dst import Address
from agent.ztunnel.poller import Deadlines, Poller
from agent.ztunnel.records import Record, RecordWriter
from agent.ztunnel.upstream import Upstream

Ends = tuple[Endpoint, Endpoint]  # local, and the destination


@dataclass(frozen=True, slots=True)
class Engine:
    """What all pods share.

    `connects` and `queries` bound how long an upstream may be silent, `answered` how long a flow of DNS is kept after
    the last answer; `aged` tells when a connection is LOOK_SECONDS old (see keepalive). `share`: how many connections
    and flows of one pod may be under way.
    """

    poller: Poller
    connects: Deadlines
    queries: Deadlines
    answered: Deadlines
    aged: Deadlines
    records: RecordWriter
    asked: Asked
    share: int


class Live(Protocol):
    """A connection or query that is under way."""

    def abort(self) -> None:
        """Ends it now, as drained."""


@dataclass(frozen=True, slots=True)
class PodContext:
    """`name` is namespace/name; `diag` is asked of its sockets; `live` is what is under way; `connecting` are the ends
    of ztunnel's own connections, by which it knows one that comes back to it."""

    uid: str
    name: str
    engine: Engine
    upstream: Upstream
    diag: SockDiag
    live: set[Live] = field(default_factory=set)
    connecting: set[Ends] = field(default_factory=set)
    warnings: Seldom = field(default_factory=Seldom)

    def record(
        self,
        kind: str,
        direction: str,
        began: tuple[float, float],
        source: Address,
        destination: Address | None,
        sent: int,
        received: int,
        close: str,
        error: str,
        via: Address | None = None,
    ) -> None:
        """`began` is what `now` gave at the start."""
        self.engine.records.add(Record(
            began[0], kind, direction, self.name, self.uid, source, destination, sent, received,
            time.monotonic() - began[1], close, error, via,
        ))  # fmt: skip


def now() -> tuple[float, float]:
    """(wall clock, monotonic clock): the first says when, the second how long."""
    return time.time(), time.monotonic()
