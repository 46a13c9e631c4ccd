# SPDX-License-Identifier: Apache-2.0
"""Counts every proxied connection of a process from its opening to its end, and writes the access log.

Bytes are read off the open connections when the counts are asked for: the relays count anyway, and a connection that
is busy has nothing more to do.
"""

from __future__ import annotations

import time
from typing import Final, Protocol

from agent.ztunnel.telemetry import access_log
from agent.ztunnel.telemetry.dns_metrics import DnsMetrics
from agent.ztunnel.telemetry.records import Began, RecordSink
from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag
from agent.ztunnel.telemetry.traffic_labels import Parties
from agent.ztunnel.telemetry.traffic_metrics import Series, TrafficMetrics

_FAILED: Final = frozenset(("refused", "timeout", "error"))  # ends that are no end of the applications'
_DRAINED: Final = "closed because the pod or ztunnel ends"


class Moving(Protocol):
    """A connection that moves bytes."""

    def moved(self) -> tuple[int, int]:
        """Returns the bytes (from the source of the connection, to it) so far."""


class CountedConnection:
    """An open connection and how much of it has been counted."""

    __slots__ = ("_connection", "_counter", "_received", "_sent", "began", "labels", "parties")

    def __init__(self, metrics: TrafficMetrics, parties: Parties, began: Began, connection: Moving) -> None:
        self.parties = parties
        self.began = began
        self.labels = parties.labels()
        self._connection = connection
        self._counter = metrics.opened(self.labels)
        self._received = 0
        self._sent = 0

    def settle(self) -> tuple[int, int]:
        """Counts the bytes since the last call; returns all of them as `Moving` does."""
        received, sent = self._connection.moved()
        self._counter.received += received - self._received
        self._counter.sent += sent - self._sent
        self._received = received
        self._sent = sent
        return received, sent


class _Motionless:
    """A connection that was refused."""

    def moved(self) -> tuple[int, int]:
        return 0, 0


class TrafficAccount:
    """The counts of one process. One thread."""

    def __init__(self, log: RecordSink, *, as_json: bool) -> None:
        """Takes the writer of the access log."""
        self.metrics = TrafficMetrics()
        self.dns = DnsMetrics()
        self._log = log
        self._as_json = as_json
        self._open: set[CountedConnection] = set()

    def open(self, parties: Parties, began: Began, connection: Moving) -> CountedConnection:
        """Counts a connection as opened; `close` counts its end."""
        counted = CountedConnection(self.metrics, parties, began, connection)
        self._open.add(counted)
        self._count_socket(parties, 1)
        return counted

    def close(self, counted: CountedConnection, close: str, error: str, flag: ResponseFlag | None) -> None:
        """Counts the end. `close` is that of a record; without a flag it decides whether the connection failed."""
        self._open.remove(counted)
        self._count_socket(counted.parties, -1)
        received, sent = counted.settle()
        if flag is None:
            flag = ResponseFlag.CONNECT if close in _FAILED else ResponseFlag.NONE
        self.metrics.closed(counted.labels, flag)
        if close == "drained":
            error = _DRAINED
        elif flag is ResponseFlag.NONE:
            error = ""  # an application's own end or reset
        self._log.add(
            access_log.complete(
                counted.parties,
                received=received,
                sent=sent,
                seconds=time.monotonic() - counted.began[1],
                ended=time.time(),
                error=error,
                as_json=self._as_json,
            )
        )

    def _count_socket(self, parties: Parties, change: int) -> None:
        """Counts the client's socket, unless it is that of a session with many streams, which counts itself."""
        if not (parties.mutual_tls and parties.reporter is Reporter.DESTINATION):
            self.metrics.sockets(parties.reporter, change)

    def refuse(self, parties: Parties, began: Began, error: str, flag: ResponseFlag) -> None:
        """Counts a connection that is refused at once."""
        self.close(self.open(parties, began, _Motionless()), "refused", error, flag)

    def fail(self, reporter: Reporter, source: str, destination: str, error: str) -> None:
        """Logs a connection that ended before its ends were known; it has no labels, so it is not counted."""
        self._log.add(access_log.failed(reporter, source, destination, error, ended=time.time(), as_json=self._as_json))

    def snapshot(self) -> Series:
        """Returns all counts as they are now."""
        for counted in self._open:
            counted.settle()
        return {**self.metrics.snapshot(), **self.dns.snapshot()}
