# SPDX-License-Identifier: Apache-2.0
"""Counts connections and bytes as Istio's ztunnel does, merges the counts of several processes and renders them.

They are rendered here because prometheus-client sorts labels, and Istio has an order of its own. A worker sends its
`snapshot`; the supervisor adds those of workers that have ended, so no counter ever falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag
from agent.ztunnel.telemetry.traffic_labels import TrafficLabels

LabelPairs = tuple[tuple[str, str], ...]
Series = dict[tuple[str, LabelPairs], float]  # (family, labels) to value; a histogram's family with its suffix

_OPENED, _CLOSED, _FAILED = (
    "istio_tcp_connections_opened",
    "istio_tcp_connections_closed",
    "istio_tcp_connections_failed",
)
_SENT, _RECEIVED, _OPEN = "istio_tcp_sent_bytes", "istio_tcp_received_bytes", "istio_tcp_sockets_open"
DNS_REQUESTS, DNS_FORWARDED, DNS_FAILED, DNS_DURATION = (
    "istio_dns_requests",
    "istio_dns_upstream_requests",
    "istio_dns_upstream_failures",
    "istio_dns_upstream_request_duration_seconds",
)


@dataclass(frozen=True, slots=True)
class Family:
    """The description of a metric; a counter's name gets `_total`."""

    kind: str
    help: str


FAMILIES: Final[Mapping[str, Family]] = {
    _OPENED: Family("counter", "The total number of TCP connections opened"),
    _CLOSED: Family("counter", "The total number of TCP connections closed"),
    _RECEIVED: Family("counter", "The size of total bytes received from the source during a TCP connection"),
    _SENT: Family("counter", "The size of total bytes sent as a response during a TCP connection"),
    _FAILED: Family("counter", "The total number of TCP connections that failed"),
    _OPEN: Family("gauge", "The number of TCP connections that are open"),
    DNS_REQUESTS: Family("counter", "The total number of DNS queries"),
    DNS_FORWARDED: Family("counter", "The total number of DNS queries that a resolver was asked"),
    DNS_FAILED: Family("counter", "The total number of DNS queries that no resolver could answer"),
    DNS_DURATION: Family("histogram", "The time from a DNS query to the answer of its resolver"),
}


@dataclass(slots=True)
class ByteCounter:
    """The bytes of one label set in both directions, shared by its connections.

    `received` comes from the source of the connection, `sent` goes to it.
    """

    received: int = 0
    sent: int = 0


@dataclass(slots=True)
class TrafficMetrics:
    """The counts of one process. One thread."""

    _counts: dict[tuple[str, TrafficLabels], int] = field(default_factory=dict)
    _bytes: dict[TrafficLabels, ByteCounter] = field(default_factory=dict)
    _open: dict[Reporter, int] = field(default_factory=dict)

    def opened(self, labels: TrafficLabels) -> ByteCounter:
        """Counts a connection and returns where its bytes are counted."""
        self._add(_OPENED, labels)
        return self._bytes.setdefault(labels, ByteCounter())

    def closed(self, labels: TrafficLabels, flag: ResponseFlag) -> None:
        """Counts the end of a connection that `opened` has counted; a flag says that it failed."""
        flagged = labels if flag is ResponseFlag.NONE else labels.with_flag(flag)
        self._add(_CLOSED, flagged)
        if flag is not ResponseFlag.NONE:
            self._add(_FAILED, flagged)

    def sockets(self, reporter: Reporter, change: int) -> None:
        """Counts an accepted socket, or its end with -1."""
        self._open[reporter] = self._open.get(reporter, 0) + change

    def _add(self, family: str, labels: TrafficLabels) -> None:
        self._counts[family, labels] = self._counts.get((family, labels), 0) + 1

    def snapshot(self) -> Series:
        """Returns all values as they are now."""
        series: Series = {(family, labels.pairs()): count for (family, labels), count in self._counts.items()}
        for labels, counted in self._bytes.items():
            series[_RECEIVED, labels.pairs()] = counted.received
            series[_SENT, labels.pairs()] = counted.sent
        for reporter, count in self._open.items():
            series[_OPEN, (("reporter", reporter.value),)] = count
        return series


_COUNTER: Final = Family("counter", "")


def merged(parts: Iterable[Series]) -> Series:
    """Returns the sums of several processes."""
    total: Series = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def counters(series: Series) -> Series:
    """Returns what stays of a process that has ended: its gauges are gone with it. Other parts have no gauges."""
    return {key: value for key, value in series.items() if FAMILIES.get(_family(key[0]), _COUNTER).kind != "gauge"}


def render(series: Series, families: Mapping[str, Family] = FAMILIES) -> str:
    """Returns OpenMetrics text without the end mark; families without a value are left out."""
    by_family: dict[str, list[str]] = {}
    for (name, labels), value in series.items():
        found = _family(name)
        suffix = "_total" if families[found].kind == "counter" else ""
        by_family.setdefault(found, []).append(f"{name}{suffix}{_braces(labels)} {value}")
    lines = []
    for name, family in families.items():
        if name in by_family:
            samples = by_family[name]
            if family.kind != "histogram":  # its buckets have an order of their own
                samples.sort()
            lines += [f"# HELP {name} {family.help}.", f"# TYPE {name} {family.kind}", *samples]
    return "".join(f"{line}\n" for line in lines)


def _family(name: str) -> str:
    """Returns the family of a sample; only a histogram has several samples of one label set."""
    return DNS_DURATION if name.startswith(DNS_DURATION) else name


def _braces(labels: Sequence[tuple[str, str]]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
