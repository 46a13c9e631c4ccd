# SPDX-License-Identifier: Apache-2.0
"""Panels of the connections, bytes and sockets of one workload or pod."""

from __future__ import annotations

from matching import POD, SERVER, SOURCE, WORKLOAD, per_second
from panels import query, series

PODS = [
    series(
        "Connections of the workload by fate",
        "As seen by the sockets of the pods.",
        "cps",
        [query(per_second("sluice_connections_total", WORKLOAD, "direction, fate"), "{{direction}} {{fate}}")],
        stacked=True,
    ),
    series(
        "As a client: opened, closed, failed",
        "Connections opened by pods of the workload.",
        "cps",
        [
            query(
                per_second("istio_tcp_connections_opened_total", SOURCE, "source_workload"),
                "{{source_workload}} opened",
            ),
            query(
                per_second("istio_tcp_connections_closed_total", SOURCE, "source_workload"),
                "{{source_workload}} closed",
            ),
            query(
                per_second("istio_tcp_connections_failed_total", SOURCE, "source_workload"),
                "{{source_workload}} failed",
            ),
        ],
    ),
    series(
        "As a server: opened and closed",
        "Connections accepted by pods of the workload.",
        "cps",
        [
            query(
                per_second("istio_tcp_connections_opened_total", SERVER, "destination_workload"),
                "{{destination_workload}} opened",
            ),
            query(
                per_second("istio_tcp_connections_closed_total", SERVER, "destination_workload"),
                "{{destination_workload}} closed",
            ),
        ],
    ),
    series(
        "Bytes as a client",
        "Payload bytes. As in Istio's metrics, received bytes are requests and sent bytes are responses.",
        "Bps",
        [
            query(
                per_second("istio_tcp_received_bytes_total", SOURCE, "destination_workload"),
                "requests to {{destination_workload}}",
            ),
            query(
                per_second("istio_tcp_sent_bytes_total", SOURCE, "destination_workload"),
                "responses from {{destination_workload}}",
            ),
        ],
    ),
    series(
        "Failed connections by peer",
        "Connections that could not be established.",
        "cps",
        [
            query(
                per_second("istio_tcp_connections_failed_total", SOURCE, "source_workload, destination_workload"),
                "{{source_workload}} to {{destination_workload}}",
            )
        ],
    ),
    series(
        "Sockets of the pod by state",
        "Includes sockets of ztunnel. A growing CLOSE_WAIT means that the application does not close its sockets.",
        "short",
        [query(f"sum by (state) (sluice_sockets{{{POD}}})", "{{state}}")],
        stacked=True,
    ),
    series(
        "Client ports in use",
        "Share of the ephemeral ports in use for the peer that has the most.",
        "percentunit",
        [query(f"sluice_ephemeral_ports_used{{{POD}}} / sluice_ephemeral_ports{{{POD}}}", "{{namespace}}/{{pod}}")],
        thresholds=[("green", None), ("red", 0.8)],
    ),
    series(
        "Non-TCP packets",
        "Traffic that does not pass through ztunnel: everything but TCP and captured DNS.",
        "pps",
        [
            query(
                per_second("sluice_non_tcp_packets_total", POD, "namespace, pod, direction"),
                "{{namespace}}/{{pod}} {{direction}}",
            )
        ],
    ),
    series(
        "Non-TCP bytes",
        "Traffic that does not pass through ztunnel: everything but TCP and captured DNS.",
        "Bps",
        [
            query(
                per_second("sluice_non_tcp_bytes_total", POD, "namespace, pod, direction"),
                "{{namespace}}/{{pod}} {{direction}}",
            )
        ],
    ),
]
