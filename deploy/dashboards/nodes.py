"""What the agents do, and what they depend on."""

from __future__ import annotations

from matching import AT, OURS, lately, per_second
from panels import RED_FROM_ONE, quantiles, query, series, table

NODE = [
    table(
        "Agents",
        "What each runs with.",
        f"sluice_agent_info{{{AT}}}",
        ["instance", "node", "version", "setting", "backend", "host_probes", "accounting"],
        width=24,
        height=6,
    ),
    series(
        "A pass over one pod",
        "Time to read, compare and apply, waiting for ztunnel included.",
        "s",
        quantiles("sluice_reconcile_seconds", AT),
    ),
    series(
        "Passes",
        "Passes, those that failed, and plans that were applied by mechanism.",
        "ops",
        [
            query(f"sum(rate(sluice_reconcile_seconds_count{{{AT}}}[$__rate_interval]))", "passes"),
            query(f"sum(rate(sluice_reconcile_failures_total{{{AT}}}[$__rate_interval]))", "failed"),
            query(per_second("sluice_plans_applied_total", AT, "backend"), "applied: {{backend}}"),
        ],
    ),
    series(
        "Drift",
        "Rules that somebody changed, and that were put back; and fights over them.",
        "short",
        [
            query(lately("sluice_drift_total", AT, "instance, backend, kind"), "{{instance}} {{backend}} {{kind}}"),
            query(lately("sluice_contended_total", AT, "instance"), "{{instance}} fights"),
        ],
        thresholds=RED_FROM_ONE,
    ),
    series(
        "Not compared with the kernel since",
        "Of the captured pod where that is longest ago; about one period is right.",
        "s",
        [
            query(f"max by (instance) (sluice_verification_age_seconds{{{AT}}})", "{{instance}}"),
            query(f"max(sluice_verify_period_seconds{{{AT}}})", "period"),
        ],
    ),
    series(
        "CNI requests",
        "By verb and CNI's code; 0 is success, 11 is try again later.",
        "ops",
        [query(per_second("sluice_cni_requests_total", AT, "verb, code"), "{{verb}} {{code}}")],
    ),
    series(
        "CNI answers",
        "Time to answer the plugin: a pod's start waits for ADD.",
        "s",
        quantiles("sluice_cni_seconds", AT, ("verb",)),
    ),
    series(
        "ztunnel",
        "Live connections of ztunnels; 2 while one replaces another.",
        "short",
        [query(f"sum by (instance) (sluice_ztunnel_connections{{{AT}}})", "{{instance}}")],
    ),
    series(
        "Installation",
        "1: in place. Fought over: somebody keeps undoing it. Written: how often in the interval.",
        "short",
        [
            query(f"min by (instance) (sluice_install_ready{{{AT}}})", "{{instance}} in place"),
            query(f"max by (instance) (sluice_install_fought{{{AT}}})", "{{instance}} fought over"),
            query(lately("sluice_install_rewrites_total", AT, "instance"), "{{instance}} written"),
        ],
    ),
    series(
        "API server",
        "1: followed. Synced: pods and namespaces have been known once.",
        "short",
        [
            query(f"min by (instance, path) (sluice_kube_following{{{AT}}})", "{{instance}} {{path}}"),
            query(f"min by (instance) (sluice_kube_synced{{{AT}}})", "{{instance}} synced"),
        ],
    ),
    series(
        "What the API server tells",
        "Lists, watches, events, bookmarks and failures; and events of ours that were lost.",
        "ops",
        [
            query(per_second("sluice_kube_follow_total", AT, "what"), "{{what}}"),
            query(f"sum(rate(sluice_kube_events_lost_total{{{AT}}}[$__rate_interval]))", "events lost"),
        ],
    ),
    series(
        "Probes of new pods",
        "What the canary found: ok, failed, captured; no listener is counted never.",
        "short",
        [
            query(lately("sluice_probe_canary_total", AT, "verdict"), "{{verdict}}"),
            query(f"min(sluice_probes_exempt{{{AT}}})", "probes are exempt"),
        ],
    ),
    series(
        "Decisions of the eBPF programs",
        "By cause; of nodes with backend ebpf.",
        "ops",
        [query(per_second("sluice_ebpf_exits_total", AT, "cause"), "{{cause}}")],
    ),
    series(
        "What the account lost",
        "Records by cause, and label sets that found no room. 0 is what proves that nothing leaked.",
        "short",
        [
            query(lately("sluice_records_lost_total", AT, "cause"), "lost: {{cause}}"),
            query(lately("sluice_metrics_overflow_total", AT, "kind"), "overflow: {{kind}}"),
        ],
        thresholds=RED_FROM_ONE,
    ),
    series(
        "The agent's memory",
        "Resident.",
        "bytes",
        [query(f"process_resident_memory_bytes{{{AT}}} {OURS}", "{{instance}}")],
    ),
    series(
        "The agent's CPU",
        "Cores.",
        "short",
        [query(f"rate(process_cpu_seconds_total{{{AT}}}[$__rate_interval]) {OURS}", "{{instance}}")],
    ),
    series(
        "The agent's descriptors",
        "Of those that it may have; five for each captured pod are normal.",
        "percentunit",
        [query(f"process_open_fds{{{AT}}} / process_max_fds{{{AT}}} {OURS}", "{{instance}}")],
    ),
]
