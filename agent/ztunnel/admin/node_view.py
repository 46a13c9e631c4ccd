# SPDX-License-Identifier: Apache-2.0
"""The state of a ztunnel process for its pages: what is pending, its pods and connections, its own counts."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from agent import __version__
from agent.zds.messages import Add
from agent.ztunnel.admin import mesh_dump
from agent.ztunnel.mesh.mesh_store import MeshStore
from agent.ztunnel.pod_server import PodServing
from agent.ztunnel.telemetry.traffic_metrics import FAMILIES, Family, Series, merged
from agent.ztunnel.workloads import Workloads
from agent.ztunnel.zds_client import ZdsClient
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

if TYPE_CHECKING:
    from agent.ztunnel.node_mesh import MeshControl

_SECRETS: Final = ("mesh_headers", "ca_headers")  # their values may be tokens
PROCESS_FAMILIES: Final[Mapping[str, Family]] = {
    "istio_build": Family("gauge", "Istio component build info"),
    "istio_crl_policy_rejections": Family("counter", "The total number of sessions ended by a revocation list"),
    "istio_crl_untracked_connections": Family("counter", "The total number of sessions without a check of the peer"),
    "istio_xds_connection_terminations": Family("counter", "The total number of completed connections to istiod"),
    "istio_xds_message": Family("counter", "The total number of messages received"),
    "istio_xds_message_bytes": Family("counter", "The total number of bytes received"),
    "workload_manager_active_proxy_count": Family("gauge", "The number of pods that are served"),
    "workload_manager_pending_proxy_count": Family("gauge", "The number of pods that could not be started yet"),
    "workload_manager_proxies_started": Family("counter", "The total number of pods that were started"),
    "workload_manager_proxies_stopped": Family("counter", "The total number of pods that were stopped"),
    "sluice_worker_restarts": Family("counter", "The total number of workers that were started again"),
    "process_open_fds": Family("gauge", "The number of open file descriptors"),
    "process_max_fds": Family("gauge", "The maximum number of open file descriptors"),
}
ALL_FAMILIES: Final[Mapping[str, Family]] = {**FAMILIES, **PROCESS_FAMILIES}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """Reads the parts of the process; changes none. `mesh` is None without a mesh."""

    settings: ZtunnelSettings
    client: ZdsClient
    workloads: Workloads
    mesh: MeshControl | None
    serving: PodServing

    def pending(self) -> list[str]:
        """Returns the names of the parts that are not ready, as Istio's ztunnel names them; empty if all are."""
        source = self.mesh.source if self.mesh else None
        parts = {
            "state manager": source is not None and not source.synced.is_set(),
            # The pods are not known from the loss of the agent until the end of its next snapshot.
            "workload proxy manager": not (self.client.connected and self.workloads.settled) or self.serving.waits(),
        }
        return [name for name, waits in parts.items() if waits]

    async def series(self) -> Series:
        """Returns all values of /metrics."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        values: Series = {
            ("istio_build", (("component", "ztunnel"), ("tag", __version__))): 1,
            ("workload_manager_active_proxy_count", ()): len(self.workloads.running),
            ("workload_manager_pending_proxy_count", ()): len(self.workloads.pending),
            ("workload_manager_proxies_started", ()): self.workloads.started,
            ("workload_manager_proxies_stopped", ()): self.workloads.stopped,
            ("process_open_fds", ()): len(os.listdir("/proc/self/fd")) - 1,  # noqa: PTH208 - names alone
            ("process_max_fds", ()): most,
        }
        source = self.mesh.source if self.mesh else None
        return merged([(await self.serving.report()).counts, source.series() if source else {}, values])

    async def config_dump(self) -> dict[str, Any]:
        """Returns the value of /config_dump."""
        connections = (await self.serving.report()).connections
        store = self.mesh.store if self.mesh else MeshStore()
        config = {key: value for key, value in asdict(self.settings).items() if key not in _SECRETS}
        return {
            **mesh_dump.mesh(store),
            "version": {"version": __version__, "gitRevision": "unknown", "istioVersion": "unknown"},
            "config": config,
            "certificates": self._certificates(),
            "workloadState": {
                **{uid: _state("Pending", add) for uid, (add, _) in self.workloads.pending.items()},
                **{
                    uid: {**_state("Up", running.add), "connections": connections.get(uid, {})}
                    for uid, running in self.workloads.running.items()
                },
            },
        }

    def _certificates(self) -> list[dict[str, Any]]:
        if self.mesh is None:
            return []
        from agent.ztunnel.admin import certificate_dump

        return certificate_dump.certificates(self.mesh.certificates.statuses())


def _state(state: str, add: Add) -> dict[str, Any]:
    info = {"name": add.name, "namespace": add.namespace, "serviceAccount": add.service_account}
    return {"state": state, "info": info}
