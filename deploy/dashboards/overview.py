# SPDX-License-Identifier: Apache-2.0
"""Panels that show whether all traffic that should be captured is captured. Look here first."""

from __future__ import annotations

from matching import AGENTS, AT, lately, per_second
from panels import NONE, RED_FROM_ONE, query, series, stat, table

FATES = {"captured": "green", "exempt": "blue", "undecided": "orange", "leaked": "red"}
STATES = {"enabled": "green", "excluded": "blue", "pending": "orange", "waiting": "yellow", "failed": "red"}

OVERVIEW = [
    stat(
        "Capture rate",
        "Captured connections as a share of captured and leaked ones, in the time shown. Exempt connections "
        "do not count.",
        "percentunit",
        [
            query(
                f'sum(increase(sluice_connections_total{{{AT},fate="captured"}}[$__range])) '
                f'/ sum(increase(sluice_connections_total{{{AT},fate=~"captured|leaked"}}[$__range]))'
            )
        ],
        [("red", None), ("orange", 0.999), ("green", 1)],
        decimals=3,
    ),
    stat(
        "Leaked",
        "Connections of enrolled pods that bypassed ztunnel without an exclusion. If this is not 0, follow the "
        "runbook of SluiceConnectionsLeaked.",
        "short",
        [query(f'sum(increase(sluice_connections_total{{{AT},fate="leaked"}}[$__range])) or vector(0)')],
        RED_FROM_ONE,
    ),
    stat(
        "Pods not captured",
        "Pods that should be captured now but are not.",
        "short",
        [query(f"sum(sluice_pod_uncaptured{{{AT}}}) or vector(0)")],
        RED_FROM_ONE,
    ),
    stat(
        "Agents ready",
        "Agents that are ready, and agents that Prometheus scrapes.",
        "short",
        [query(f"sum(sluice_ready{{{AT}}}) or vector(0)", "ready"), query(f"count({AGENTS})", "known")],
        NONE,
    ),
    stat(
        "Nodes without ztunnel",
        "New connections of captured pods on these nodes are refused.",
        "short",
        [query(f"count(sluice_ztunnel_connections{{{AT}}} == 0) or vector(0)")],
        RED_FROM_ONE,
    ),
    stat(
        "Alerts",
        "Firing alerts of Sluice on all nodes.",
        "short",
        [query('count(ALERTS{alertname=~"Sluice.*",alertstate="firing"}) or vector(0)')],
        RED_FROM_ONE,
    ),
    series(
        "Connections by fate",
        "exempt: excluded on purpose. leaked: bypassed ztunnel. undecided: ended before the peer answered.",
        "cps",
        [query(per_second("sluice_connections_total", AT, "fate"), "{{fate}}")],
        stacked=True,
        colors=FATES,
    ),
    series(
        "Pods by state",
        "enabled: captured. pending: waits for ztunnel. excluded: never captured. waiting, failed: not captured.",
        "short",
        [query(f"sum by (state) (sluice_pods{{{AT}}})", "{{state}}")],
        stacked=True,
        colors=STATES,
    ),
    series(
        "Exempt by reason",
        "Exempt connections by the reason of the exemption.",
        "cps",
        [query(per_second("sluice_connections_total", f'{AT},fate="exempt"', "reason"), "{{reason}}")],
        stacked=True,
    ),
    series(
        "Leaked by workload",
        "Connections that bypassed ztunnel, by workload.",
        "short",
        [
            query(
                lately("sluice_connections_total", f'{AT},fate="leaked"', "namespace, workload, direction, reason"),
                "{{namespace}}/{{workload}} {{direction}} {{reason}}",
            )
        ],
        thresholds=RED_FROM_ONE,
    ),
    table(
        "Firing alerts",
        "docs/runbooks.md has a section for each alert.",
        'ALERTS{alertname=~"Sluice.*",alertstate="firing"}',
        ["alertname", "severity", "instance", "namespace", "pod"],
    ),
    table(
        "Uncaptured pods",
        "Run `sluice explain NAMESPACE/POD` on the node for the reason.",
        f"sluice_pod_uncaptured{{{AT}}}",
        ["instance", "namespace", "pod", "state"],
    ),
]
