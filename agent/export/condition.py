"""Metrics of the agent's own condition: what it runs with, whether it is ready, which pods still lack capture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.core.pods import Pod
from agent.core.status import State, Status


@dataclass(frozen=True, slots=True)
class Condition:
    """`about`: labels of sluice_agent_info. `exempt`: of the node's probes, None where they are not to be.

    `uncaptured`: pods that are to be captured and are not. `foreign`: pods with remarks on what others have put
    before ours, and how many. `age`: seconds since the last comparison that was right, of the captured pod where that
    is longest ago; None where none is captured.
    """

    about: Mapping[str, str] = field(default_factory=dict)
    ready: bool = False
    exempt: bool | None = None
    period: float = 0.0
    uncaptured: Sequence[tuple[Pod, State]] = ()
    foreign: Sequence[tuple[Pod, int]] = ()
    age: float | None = None


def uncaptured(pods: Iterable[tuple[Pod, State]], wanted: Callable[[Pod], bool]) -> list[tuple[Pod, State]]:
    """Those that fail or wait. `wanted` is asked only of pods that nobody has looked at yet."""
    failing = (State.FAILED, State.PENDING)
    return [(pod, state) for pod, state in pods if state in failing or (state is State.WAITING and wanted(pod))]


def age(statuses: Iterable[Status], now: float) -> float | None:
    """`now` in Unix time. A pod that fails is told of otherwise, and does not count."""
    times = [one.verified for one in statuses if one.state in (State.ENABLED, State.PENDING) and one.verified]
    return max(0.0, now - min(times)) if times else None


class ConditionCollector(Collector):
    """Read when it is asked for; None is for what has no agent."""

    def __init__(self, condition: Callable[[], Condition | None]) -> None:
        self._condition = condition

    def describe(self) -> Iterator[Metric]:
        """Nothing: without it the registry would collect when this is registered, before the agent is whole."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        if (found := self._condition()) is None:
            return
        info = GaugeMetricFamily("sluice_agent_info", "What the agent runs with; always 1.", labels=list(found.about))
        info.add_metric(list(found.about.values()), 1)
        yield info
        yield GaugeMetricFamily("sluice_ready", "Whether the agent takes pods, as /readyz says.", value=found.ready)
        if found.exempt is not None:
            what = "Whether the node's own probes of captured pods are exempt."
            yield GaugeMetricFamily("sluice_probes_exempt", what, value=found.exempt)
        what = "The setting verify_seconds: each captured pod is compared with the kernel that often."
        yield GaugeMetricFamily("sluice_verify_period_seconds", what, value=found.period)
        if found.age is not None:
            what = "Since the last comparison that was right, of the captured pod where that is longest ago."
            yield GaugeMetricFamily("sluice_verification_age_seconds", what, value=found.age)
        what = "Pods that are to be captured and are not; 1 for each."
        pods = GaugeMetricFamily("sluice_pod_uncaptured", what, labels=["namespace", "pod", "state"])
        for pod, state in found.uncaptured:
            pods.add_metric([pod.namespace, pod.name, state.value], 1)
        yield pods
        what = (
            "Chains and policy rules of others that come before ours in a captured pod and may take its traffic; 1 more"
            " while ztunnel's own connections come back to it."
        )
        rules = GaugeMetricFamily("sluice_pod_foreign_rules", what, labels=["namespace", "pod"])
        for pod, count in found.foreign:
            rules.add_metric([pod.namespace, pod.name], count)
        yield rules
