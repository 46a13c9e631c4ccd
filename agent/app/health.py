# SPDX-License-Identifier: Apache-2.0
"""The agent's report of its own state: for /readyz, `sluice status` and the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent.app.parts import Mechanisms
from agent.core.model.pods import PodTable
from agent.core.model.status import State
from agent.core.policy.decide import decide
from agent.core.settings import Settings
from agent.core.text import some
from agent.export.collectors import Cluster, Condition, age, uncaptured
from agent.flows.accounting import Accounting
from agent.reconciler.host_loop import HostLoop
from agent.reconciler.loop import Reconciler
from agent.sources.state.notes import Notes
from agent.sources.static_file import StaticFile
from agent.zds.server import ZdsServer

if TYPE_CHECKING:
    from agent.app.kubernetes import Kubernetes
    from agent.install.installer import Installer

_SHOWN = 3  # pods in one line


@dataclass(slots=True, kw_only=True)
class Health:
    """Reads the agent's parts. `restored` is set once every pod of the previous run has had its first pass."""

    settings: Settings
    version: str
    node_name: str
    mechanisms: Mechanisms
    state: Notes
    table: PodTable
    reconciler: Reconciler
    zds: ZdsServer
    host: HostLoop
    static: StaticFile
    accounting: Accounting | None
    installer: Installer | None
    kubernetes: Kubernetes | None
    restored: asyncio.Event = field(default_factory=asyncio.Event)

    def readiness(self, *, stalls: bool = True) -> tuple[str, str]:
        """Returns (why the agent cannot capture pods, what is degraded); both empty if all is well.

        Without `stalls` it leaves out a ztunnel that has stalled: a runtime that asks the plugin for its STATUS takes
        the whole node out of service, and the stall may be of one pod.
        """
        if not self.restored.is_set():
            return "still restoring pods from the previous run", ""
        if self.kubernetes and self.kubernetes.missing:
            return self.kubernetes.missing, ""
        if self.installer and not self.installer.ready:
            return f"the CNI plugin is not installed: {self.installer.error or 'installation in progress'}", ""
        if not self.zds.connections:
            return "", self.zds.absence
        if stalls and (stalled := self.stalled()):
            return "", stalled
        if self.host.status.error:
            return "", f"probes from this node are captured: {self.host.status.error}"
        return "", self.static.error or (self.kubernetes.error if self.kubernetes else "")

    def stalled(self) -> str:
        """Returns in which pods ztunnel does not accept connections; "" if in none."""
        pods = sorted(pod.key for pod in self.table if self.reconciler.status(pod.uid).state is State.STALLED)
        return f"ztunnel has stalled: it does not accept connections of {some(pods, _SHOWN)}" if pods else ""

    def lacking(self) -> str:
        """Returns why a pod that starts now might run uncaptured; "" if none can."""
        return self.readiness()[0]

    def cluster(self) -> Cluster:
        """Returns the values for the metrics of the cluster."""
        api, cni = self.kubernetes, self.installer
        return Cluster(
            follows=api.counts() if api else {},
            following=api.following() if api else {},
            synced=not api.missing if api else None,
            events_lost=api.events.lost if api else 0,
            installed=cni.ready if cni else None,
            rewrites=cni.rewrites if cni else 0,
            fought=cni.fighting if cni else False,
        )

    def condition(self) -> Condition:
        """Returns the values for the metrics of the agent's condition."""
        statuses = [(pod, self.reconciler.status(pod.uid)) for pod in self.table]
        host = self.host.status
        return Condition(
            about={
                "node": self.node_name,
                "version": self.version,
                "accounting": self.accounting.name if self.accounting else "off",
                "setting": self.settings.backend,
                "backend": self.mechanisms.choice.name,
                "host_probes": host.mechanism,
            },
            ready=not self.lacking(),
            exempt=None if host.mechanism == "off" else host.ok and not host.error,
            period=self.settings.verify_seconds,
            uncaptured=uncaptured(
                ((pod, status.state) for pod, status in statuses), lambda pod: decide(pod, self.settings).enrolled
            ),
            foreign=[(pod, len(status.foreign)) for pod, status in statuses if status.foreign],
            age=age((status for _, status in statuses), time.time()),
        )

    def node(self) -> Mapping[str, Any]:
        """Returns what `sluice status` shows of the node itself."""
        return {
            "node": self.node_name,
            "version": self.version,
            "backend": self.mechanisms.choice.name,
            "backend_reason": self.mechanisms.choice.reason,
            "backends": {
                name: "; ".join(support.remarks) or "usable" if support.ok else support.missing
                for name, support in self.mechanisms.support.items()
            },
            "host_probes": self.host.status.as_dict(),
            "host_probes_reason": self.mechanisms.host_reason,
            "ztunnel_connections": self.zds.connections,
            "ztunnel_processes": self.zds.processes,
            "ztunnels_since": self.zds.unchanged_since,
            "ztunnel_unacknowledged": self.zds.unacknowledged,
            "accounting": self.accounting.name if self.accounting else "off",
            "accounting_reason": self.accounting.reason if self.accounting else "setting accounting",
            "kubernetes": self.kubernetes.missing or self.kubernetes.error or "ok" if self.kubernetes else "not set",
            "cni": (self.installer.error or self.installer.file) if self.installer else "not installed by the agent",
            "static_pods": self.static.error or "ok" if self.settings.static_pods else "not set",
            "damaged_state_files": self.state.damaged,
        }
