"""One workload's or pod's connections, bytes and sockets."""

from __future__ import annotations

from matching import POD, SERVER, SOURCE, WORKLOAD, per_second
from panels import query, series

PODS = [
    series(
        "Connections of the workload by fate",
        "As the pods' own sockets saw them.",
        "cps",
        [query(per_second("sluice_connections_total", WORKLOAD, "direction, fate"), "{{direction}} {{fate}}")],
        stacked=True,
    ),
    series(
        "As a client: opened, closed, failed",
        "Connections that pods of the workload open.",
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
        "Connections that reach pods of the workload.",
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
        "Payload. Received is what requests carry, sent what answers carry, as Istio counts it.",
        "Bps",
        [
            query(
                per_second("istio_tcp_received_bytes_total", SOURCE, "destination_workload"),
                "to {{destination_workload}}: requests",
            ),
            query(
                per_second("istio_tcp_sent_bytes_total", SOURCE, "destination_workload"),
                "from {{destination_workload}}: answers",
            ),
        ],
    ),
    series(
        "Failed, by peer",
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
        "ztunnel's in the pod included. CLOSE_WAIT that grows: the application does not close.",
        "short",
        [query(f"sum by (state) (sluice_sockets{{{POD}}})", "{{state}}")],
        stacked=True,
    ),
    series(
        "Client ports in use",
        "Of the ephemeral ports, those in use towards the one peer that has most.",
        "percentunit",
        [query(f"sluice_ephemeral_ports_used{{{POD}}} / sluice_ephemeral_ports{{{POD}}}", "{{namespace}}/{{pod}}")],
        thresholds=[("green", None), ("red", 0.8)],
    ),
    series(
        "Beside ztunnel: packets",
        "What is neither TCP nor captured DNS.",
        "pps",
        [
            query(
                per_second("sluice_non_tcp_packets_total", POD, "namespace, pod, direction"),
                "{{namespace}}/{{pod}} {{direction}}",
            )
        ],
    ),
    series(
        "Beside ztunnel: bytes",
        "What is neither TCP nor captured DNS.",
        "Bps",
        [
            query(
                per_second("sluice_non_tcp_bytes_total", POD, "namespace, pod, direction"),
                "{{namespace}}/{{pod}} {{direction}}",
            )
        ],
    ),
]
