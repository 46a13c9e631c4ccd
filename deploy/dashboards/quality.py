"""How good connections are: round-trip times, durations, retransmissions."""

from __future__ import annotations

from matching import WORKLOAD, per_second
from panels import heatmap, quantiles, query, series

_BY_WORKLOAD = per_second("sluice_tcp_rtt_seconds_bucket", WORKLOAD, "le, namespace, workload")

QUALITY = [
    series(
        "Round-trip time",
        "Smoothed, as the kernel had it when connections ended. Of captured ones: between the application and ztunnel.",
        "s",
        quantiles("sluice_tcp_rtt_seconds", WORKLOAD),
    ),
    heatmap(
        "Round-trip time",
        "How many connections ended with which.",
        "s",
        f"sum by (le) (increase(sluice_tcp_rtt_seconds_bucket{{{WORKLOAD}}}[$__rate_interval]))",
    ),
    series(
        "Duration of connections",
        "From opening to end.",
        "s",
        quantiles("sluice_tcp_connection_duration_seconds", WORKLOAD),
    ),
    heatmap(
        "Duration of connections",
        "How many lasted how long.",
        "s",
        f"sum by (le) (increase(sluice_tcp_connection_duration_seconds_bucket{{{WORKLOAD}}}[$__rate_interval]))",
    ),
    series(
        "Retransmitted segments",
        "Segments that were sent again, by workload.",
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
        "The slowest tenth of each workload.",
        "s",
        [
            query(
                f"histogram_quantile(0.9, {_BY_WORKLOAD})",
                "{{namespace}}/{{workload}}",
            )
        ],
    ),
]
