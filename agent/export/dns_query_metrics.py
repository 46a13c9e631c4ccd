# SPDX-License-Identifier: Apache-2.0
"""Metrics of the pods' DNS queries. No label names a pod, a name or a resolver: those are in `sluice dns`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from agent.flows.dns.summary import BOUNDS, DnsTotals


def dns_metrics(totals: DnsTotals, lost: int) -> Iterator[Metric]:
    what = "DNS queries of captured pods by type and result; no_answer after 5 seconds, captured is yes or no."
    queries = CounterMetricFamily("sluice_dns_queries", what, labels=["type", "rcode", "captured"])
    for (kind, code, captured), count in sorted(totals.counts.items()):
        queries.add_metric([kind, code.replace(" ", "_"), _word(captured)], count)
    what = "Time from a query to its answer, as seen in the pod."
    latency = HistogramMetricFamily("sluice_dns_latency_seconds", what, labels=["captured"])
    bounds = [*map(str, BOUNDS), "+Inf"]
    for captured, counts in totals.buckets.items():
        buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
        latency.add_metric([_word(captured)], buckets, totals.sums[captured])
    what = "Packets that the account of DNS queries had no time for, and queries that it therefore dropped."
    yield from (queries, latency, CounterMetricFamily("sluice_dns_lost", what, value=lost))


def _word(captured: bool) -> str:
    return "yes" if captured else "no"
