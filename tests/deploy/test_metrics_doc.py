# SPDX-License-Identifier: Apache-2.0
"""docs/metrics.md has every metric of the code, with its type, labels and meaning; SLUICE_GOLDEN=write puts them in."""

from __future__ import annotations

import os
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as parse
from support import dashboard

from agent.backends.ebpf.abi import ExitCause
from agent.backends.non_tcp import Counts
from agent.core.model.pods import Pod
from agent.core.model.sockets import TcpState
from agent.core.model.status import State
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.export import collectors, exposition
from agent.export.collectors import Cluster, Condition
from agent.export.dns_query_metrics import dns_metrics
from agent.export.metrics import Metrics
from agent.flows.dns.summary import DnsTotals
from agent.flows.identity import Workload
from agent.flows.inet_diag.socket_counts import Ephemeral, PodSockets
from agent.flows.label_totals import Fated, Measured, Snapshot, TrafficTotals
from agent.flows.labels import fated, owner, traffic
from agent.flows.record import DURATION_BOUNDS, RTT_BOUNDS, Direction, Fate, Reason

POD, WEB, OUT = Pod("u", "shop", "web"), Workload("web", "shop", service_account="robot"), Direction.OUTBOUND
# Heading -> what the names of its metrics begin with; the first that fits has it.
GROUPS = {
    "Connections": ("sluice_connections", "istio_tcp_", "sluice_tcp_", "sluice_records_", "sluice_metrics_"),
    "DNS": ("sluice_dns_",),
    "Pods": ("sluice_pod", "sluice_sockets", "sluice_ephemeral_", "sluice_non_tcp_"),
    "Rules": ("sluice_reconcile_", "sluice_plans_", "sluice_drift", "sluice_contended", "sluice_verif", "sluice_ebpf_"),
    "Probes": ("sluice_probe",),
    "CNI and ztunnel": ("sluice_cni_", "sluice_install_", "sluice_ztunnel_"),
    "Kubernetes": ("sluice_kube_",),
    "The agent": ("sluice_", "process_", "python_"),
}


def everything() -> list[Metric]:
    """A page on which each metric has a sample."""
    about = dict.fromkeys(dashboard.ABOUT, "x")
    metrics, totals = Metrics(), DnsTotals()
    totals.counts["A", "NOERROR", True] = 1
    metrics.collect(
        lambda: collectors.pod_metrics([State.ENABLED]),
        lambda: dns_metrics(totals, 1),
        lambda: collectors.ztunnel_metrics(1),
        lambda: collectors.non_tcp_metrics([(POD, {"outbound": Counts(1, 1)})]),
        lambda: collectors.exit_metrics(lambda: {next(iter(ExitCause)): 1}),
        lambda: collectors.socket_metrics([(POD, PodSockets({TcpState.ESTABLISHED: 1}, Ephemeral(10, 1)))]),
        lambda: collectors.cluster_metrics(
            Cluster(
                follows={"/api/v1/pods": {"lists": 1}}, following={"/api/v1/pods": True}, synced=True, installed=True
            )
        ),
        lambda: collectors.condition_metrics(
            Condition(
                about=about,
                ready=True,
                exempt=True,
                period=30.0,
                uncaptured=[(POD, State.FAILED)],
                foreign=[(POD, 1)],
                age=1.0,
            )
        ),
    )
    metrics.cni("ADD", 0, 0.1)
    metrics.applied(POD, "nftables", ("x",), 0.1, "nft[1]")
    metrics.probed(POD, ProbeResult(ProbeVerdict.OK))
    labels = owner("shop", "web", OUT)
    found = Snapshot(
        [TrafficTotals(labels=traffic(OUT, WEB, WEB, None, "td"), opened=1, closed=1, failed=1, sent=1, received=1)],
        [Fated(fated("shop", "web", OUT, Fate.CAPTURED, Reason.NONE), 1, 0, 0.0)],
        [
            Measured(
                labels=labels,
                rtt=(1,) * (len(RTT_BOUNDS) + 1),
                rtt_sum=1.0,
                duration=(1,) * (len(DURATION_BOUNDS) + 1),
                duration_sum=1.0,
                retransmitted=1,
            )
        ],
        {"traffic": 1},
    )
    parts = exposition.connections(found, [("record", 1)], openmetrics=False)
    return list(parse(exposition.joined(metrics.page.own(False), parts, openmetrics=False).decode()))


def rows(families: Iterable[Metric]) -> dict[str, list[str]]:
    """A row of the table for each, by group."""
    made: dict[str, list[str]] = {group: [] for group in GROUPS}
    for family in families:
        labels = list(dict.fromkeys(name for sample in family.samples for name in sample.labels if name != "le"))
        if family.name.startswith("istio_tcp_"):
            labels = ["ztunnel's"]  # 23 of them
        name = family.name + ("_total" if family.type == "counter" else "")
        group = next(one for one, starts in GROUPS.items() if family.name.startswith(starts))
        shown = ", ".join(f"`{label}`" if "'" not in label else label for label in labels)
        made[group].append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return {group: sorted(lines) for group, lines in made.items()}


def test_the_page_has_every_metric_as_the_code_has_it() -> None:
    text = dashboard.METRICS.read_text()
    wanted = rows(everything())
    assert all(wanted.values())
    for group, lines in wanted.items():
        head = f"## {group}\n\n"
        at = text.index(head) + len(head)
        table = "\n".join(("| metric | type | labels | meaning |", "|---|---|---|---|", *lines, ""))
        end = text.index("\n\n", at) + 1 if "\n\n" in text[at:] else len(text)
        if os.environ.get("SLUICE_GOLDEN") == "write":
            text = text[:at] + table + text[end:]
            dashboard.METRICS.write_text(text)
        else:
            assert text[at:end] == table, group
