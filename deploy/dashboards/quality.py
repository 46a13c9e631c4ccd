# SPDX-License-Identifier: Apache-2.0
"""Panels of connection quality: round-trip times, durations, retransmissions."""

from __future__ import annotations

from matching import AT, WORKLOAD, per_second
from panels import heatmap, quantiles, query, series

_DNS = "sluice_dns_queries_total"
_BY_WORKLOAD = per_second("sluice_tcp_rtt_seconds_bucket", WORKLOAD, "le, namespace, workload")

QUALITY = [
    series(
        "Round-trip time",
        "Smoothed RTT at the end of the connection. For captured connections: between application and ztunnel.",
        "s",
        quantiles("sluice_tcp_rtt_seconds", WORKLOAD),
    ),
    heatmap(
        "Round-trip time",
        "Number of connections by RTT at their end.",
        "s",
        f"sum by (le) (increase(sluice_tcp_rtt_seconds_bucket{{{WORKLOAD}}}[$__rate_interval]))",
    ),
    series(
        "Connection duration",
        "Time from open to close.",
        "s",
        quantiles("sluice_tcp_connection_duration_seconds", WORKLOAD),
    ),
    heatmap(
        "Connection duration",
        "Number of connections by duration.",
        "s",
        f"sum by (le) (increase(sluice_tcp_connection_duration_seconds_bucket{{{WORKLOAD}}}[$__rate_interval]))",
    ),
    series(
        "Retransmitted segments",
        "Retransmitted segments by workload.",
        "pps",
        [
            query(
                per_second("sluice_tcp_retransmitted_segments_total", WORKLOAD, "namespace, workload"),
                "{{namespace}}/{{workload}}",
            )
        ],
    ),
    series(
        "Round-trip time by workload",
        "90th percentile of each workload.",
        "s",
        [
            query(
                f"histogram_quantile(0.9, {_BY_WORKLOAD})",
                "{{namespace}}/{{workload}}",
            )
        ],
    ),
]

DNS = [
    series(
        "Queries by result",
        "DNS queries of captured pods; no_answer: none within 5 seconds.",
        "reqps",
        [query(per_second(_DNS, AT, "rcode"), "{{rcode}}")],
    ),
    series(
        "Queries by type",
        "With ndots: 5 a name is asked for with every search domain, as A and as AAAA.",
        "reqps",
        [query(per_second(_DNS, AT, "type, captured"), "{{type}}, captured: {{captured}}")],
    ),
    series(
        "Latency",
        "Time from a query to its answer, as seen in the pod.",
        "s",
        quantiles("sluice_dns_latency_seconds", AT),
    ),
    series(
        "Lost",
        "Packets and queries that the account had no time for.",
        "cps",
        [query(per_second("sluice_dns_lost_total", AT, "instance"), "{{instance}}")],
    ),
]
