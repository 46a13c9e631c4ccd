# SPDX-License-Identifier: Apache-2.0
"""The agent's own metrics, and the log line of each applied plan: the reconciler's journal."""

from __future__ import annotations

import logging
import time
from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from agent.backends.ebpf.abi import ExitCause
from agent.backends.non_tcp import Counts
from agent.core.errors import KernelError
from agent.core.model.pods import Pod, without_sandbox
from agent.core.model.sockets import TcpState
from agent.core.model.status import State
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.export.collectors import Cluster, ClusterCollector, Condition, ConditionCollector
from agent.export.metrics_page import ConnectionMetrics, Page
from agent.flows.inet_diag.sockets import PodSockets

log = logging.getLogger("sluice.reconciler")


_QUIET = 60.0  # seconds until the same failure of the same pod is logged again
_FAILING = 1024  # pods of which that is known
_SHOWN = 3  # differences in one log line; `sluice explain` has all of them


class _Pods(Collector):
    """Collects sluice_pods{state} at each scrape."""

    def __init__(self, states: Callable[[], Iterable[State]]) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("sluice_pods", "Pods on this node by state.", labels=["state"])
        found = Count(self._states())
        for state in State:
            family.add_metric([state.value], found[state])
        yield family


class _NonTcp(Collector):
    """Collects non-TCP traffic of pods; a series per pod and direction with any."""

    def __init__(self, totals: Callable[[], Iterable[tuple[Pod, Mapping[str, Counts]]]]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        labels = ["namespace", "pod", "direction"]
        what = "that are neither TCP nor captured DNS; the setting non_tcp passes or refuses them"
        packets = CounterMetricFamily("sluice_non_tcp_packets", f"Packets of pods {what}.", labels=labels)
        octets = CounterMetricFamily("sluice_non_tcp_bytes", f"Bytes of pods {what}.", labels=labels)
        for pod, totals in self._totals():
            for direction, counts in totals.items():
                if counts.packets:
                    packets.add_metric([pod.namespace, pod.name, direction], counts.packets)
                    octets.add_metric([pod.namespace, pod.name, direction], counts.bytes)
        yield from (packets, octets)


class _Exits(Collector):
    """Collects every exit of the eBPF programs at each scrape."""

    def __init__(self, exits: Callable[[], Mapping[ExitCause, int]]) -> None:
        self._exits = exits

    def collect(self) -> Iterator[Metric]:
        help = "Decisions of the eBPF programs, by cause."
        family = CounterMetricFamily("sluice_ebpf_exits", help, labels=["cause"])
        try:
            found = self._exits()
        except KernelError as error:  # as while they are being removed
            log.warning("cannot read the counters of the eBPF programs: %s", error)
            return
        for cause, count in found.items():
            family.add_metric([cause.name.lower()], count)
        if found:
            yield family


class _Sockets(Collector):
    """Collects sockets of each pod by state, and its use of ephemeral ports."""

    def __init__(self, sockets: Callable[[], Iterable[tuple[Pod, PodSockets]]]) -> None:
        self._sockets = sockets

    def collect(self) -> Iterator[Metric]:
        labels = ["namespace", "pod"]
        states = GaugeMetricFamily(
            "sluice_sockets", "TCP sockets in pods by state, including ztunnel's.", labels=[*labels, "state"]
        )
        ports = GaugeMetricFamily(
            "sluice_ephemeral_ports", "Local ports that a pod may use for outbound connections.", labels=labels
        )
        used = GaugeMetricFamily(
            "sluice_ephemeral_ports_used",
            "Of these, the ports in use towards the peer with most connections.",
            labels=labels,
        )
        for pod, found in self._sockets():
            for state in TcpState:
                if state in found.states or state is TcpState.CLOSE_WAIT:
                    count = found.states.get(state, 0)
                    states.add_metric([pod.namespace, pod.name, state.name.lower()], count)
            ports.add_metric([pod.namespace, pod.name], found.ephemeral.size)
            used.add_metric([pod.namespace, pod.name], found.ephemeral.towards)
        yield from (states, ports, used)


class Metrics:
    """All metrics, under one registry."""

    def __init__(
        self,
        states: Callable[[], Iterable[State]],
        ztunnels: Callable[[], int],
        non_tcp: Callable[[], Iterable[tuple[Pod, Mapping[str, Counts]]]] = tuple,
        exits: Callable[[], Mapping[ExitCause, int]] = dict,
        connections: ConnectionMetrics | None = None,
        sockets: Callable[[], Iterable[tuple[Pod, PodSockets]]] = tuple,
        cluster: Callable[[], Cluster] = Cluster,
        condition: Callable[[], Condition | None] = lambda: None,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, of little value
        self.registry = r = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=r)
        GCCollector(registry=r)
        r.register(_Pods(states))
        r.register(_NonTcp(non_tcp))
        r.register(_Exits(exits))
        r.register(_Sockets(sockets))
        r.register(ClusterCollector(cluster))
        r.register(ConditionCollector(condition))
        self.drift = Counter(
            "sluice_drift_total", "Drifted rule sets that were repaired.", ["backend", "kind"], registry=r
        )
        buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
        self.reconcile = Histogram(
            "sluice_reconcile_seconds", "Duration of one pass over one pod.", buckets=buckets, registry=r
        )
        self.applied_total = Counter("sluice_plans_applied_total", "Plans applied.", ["backend"], registry=r)
        self.contended_total = Counter(
            "sluice_contended_total", "Rule conflicts: another process repeatedly reverted Sluice's rules.", registry=r
        )
        self.probes = Counter(
            "sluice_probe_canary_total",
            "Probes of the node to newly enrolled pods, by verdict.",
            ["verdict"],
            registry=r,
        )
        self._said: dict[str, tuple[str, float]] = {}  # of each pod the failure that was logged last, and when
        self.failures = Counter(
            "sluice_reconcile_failures_total", "Passes over a pod or the node that failed.", registry=r
        )
        self.cni_requests = Counter(
            "sluice_cni_requests_total", "Requests from the CNI plugin.", ["verb", "code"], registry=r
        )
        self.cni_seconds = Histogram(
            "sluice_cni_seconds", "Time to answer the CNI plugin.", ["verb"], buckets=buckets, registry=r
        )
        sessions = Gauge("sluice_ztunnel_connections", "Live connections from ztunnel (ZDS).", registry=r)
        sessions.set_function(ztunnels)
        self.page = Page(r, connections)

    def cni(self, verb: str, code: int, seconds: float) -> None:
        self.cni_requests.labels(verb, str(code)).inc()
        self.cni_seconds.labels(verb).observe(seconds)

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        self.applied_total.labels(layer).inc()
        if cause:
            self.drift.labels(layer, "changed").inc()
        by = f" after a change by {cause}" if cause else ""
        level = logging.INFO if differences else logging.DEBUG  # not worth a line per pod at each start
        log.log(level, "pod %s: %s applied in %.1f ms%s: %s", pod.key, layer, seconds * 1e3, by, _words(differences))

    def failed(self, pod: Pod, error: Exception) -> None:
        if not without_sandbox(pod, error):
            self.failures.inc()
        words = str(error)
        before = self._said.get(pod.uid, ("", 0.0))
        if words == before[0] and time.monotonic() < before[1] + _QUIET:
            return
        if len(self._said) >= _FAILING:
            self._said.clear()
        self._said[pod.uid] = words, time.monotonic()
        script = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        level = logging.INFO if without_sandbox(pod, error) else logging.ERROR
        log.log(level, "pod %s: %s%s", pod.key, error, script and f"; what was tried:{script}")

    def contended(self, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        self.contended_total.inc()
        theirs = f"; foreign rules: {'; '.join(remarks)}" if remarks else ""
        log.warning("pod %s: rule conflict: %s repeatedly reverts repairs; backing off%s", pod.key, cause, theirs)

    def probed(self, pod: Pod, finding: ProbeResult) -> None:
        self.probes.labels(finding.verdict.value).inc()
        log.log(logging.INFO if finding.verdict is ProbeVerdict.OK else logging.WARNING, "pod %s: %s", pod.key, finding)

    def host_applied(self, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        self.applied_total.labels(f"host-{layer}").inc()
        if cause:
            self.drift.labels(f"host-{layer}", "changed").inc()
        by = f" after a change by {cause}" if cause else ""
        log.info("node: %s applied in %.1f ms%s: %s", layer, seconds * 1e3, by, _words(differences))

    def host_failed(self, error: Exception) -> None:
        self.failures.inc()
        log.error("node: probe exemption failed: %s", error)

    def passed(self, pod: Pod, seconds: float) -> None:
        self.reconcile.observe(seconds)


def _words(differences: tuple[str, ...]) -> str:
    shown = differences[:_SHOWN] + ((f"{len(differences) - _SHOWN} more",) if len(differences) > _SHOWN else ())
    return "; ".join(shown) or "took over table ownership or removed empty tables"
