# SPDX-License-Identifier: Apache-2.0
"""Families of metrics as text, in Prometheus' format 0.0.4 or OpenMetrics 1.0, from label sets written beforehand.

github.com/prometheus/docs, instrumenting/exposition_formats.md; github.com/prometheus/OpenMetrics. In the second a
counter's family has no _total in its name, a sample may carry an exemplar, and "# EOF" ends the page, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain

from agent.flows.label_totals import Fated, Measured, Snapshot, TrafficTotals
from agent.flows.labels import FAILED, OPENED, pairs
from agent.flows.record import DURATION_BOUNDS, RTT_BOUNDS

_EOF = b"# EOF\n"


def joined(own: bytes, parts: Iterable[bytes], *, openmetrics: bool) -> bytes:
    """Joins a complete page with further families; "# EOF" comes once, at the end."""
    return b"".join((own.removesuffix(_EOF), *parts, _EOF if openmetrics else b""))


def connections(snapshot: Snapshot, losses: Iterable[tuple[str, int]], *, openmetrics: bool) -> Iterator[bytes]:
    """Yields all families of connections, one part each, so that the loop can run between two parts."""
    for name, help, samples in _counters(snapshot, losses, openmetrics):
        yield _text(_head(name if openmetrics else f"{name}_total", help, "counter"), samples)
    for name, help, of in _HISTOGRAMS:
        rows = (_histogram(name, row.labels, *of(row)) for row in snapshot.measured)
        yield _text(_head(name, help, "histogram"), chain.from_iterable(rows))


def _text(head: Iterable[str], samples: Iterable[str]) -> bytes:
    return "".join((*head, *samples)).encode()


_Buckets = tuple[Sequence[float], Sequence[int], float]
_HISTOGRAMS: tuple[tuple[str, str, Callable[[Measured], _Buckets]], ...] = (
    (
        "sluice_tcp_rtt_seconds",
        "Smoothed round-trip time of connections, as measured by the kernel at their end.",
        lambda row: (RTT_BOUNDS, row.rtt, row.rtt_sum),
    ),
    (
        "sluice_tcp_connection_duration_seconds",
        "Time from the opening of connections to their end.",
        lambda row: (DURATION_BOUNDS, row.duration, row.duration_sum),
    ),
)


def _counters(
    snapshot: Snapshot, losses: Iterable[tuple[str, int]], openmetrics: bool
) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Yields name without _total, help and lines of each family."""
    for name, help, value in _TRAFFIC:
        head = f"{name}_total{{"
        yield name, help, [f"{head}{row.labels}{OPENED}}} {value(row)}\n" for row in snapshot.traffic if _was_open(row)]
    name = "istio_tcp_connections_failed"
    failed = [f"{name}_total{{{row.labels}{FAILED}}} {row.failed}\n" for row in snapshot.traffic if row.failed]
    yield name, "Connections that could not be established.", failed
    fates = [
        f"sluice_connections_total{{{row.labels}}} {row.connections}{_exemplar(row, openmetrics)}\n"
        for row in snapshot.fates
    ]
    yield "sluice_connections", "TCP connections of captured pods by fate and reason, including failed ones.", fates
    name = "sluice_tcp_retransmitted_segments"
    segments = [f"{name}_total{{{row.labels}}} {row.retransmitted}\n" for row in snapshot.measured]
    yield name, "Retransmitted segments.", segments
    yield _simple("sluice_records_lost", "Records that accounting lost under load, by cause.", "cause", losses)
    help = "Samples that met a limit of label sets and were counted under the label overflow."
    yield _simple("sluice_metrics_overflow", help, "kind", snapshot.overflow.items())


_TRAFFIC: tuple[tuple[str, str, Callable[[TrafficTotals], int]], ...] = (
    ("istio_tcp_connections_opened", "Connections that were established.", lambda row: row.opened),
    ("istio_tcp_connections_closed", "Connections that ended after they had been established.", lambda row: row.closed),
    ("istio_tcp_sent_bytes", "Bytes of payload in the direction of responses.", lambda row: row.sent),
    ("istio_tcp_received_bytes", "Bytes of payload in the direction of requests.", lambda row: row.received),
)


def _was_open(row: TrafficTotals) -> bool:
    """Returns whether the row has any of the four series: rows of failed connections would stay at zero."""
    return bool(row.opened or row.closed or row.sent or row.received)


def _simple(name: str, help: str, label: str, values: Iterable[tuple[str, int]]) -> tuple[str, str, list[str]]:
    return name, help, [f"{name}_total{{{pairs(((label, which),))}}} {count}\n" for which, count in values]


def _exemplar(row: Fated, openmetrics: bool) -> str:
    """Formats the socket counted last, to find it among the records; seconds since the epoch."""
    if not openmetrics or not row.socket:
        return ""
    return f' # {{socket="{row.socket}"}} 1 {row.at:.3f}'


def _head(name: str, help: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {help}\n", f"# TYPE {name} {kind}\n"


def _histogram(name: str, labels: str, bounds: Sequence[float], counts: Sequence[int], sum: float) -> Iterator[str]:
    *below, total = accumulate(counts)
    for bound, count in zip(bounds, below, strict=True):
        yield f'{name}_bucket{{{labels},le="{float(bound)}"}} {count}\n'
    yield f'{name}_bucket{{{labels},le="+Inf"}} {total}\n'
    yield f"{name}_sum{{{labels}}} {float(sum)}\n"
    yield f"{name}_count{{{labels}}} {total}\n"
