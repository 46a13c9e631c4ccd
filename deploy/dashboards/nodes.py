# SPDX-License-Identifier: Apache-2.0
"""Panels of the agents and their dependencies."""

from __future__ import annotations

from matching import AT, OURS, lately, per_second
from panels import RED_FROM_ONE, quantiles, query, series, table

NODE = [
    table(
        "Agents",
        "Version, settings and backend of each agent.",
        f"sluice_agent_info{{{AT}}}",
        ["instance", "node", "version", "setting", "backend", "host_probes", "accounting"],
        width=24,
        height=6,
    ),
    series(
        "Duration of a pass",
        "Time to read, compare and apply the rules of one pod, including the wait for ztunnel.",
        "s",
        quantiles("sluice_reconcile_seconds", AT),
    ),
    series(
        "Passes",
        "Passes, failed passes, and applied plans by layer.",
        "ops",
        [
            query(f"sum(rate(sluice_reconcile_seconds_count{{{AT}}}[$__rate_interval]))", "passes"),
            query(f"sum(rate(sluice_reconcile_failures_total{{{AT}}}[$__rate_interval]))", "failed"),
            query(per_second("sluice_plans_applied_total", AT, "backend"), "applied: {{backend}}"),
        ],
    ),
    series(
        "Drift",
        "Rules that another process changed and the agent repaired, and rule conflicts.",
        "short",
        [
            query(lately("sluice_drift_total", AT, "instance, backend, kind"), "{{instance}} {{backend}} {{kind}}"),
            query(lately("sluice_contended_total", AT, "instance"), "{{instance}} conflicts"),
        ],
        thresholds=RED_FROM_ONE,
    ),
    series(
        "Age of the oldest verification",
        "Time since the rules of a captured pod were last verified; the oldest per node. About one period is normal.",
        "s",
        [
            query(f"max by (instance) (sluice_verification_age_seconds{{{AT}}})", "{{instance}}"),
            query(f"max(sluice_verify_period_seconds{{{AT}}})", "period"),
        ],
    ),
    series(
        "CNI requests",
        "CNI requests by verb and error code. 0: success. 11: try again later.",
        "ops",
        [query(per_second("sluice_cni_requests_total", AT, "verb, code"), "{{verb}} {{code}}")],
    ),
    series(
        "CNI request duration",
        "Time until the agent answers the plugin. A pod starts only after ADD is answered.",
        "s",
        quantiles("sluice_cni_seconds", AT, ("verb",)),
    ),
    series(
        "ztunnel",
        "Connected ztunnels. 2 during a rolling upgrade.",
        "short",
        [query(f"sum by (instance) (sluice_ztunnel_connections{{{AT}}})", "{{instance}}")],
    ),
    series(
        "Installation",
        "In place: 1 if the plugin is installed. Overwritten: 1 while another program reverts it. Written: writes.",
        "short",
        [
            query(f"min by (instance) (sluice_install_ready{{{AT}}})", "{{instance}} in place"),
            query(f"max by (instance) (sluice_install_fought{{{AT}}})", "{{instance}} overwritten"),
            query(lately("sluice_install_rewrites_total", AT, "instance"), "{{instance}} written"),
        ],
    ),
    series(
        "API server",
        "1: the watch works. Synced: 1 after all pods and namespaces were listed once.",
        "short",
        [
            query(f"min by (instance, path) (sluice_kube_following{{{AT}}})", "{{instance}} {{path}}"),
            query(f"min by (instance) (sluice_kube_synced{{{AT}}})", "{{instance}} synced"),
        ],
    ),
    series(
        "API server requests",
        "Lists, watches, events, bookmarks and failures; and Kubernetes Events that the agent could not write.",
        "ops",
        [
            query(per_second("sluice_kube_follow_total", AT, "what"), "{{what}}"),
            query(f"sum(rate(sluice_kube_events_lost_total{{{AT}}}[$__rate_interval]))", "events lost"),
        ],
    ),
    series(
        "Probes of new pods",
        "Results of the probe canary: ok, failed, captured. A pod without a listening port is not counted.",
        "short",
        [
            query(lately("sluice_probe_canary_total", AT, "verdict"), "{{verdict}}"),
            query(f"min(sluice_probes_exempt{{{AT}}})", "probes are exempt"),
        ],
    ),
    series(
        "Decisions of the eBPF programs",
        "Decisions by cause, on nodes with backend ebpf.",
        "ops",
        [query(per_second("sluice_ebpf_exits_total", AT, "cause"), "{{cause}}")],
    ),
    series(
        "Accounting losses",
        "Lost records by cause, and label sets beyond the limit. A leak count of zero is proof only while this is 0.",
        "short",
        [
            query(lately("sluice_records_lost_total", AT, "cause"), "lost: {{cause}}"),
            query(lately("sluice_metrics_overflow_total", AT, "kind"), "overflow: {{kind}}"),
        ],
        thresholds=RED_FROM_ONE,
    ),
    series(
        "Agent memory",
        "Resident memory of the agent.",
        "bytes",
        [query(f"process_resident_memory_bytes{{{AT}}} {OURS}", "{{instance}}")],
    ),
    series(
        "Agent CPU",
        "CPU cores used by the agent.",
        "short",
        [query(f"rate(process_cpu_seconds_total{{{AT}}}[$__rate_interval]) {OURS}", "{{instance}}")],
    ),
    series(
        "Agent file descriptors",
        "Open file descriptors as a share of the limit. Five per captured pod are normal.",
        "percentunit",
        [query(f"process_open_fds{{{AT}}} / process_max_fds{{{AT}}} {OURS}", "{{instance}}")],
    ),
]
