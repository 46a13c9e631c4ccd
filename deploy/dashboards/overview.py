"""Whether everything is captured that should be: what one looks at first."""

from __future__ import annotations

from matching import AGENTS, AT, lately, per_second
from panels import NONE, RED_FROM_ONE, query, series, stat, table

FATES = {"captured": "green", "exempt": "blue", "undecided": "orange", "leaked": "red"}
STATES = {"enabled": "green", "excluded": "blue", "pending": "orange", "waiting": "yellow", "failed": "red"}

OVERVIEW = [
    stat(
        "Captured of what should be",
        "Connections that ztunnel had, of those that it had and those that passed it by, in the "
        "time shown. What is exempt on purpose does not count.",
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
        "Connections of enrolled pods that went around ztunnel, and nothing allows it. Anything but 0 is for "
        "the runbook of SluiceConnectionsLeaked.",
        "short",
        [query(f'sum(increase(sluice_connections_total{{{AT},fate="leaked"}}[$__range])) or vector(0)')],
        RED_FROM_ONE,
    ),
    stat(
        "Pods not captured",
        "Pods that are to be captured now, and are not.",
        "short",
        [query(f"sum(sluice_pod_uncaptured{{{AT}}}) or vector(0)")],
        RED_FROM_ONE,
    ),
    stat(
        "Agents ready",
        "Agents that take pods, of those that Prometheus knows.",
        "short",
        [query(f"sum(sluice_ready{{{AT}}}) or vector(0)", "ready"), query(f"count({AGENTS})", "known")],
        NONE,
    ),
    stat(
        "Nodes without ztunnel",
        "Their captured pods are refused every connection.",
        "short",
        [query(f"count(sluice_ztunnel_connections{{{AT}}} == 0) or vector(0)")],
        RED_FROM_ONE,
    ),
    stat(
        "Alerts",
        "Alerts of Sluice that fire, on all nodes.",
        "short",
        [query('count(ALERTS{alertname=~"Sluice.*",alertstate="firing"}) or vector(0)')],
        RED_FROM_ONE,
    ),
    series(
        "Connections by fate",
        "Captured by ztunnel; exempt on purpose; leaked; undecided: failed, or ended, before anybody answered.",
        "cps",
        [query(per_second("sluice_connections_total", AT, "fate"), "{{fate}}")],
        stacked=True,
        colors=FATES,
    ),
    series(
        "Pods by state",
        "enabled: captured. pending: has its rules, and waits for ztunnel. excluded: not to be captured.",
        "short",
        [query(f"sum by (state) (sluice_pods{{{AT}}})", "{{state}}")],
        stacked=True,
        colors=STATES,
    ),
    series(
        "Exempt by reason",
        "Why connections were let pass on purpose.",
        "cps",
        [query(per_second("sluice_connections_total", f'{AT},fate="exempt"', "reason"), "{{reason}}")],
        stacked=True,
    ),
    series(
        "Leaked by workload",
        "Whose connections went around ztunnel.",
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
        "Alerts that fire",
        "Each has its section in docs/runbooks.md.",
        'ALERTS{alertname=~"Sluice.*",alertstate="firing"}',
        ["alertname", "severity", "instance", "namespace", "pod"],
    ),
    table(
        "Pods that are not captured",
        "To be explained by `sluice explain` on the node.",
        f"sluice_pod_uncaptured{{{AT}}}",
        ["instance", "namespace", "pod", "state"],
    ),
]
