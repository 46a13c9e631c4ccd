# SPDX-License-Identifier: Apache-2.0
"""Panels of connection quality: round-trip times, durations, retransmissions."""

from __future__ import annotations

from matching import WORKLOAD, per_second
from panels import heatmap, quantiles, query, series

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
