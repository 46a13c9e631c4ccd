# SPDX-License-Identifier: Apache-2.0
"""Metrics that are read at each scrape: the agent's condition, its pods, and its connections to node and cluster."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.backends.ebpf.abi import ExitCause
from agent.backends.non_tcp import Counts
from agent.core.errors import KernelError
from agent.core.model.pods import Pod
from agent.core.model.sockets import TcpState
from agent.core.model.status import State, Status
from agent.flows.inet_diag.socket_counts import PodSockets

log = logging.getLogger("sluice.reconciler")
_VERIFIED = (State.ENABLED, State.STALLED, State.PENDING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """The agent's condition. `about`: labels of sluice_agent_info.

    `exempt`: the node's probes are exempt; None if they should not be. `uncaptured`: pods that should be captured but
    are not. `foreign`: pods with foreign rules before Sluice's, and how many. `age`: seconds since the oldest
    successful verification of any captured pod; None without one.
    """

    about: Mapping[str, str] = field(default_factory=dict)
    ready: bool = False
    exempt: bool | None = None
    period: float = 0.0
    uncaptured: Sequence[tuple[Pod, State]] = ()
    foreign: Sequence[tuple[Pod, int]] = ()
    age: float | None = None


def uncaptured(pods: Iterable[tuple[Pod, State]], wanted: Callable[[Pod], bool]) -> list[tuple[Pod, State]]:
    """Returns pods that fail or wait. `wanted` is only asked for pods that the agent has not examined yet."""
    failing = (State.FAILED, State.PENDING)
    return [(pod, state) for pod, state in pods if state in failing or (state is State.WAITING and wanted(pod))]


def age(statuses: Iterable[Status], now: float) -> float | None:
    """Returns the age of the oldest verification; `now` in Unix time. Failing pods have a metric of their own."""
    times = [one.verified for one in statuses if one.state in _VERIFIED and one.verified]
    return max(0.0, now - min(times)) if times else None


class ScrapeCollector(Collector):
    """Collects what `families` yields, at each scrape."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def describe(self) -> Iterator[Metric]:
        """Returns nothing: otherwise the registry would collect at registration, before the agent is complete."""
        return iter(())

    def collect(self) -> Iterable[Metric]:
        return self._families()


def condition_metrics(condition: Condition) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "sluice_agent_info", "How the agent runs, in labels; always 1.", labels=list(condition.about)
    )
    info.add_metric(list(condition.about.values()), 1)
    yield info
    yield GaugeMetricFamily(
        "sluice_ready", "1 if the agent can capture new pods, as /readyz reports.", value=condition.ready
    )
    if condition.exempt is not None:
        what = "1 if the node's probes of captured pods are exempt."
        yield GaugeMetricFamily("sluice_probes_exempt", what, value=condition.exempt)
    what = "Setting verify_seconds: the interval at which each captured pod is verified."
    yield GaugeMetricFamily("sluice_verify_period_seconds", what, value=condition.period)
    if condition.age is not None:
        what = "Seconds since the oldest successful verification of any captured pod."
        yield GaugeMetricFamily("sluice_verification_age_seconds", what, value=condition.age)
    what = "Pods that should be captured but are not; 1 for each."
    pods = GaugeMetricFamily("sluice_pod_uncaptured", what, labels=["namespace", "pod", "state"])
    for pod, state in condition.uncaptured:
        pods.add_metric([pod.namespace, pod.name, state.value], 1)
    yield pods
    what = (
        "Foreign chains and policy rules that precede Sluice's in a captured pod and may divert its traffic; 1 more"
        " while ztunnel's own connections are captured again."
    )
    rules = GaugeMetricFamily("sluice_pod_foreign_rules", what, labels=["namespace", "pod"])
    for pod, count in condition.foreign:
        rules.add_metric([pod.namespace, pod.name], count)
    yield rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """State of the API server's collections and the CNI installation; None is for what this node does not do.

    `follows`: counts of events by the path of a followed collection. `following`: by the same paths, whether the last
    attempt succeeded. `fought`: another program keeps reverting the installation.
    """

    follows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    following: Mapping[str, bool] = field(default_factory=dict)
    synced: bool | None = None
    events_lost: int = 0
    installed: bool | None = None
    rewrites: int = 0
    fought: bool = False


def cluster_metrics(cluster: Cluster) -> Iterator[Metric]:
    if cluster.synced is not None:
        what = "Lists, watches, events, bookmarks and failures of each followed collection of the API server."
        family = CounterMetricFamily("sluice_kube_follow", what, labels=["path", "what"])
        for path, counts in sorted(cluster.follows.items()):
            for word, count in counts.items():
                family.add_metric([path, word], count)
        yield family
        what = "1 if a collection of the API server is followed; 0 from a failed attempt to the next success."
        gauge = GaugeMetricFamily("sluice_kube_following", what, labels=["path"])
        for path, well in sorted(cluster.following.items()):
            gauge.add_metric([path], well)
        yield gauge
        what = "1 if this node's pods and all namespaces are known from the API server."
        yield GaugeMetricFamily("sluice_kube_synced", what, value=cluster.synced)
        what = "Kubernetes Events about pods that could not be written."
        yield CounterMetricFamily("sluice_kube_events_lost", what, value=cluster.events_lost)
    if cluster.installed is not None:
        what = "1 if the CNI plugin and its configuration are in place."
        yield GaugeMetricFamily("sluice_install_ready", what, value=cluster.installed)
        what = "CNI configurations written; keeps growing if another program overwrites them."
        yield CounterMetricFamily("sluice_install_rewrites", what, value=cluster.rewrites)
        what = "1 while another program repeatedly reverts the CNI installation, and for a minute after the last time."
        yield GaugeMetricFamily("sluice_install_fought", what, value=cluster.fought)


def pod_metrics(states: Iterable[State]) -> Iterator[Metric]:
    family = GaugeMetricFamily("sluice_pods", "Pods on this node by state.", labels=["state"])
    counts = Counter(states)
    for state in State:
        family.add_metric([state.value], counts[state])
    yield family


def ztunnel_metrics(connections: int) -> Iterator[Metric]:
    what = "Live connections from ztunnel (ZDS)."
    yield GaugeMetricFamily("sluice_ztunnel_connections", what, value=connections)


def non_tcp_metrics(pods: Iterable[tuple[Pod, Mapping[str, Counts]]]) -> Iterator[Metric]:
    """Yields a series per pod and direction with any traffic that is not TCP."""
    labels = ["namespace", "pod", "direction"]
    what = "that are neither TCP nor captured DNS; the setting non_tcp passes or refuses them"
    packets = CounterMetricFamily("sluice_non_tcp_packets", f"Packets of pods {what}.", labels=labels)
    octets = CounterMetricFamily("sluice_non_tcp_bytes", f"Bytes of pods {what}.", labels=labels)
    for pod, totals in pods:
        for direction, counts in totals.items():
            if counts.packets:
                packets.add_metric([pod.namespace, pod.name, direction], counts.packets)
                octets.add_metric([pod.namespace, pod.name, direction], counts.bytes)
    yield from (packets, octets)


def exit_metrics(exits: Callable[[], Mapping[ExitCause, int]]) -> Iterator[Metric]:
    """Yields every exit of the eBPF programs; nothing if they cannot be read."""
    help = "Decisions of the eBPF programs, by cause."
    family = CounterMetricFamily("sluice_ebpf_exits", help, labels=["cause"])
    try:
        counts = exits()
    except KernelError as error:  # as while they are being removed
        log.warning("cannot read the counters of the eBPF programs: %s", error)
        return
    for cause, count in counts.items():
        family.add_metric([cause.name.lower()], count)
    if counts:
        yield family


def socket_metrics(sockets: Iterable[tuple[Pod, PodSockets]]) -> Iterator[Metric]:
    """Yields sockets of each pod by state, and its use of ephemeral ports."""
    labels = ["namespace", "pod"]
    what = "TCP sockets in pods by state, including ztunnel's."
    states = GaugeMetricFamily("sluice_sockets", what, labels=[*labels, "state"])
    what = "Local ports that a pod may use for outbound connections."
    ports = GaugeMetricFamily("sluice_ephemeral_ports", what, labels=labels)
    what = "Of these, the ports in use towards the peer with most connections."
    used = GaugeMetricFamily("sluice_ephemeral_ports_used", what, labels=labels)
    for pod, counts in sockets:
        for state in TcpState:
            if state in counts.states or state is TcpState.CLOSE_WAIT:
                count = counts.states.get(state, 0)
                states.add_metric([pod.namespace, pod.name, state.name.lower()], count)
        ports.add_metric([pod.namespace, pod.name], counts.ephemeral.size)
        used.add_metric([pod.namespace, pod.name], counts.ephemeral.towards)
    yield from (states, ports, used)
