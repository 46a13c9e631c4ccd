# SPDX-License-Identifier: Apache-2.0
"""Counts queries of DNS as Istio's ztunnel does.

A query failed if no resolver answered it, or by an error of its own. That a name does not exist is an answer, which
Istio's ztunnel counts as a failure.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Final, NamedTuple

from agent.ztunnel.mesh.mesh_model import Workload
from agent.ztunnel.telemetry.traffic_labels import UNKNOWN
from agent.ztunnel.telemetry.traffic_metrics import DNS_DURATION, DNS_FAILED, DNS_FORWARDED, DNS_REQUESTS, Series

BUCKETS: Final = (0.0005, 0.001, 0.01, 0.1, 1.0, 5.0)  # seconds
_BOUNDS: Final = (*map(str, BUCKETS), "+Inf")
# Others are `unknown`: a pod may ask for 65536 types.
_TYPES: Final = {
    1: "a", 2: "ns", 5: "cname", 6: "soa", 12: "ptr", 13: "hinfo", 15: "mx", 16: "txt", 28: "aaaa", 33: "srv",
    35: "naptr", 43: "ds", 44: "sshfp", 46: "rrsig", 47: "nsec", 48: "dnskey", 50: "nsec3", 52: "tlsa", 64: "svcb",
    65: "https", 250: "tsig", 251: "ixfr", 252: "axfr", 255: "any", 257: "caa",
}  # fmt: skip


class DnsLabels(NamedTuple):
    """The labels of a query, in their order; `kind` is its type."""

    kind: str
    protocol: str
    service: str
    revision: str

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Returns (name, value) in the order in which they are shown."""
        return (
            ("request_query_type", self.kind),
            ("request_protocol", self.protocol),
            ("source_canonical_service", self.service or UNKNOWN),
            ("source_canonical_revision", self.revision or UNKNOWN),
        )


class DnsMetrics:
    """The counts of one process. One thread."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, DnsLabels], int] = {}
        self._seconds: dict[DnsLabels, tuple[list[int], float]] = {}

    def labels(self, question: bytes, protocol: str, client: Workload | None) -> DnsLabels:
        """Returns the labels of a query: `question` ends with its type and class."""
        kind = _TYPES.get(int.from_bytes(question[-4:-2]), UNKNOWN)
        if client is None:
            return DnsLabels(kind, protocol, "", "")
        return DnsLabels(kind, protocol, client.canonical_name, client.canonical_revision)

    def asked(self, labels: DnsLabels, *, forwarded: bool) -> None:
        """Counts a query; `forwarded` if a resolver is asked; `settled` counts its answer."""
        self._add(DNS_REQUESTS, labels)
        if forwarded:
            self._add(DNS_FORWARDED, labels)

    def settled(self, labels: DnsLabels, seconds: float, *, failed: bool) -> None:
        """Counts the end of a forwarded query."""
        if failed:
            self._add(DNS_FAILED, labels)
        counts, total = self._seconds.get(labels) or ([0] * len(_BOUNDS), 0.0)
        counts[bisect_left(BUCKETS, seconds)] += 1
        self._seconds[labels] = (counts, total + seconds)

    def _add(self, family: str, labels: DnsLabels) -> None:
        self._counts[family, labels] = self._counts.get((family, labels), 0) + 1

    def snapshot(self) -> Series:
        """Returns all values as they are now."""
        series: Series = {(family, labels.pairs()): count for (family, labels), count in self._counts.items()}
        for labels, (counts, seconds) in self._seconds.items():
            pairs = labels.pairs()
            upto = tuple(accumulate(counts))
            for bound, count in zip(_BOUNDS, upto, strict=True):
                series[f"{DNS_DURATION}_bucket", (("le", bound), *pairs)] = count
            series[f"{DNS_DURATION}_sum", pairs] = seconds
            series[f"{DNS_DURATION}_count", pairs] = upto[-1]
        return series
