# SPDX-License-Identifier: Apache-2.0
"""Serves pods in one process: what their connections share, and what is shown of them."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from agent.kernel.bpf.asked_resolvers import Asked
from agent.kernel.netns import Netns
from agent.zds.messages import Add
from agent.ztunnel.relay.keepalive import LOOK_SECONDS
from agent.ztunnel.relay.pod_context import Engine, PodContext
from agent.ztunnel.relay.pod_listener import PodListener
from agent.ztunnel.relay.poller import Deadlines, Poller
from agent.ztunnel.telemetry.records import RecordSink
from agent.ztunnel.telemetry.response_flags import Reporter
from agent.ztunnel.telemetry.traffic_metrics import Series, merged
from agent.ztunnel.workloads import StartedPod
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

if TYPE_CHECKING:  # a node without a mesh loads none of them
    from agent.ztunnel.node_mesh import NodeMesh
    from agent.ztunnel.telemetry.traffic_account import TrafficAccount

ANSWERED_SECONDS = 2.0  # a second answer may still come
_DIRECTIONS = ("inbound", "outbound")

PodConnections = dict[str, list[dict[str, str | None]]]  # by direction, as /config_dump has them


@dataclass(frozen=True, slots=True)
class Report:
    """The state of the pods: counts, and open connections by the pod's UID."""

    counts: Series
    connections: Mapping[str, PodConnections]


class PodServing(Protocol):
    """Serves the pods of this ztunnel, in this process or by workers."""

    async def begin(self) -> None:
        """Prepares for pods."""

    def start(self, add: Add, netns: Netns) -> StartedPod:
        """Returns the started pod. Raises OSError or SluiceError."""

    def waits(self) -> bool:
        """Returns True if a pod is not served as it should be."""

    async def report(self) -> Report:
        """Returns the state of this moment."""

    def set_levels(self, levels: dict[str, int]) -> None:
        """Sets the log levels of other processes, by logger."""

    def stop_listening(self) -> None:
        """Stops new connections."""

    def is_live(self) -> bool:
        """Returns True while connections are open, or peers are notified of the drain."""

    async def close(self) -> None:
        """Ends all connections."""


class PodServer:
    """Serves pods in this process."""

    def __init__(
        self,
        settings: ZtunnelSettings,
        poller: Poller,
        mesh: NodeMesh | None,
        *,
        records: RecordSink,
        lines: RecordSink,
        shared: bool = False,
    ) -> None:
        """Takes where records and the access log go; `shared`: other processes serve the same pods."""
        loop = poller.loop
        self._mesh = mesh
        self.traffic = _traffic(lines, settings) if mesh else None
        self.engine = Engine(
            poller=poller,
            connects=Deadlines(loop, settings.connect_seconds),
            queries=Deadlines(loop, settings.dns_seconds),
            answered=Deadlines(loop, ANSWERED_SECONDS),
            aged=Deadlines(loop, LOOK_SECONDS),
            records=records,
            asked=Asked(settings.bpf_dir),
            share=_share(settings.share // settings.workers),
            tunnels=mesh.tunnels if mesh else None,
            mesh_names=mesh.names if mesh else None,
            traffic=self.traffic,
            shared=shared,
        )

    async def begin(self) -> None:
        if self._mesh is not None:
            await self._mesh.begin()

    def start(self, add: Add, netns: Netns) -> PodListener:
        return PodListener(self.engine, add, netns)

    def waits(self) -> bool:
        return False

    async def report(self) -> Report:
        return self.seen()

    def seen(self) -> Report:
        """Returns the state of this moment."""
        connections = {one.pod.uid: _connections(one.pod) for one in self.engine.pods}
        return Report(self.counts(), connections)

    def counts(self) -> Series:
        parts = (self.traffic.snapshot() if self.traffic else {}, self._mesh.series() if self._mesh else {})
        return merged(parts)

    def set_levels(self, levels: dict[str, int]) -> None:
        """Has no other process."""

    def stop_listening(self) -> None:
        for one in self.engine.pods:
            one.stop_listening()

    def is_live(self) -> bool:
        tunnels = self.engine.tunnels
        return any(one.pod.live or (tunnels and tunnels.is_notifying(one.pod)) for one in self.engine.pods)

    async def close(self) -> None:
        self.end()

    def end(self) -> None:
        """Ends all connections and timers."""
        for one in tuple(self.engine.pods):
            one.close()
        if self._mesh is not None:
            self._mesh.close()
        engine = self.engine
        for part in (engine.connects, engine.queries, engine.answered, engine.aged, engine.asked):
            part.close()


def _share(most: int) -> int:
    """Limits the connections of one pod by descriptors.

    One pod uses at most a quarter of them, or three quarters with streams alone: a stream has six, another two.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(most, descriptors // 8)


def _traffic(lines: RecordSink, settings: ZtunnelSettings) -> TrafficAccount:
    """Returns Istio's counts of connections; only a mesh needs their modules."""
    from agent.ztunnel.telemetry.traffic_account import TrafficAccount

    return TrafficAccount(lines, as_json=settings.access_log_json)


def _connections(pod: PodContext) -> PodConnections:
    found: PodConnections = {direction: [] for direction in _DIRECTIONS}
    for counted in pod.counted.values():
        parties = counted.parties
        found["outbound" if parties.reporter is Reporter.SOURCE else "inbound"].append(
            {
                "src": parties.source_address,
                "originalDst": parties.asked or None,
                "actualDst": parties.target,
                "protocol": "HBONE" if parties.mutual_tls else "TCP",
            }
        )
    return found
