"""Metrics of what ties the agent to its node and cluster: the watches, and the CNI installation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class Cluster:
    """`follows`: by path of a followed collection, what happened how often. None is for what this node does not do.

    `following`: by the same paths, whether the last try went well. `fought`: somebody keeps undoing the installation.
    """

    follows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    following: Mapping[str, bool] = field(default_factory=dict)
    synced: bool | None = None
    events_lost: int = 0
    installed: bool | None = None
    rewrites: int = 0
    fought: bool = False


class ClusterCollector(Collector):
    """Read when it is asked for."""

    def __init__(self, cluster: Callable[[], Cluster]) -> None:
        self._cluster = cluster

    def collect(self) -> Iterator[Metric]:
        found = self._cluster()
        if found.synced is not None:
            what = "What became of following the collections of the API server."
            family = CounterMetricFamily("sluice_kube_follow", what, labels=["path", "what"])
            for path, counts in sorted(found.follows.items()):
                for word, count in counts.items():
                    family.add_metric([path, word], count)
            yield family
            what = "Whether a collection of the API server is followed: 0 since a try failed, until one goes well."
            gauge = GaugeMetricFamily("sluice_kube_following", what, labels=["path"])
            for path, well in sorted(found.following.items()):
                gauge.add_metric([path], well)
            yield gauge
            what = "Whether this node's pods and all namespaces are known from the API server."
            yield GaugeMetricFamily("sluice_kube_synced", what, value=found.synced)
            what = "Events on pods that could not be written."
            yield CounterMetricFamily("sluice_kube_events_lost", what, value=found.events_lost)
        if found.installed is not None:
            what = "Whether the CNI plugin and its configuration are in place."
            yield GaugeMetricFamily("sluice_install_ready", what, value=found.installed)
            what = "CNI configurations written; it grows when somebody else writes them, too."
            yield CounterMetricFamily("sluice_install_rewrites", what, value=found.rewrites)
            what = "Whether somebody keeps undoing the CNI installation, until a minute after the last time."
            yield GaugeMetricFamily("sluice_install_fought", what, value=found.fought)
