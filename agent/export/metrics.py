# SPDX-License-Identifier: Apache-2.0
"""The agent's own metrics, and the log line of each applied plan: the reconciler's journal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from agent.core.model.pods import Pod, without_sandbox
from agent.core.model.status import Status
from agent.core.policy.canary import ProbeResult, ProbeVerdict
from agent.core.text import first
from agent.export.collectors import ScrapeCollector
from agent.export.metrics_page import ConnectionMetrics, Page

log = logging.getLogger("sluice.reconciler")


_QUIET = 60.0  # seconds until the same failure of the same pod is logged again
_FAILING = 1024  # pods of which that is known
_SHOWN = 3  # differences in one log line; `sluice explain` has all of them


class Metrics:
    """All metrics, under one registry."""

    def __init__(self, connections: ConnectionMetrics | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, of little value
        self.registry = r = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=r)
        GCCollector(registry=r)
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
        self._logged: dict[str, tuple[str, float]] = {}  # of each pod the failure that was logged last, and when
        self.failures = Counter(
            "sluice_reconcile_failures_total", "Passes over a pod or the node that failed.", registry=r
        )
        self.cni_requests = Counter(
            "sluice_cni_requests_total", "Requests from the CNI plugin.", ["verb", "code"], registry=r
        )
        self.cni_seconds = Histogram(
            "sluice_cni_seconds", "Time to answer the CNI plugin.", ["verb"], buckets=buckets, registry=r
        )
        self.page = Page(r, connections)

    def collect(self, *readers: Callable[[], Iterable[Metric]]) -> None:
        """Adds the families that the readers return, of agent.export.collectors, at each scrape."""
        for families in readers:
            self.registry.register(ScrapeCollector(families))

    def cni(self, verb: str, code: int, seconds: float) -> None:
        self.cni_requests.labels(verb, str(code)).inc()
        self.cni_seconds.labels(verb).observe(seconds)

    def applied(self, pod: Pod, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        level = logging.INFO if differences else logging.DEBUG  # not worth a line per pod at each start
        self._count(layer, cause)
        log.log(level, "pod %s: %s applied %s", pod.key, layer, _description(differences, seconds, cause))

    def failed(self, pod: Pod, error: Exception) -> None:
        if not without_sandbox(pod, error):
            self.failures.inc()
        message = str(error)
        before = self._logged.get(pod.uid, ("", 0.0))
        if message == before[0] and time.monotonic() < before[1] + _QUIET:
            return
        if len(self._logged) >= _FAILING:
            self._logged.clear()
        self._logged[pod.uid] = message, time.monotonic()
        script = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        level = logging.INFO if without_sandbox(pod, error) else logging.ERROR
        log.log(level, "pod %s: %s%s", pod.key, error, script and f"; what was tried:{script}")

    def contended(self, pod: Pod, cause: str, remarks: tuple[str, ...]) -> None:
        self.contended_total.inc()
        foreign = f"; foreign rules: {'; '.join(remarks)}" if remarks else ""
        log.warning("pod %s: rule conflict: %s repeatedly reverts repairs; backing off%s", pod.key, cause, foreign)

    def probed(self, pod: Pod, finding: ProbeResult) -> None:
        self.probes.labels(finding.verdict.value).inc()
        log.log(logging.INFO if finding.verdict is ProbeVerdict.OK else logging.WARNING, "pod %s: %s", pod.key, finding)

    def host_applied(self, layer: str, differences: tuple[str, ...], seconds: float, cause: str) -> None:
        self._count(f"host-{layer}", cause)
        log.info("node: %s applied %s", layer, _description(differences, seconds, cause))

    def _count(self, layer: str, cause: str) -> None:
        self.applied_total.labels(layer).inc()
        if cause:
            self.drift.labels(layer, "changed").inc()

    def host_failed(self, error: Exception) -> None:
        self.failures.inc()
        log.error("node: probe exemption failed: %s", error)

    def stalled(self, pod: Pod, *, over: bool) -> None:
        """Does nothing: the state of the pod is a metric, and the log names all such pods in one line."""

    def passed(self, pod: Pod, status: Status, seconds: float) -> None:
        self.reconcile.observe(seconds)


def _description(differences: tuple[str, ...], seconds: float, cause: str) -> str:
    by = f" after a change by {cause}" if cause else ""
    described = "; ".join(first(differences, _SHOWN)) or "took over table ownership or removed empty tables"
    return f"in {seconds * 1e3:.1f} ms{by}: {described}"
