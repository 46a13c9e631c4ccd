# SPDX-License-Identifier: Apache-2.0
"""Connects the agent with Kubernetes: watches, annotations, events, admission, names, the taint."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.core.model.pods import Pod, PodTable
from agent.core.settings import Settings
from agent.flows.identity import Identities, Service, Workload, pod_workload
from agent.reconciler.loop import Reconciler
from agent.sources.kube import objects, source
from agent.sources.kube.access import Access
from agent.sources.kube.admission import Admission
from agent.sources.kube.annotating import Annotator
from agent.sources.kube.api_client import Client
from agent.sources.kube.cluster_workloads import ClusterWorkloads
from agent.sources.kube.conditions import ZtunnelCondition
from agent.sources.kube.events import EventJournal, Events
from agent.sources.kube.follower import Follower
from agent.sources.kube.node_taints import KubeNode, Taint
from agent.sources.kube.review import Review
from agent.sources.kube.tainting import Tainting
from agent.sources.netns.namespace_registry import NamespaceRegistry
from agent.sources.state.offline_allowlist import OfflineAllowlist
from agent.zds.server import ZdsServer

_DOMAIN = "cluster.local"
_PATIENCE = 5.0  # seconds that a start waits for an API server that does not answer


class Kubernetes:
    """Everything that communicates with the API server."""

    def __init__(
        self,
        *,
        settings: Settings,
        node: str,
        table: PodTable,
        namespaces: NamespaceRegistry,
        reconciler: Reconciler,
        zds: ZdsServer,
        exempt: OfflineAllowlist,
        identities: Identities,
    ) -> None:
        self.client = client = Client(Access(settings.kube_server, settings.kube_token_file, settings.kube_ca_file))
        self._pods_known = asyncio.Event()
        self._namespaces_known = asyncio.Event()
        self.admission = Admission(client, table, settings)
        self.review = Review(client)
        self.events = Events(client, table, node)
        self.annotator = Annotator(
            client=client,
            table=table,
            state=lambda uid: reconciler.status(uid).state,
            captured=namespaces.was_captured,
            period=settings.verify_seconds,
            random=random.random,
            known=lambda: zds.met and self.known,
            others=lambda: _others(settings.host_root),
            fought=self.events.fought,
        )
        self.journal = EventJournal(self.events, self.annotator.look)
        self.condition = ZtunnelCondition(
            client=client,
            table=table,
            namespace=settings.own_namespace,
            connected=lambda: bool(zds.connections),
            report=self.events.report_node,
        )
        self.tainting = None
        if settings.startup_taint:
            taint = Taint.parse(settings.startup_taint)
            self.tainting = Tainting(
                KubeNode(client, node),
                taint,
                returns=settings.startup_taint_returns,
                stalled=settings.startup_taint_stalled,
            )
        self.peers = _peers(client, identities) if settings.kube_peers else None

        def changed(uid: str) -> None:
            self.annotator.look(uid)
            exempt.update()

        self.source = source.PodSink(table, reconciler.wake, namespaces.was_captured, changed)
        self.pods = Follower(
            client,
            "/api/v1/pods",
            query={"fieldSelector": f"spec.nodeName={node}"},
            decode=objects.pod,
            sink=self.source,
            random=random.random,
            synced=self._pods_known,
        )
        self.namespaces = Follower(
            client,
            "/api/v1/namespaces",
            query={},
            decode=objects.namespace,
            sink=source.NamespaceSink(table, reconciler.wake, exempt.update),
            random=random.random,
            synced=self._namespaces_known,
        )

    def parts(self, lacking: Callable[[], str], stalled: Callable[[], str]) -> list[Coroutine[Any, Any, None]]:
        """Returns what has to run. `lacking`: why a pod that starts now might run uncaptured, "" if it cannot.

        `stalled`: in which pods ztunnel does not accept connections, "" if in none.
        """
        parts = [self.pods.run(), self.namespaces.run()]
        parts += [self.annotator.run(), self.events.run(), self.condition.run()]
        if self.peers:
            parts.append(self.peers.run())
        if self.tainting:
            parts.append(self.tainting.run(lacking, stalled))
        return parts

    async def settle(self) -> None:
        """Returns when pods and namespaces are known, or when the time for the API server is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._namespaces_known.wait()
                await self._pods_known.wait()

    @property
    def known(self) -> bool:
        """True once this node's pods and all namespaces are known."""
        return self._pods_known.is_set() and self._namespaces_known.is_set()

    @property
    def missing(self) -> str:
        """Why pods are not known yet; "" once they are."""
        reason = f"this node's pods are not known from Kubernetes yet: {self.error or 'listing them'}"
        return "" if self.known else reason

    @property
    def error(self) -> str:
        """The first failure at the API server, in one line."""
        more = [part.error for part in (self.tainting, self.peers, self.annotator) if part is not None]
        return next((error for error in (self.pods.error, self.namespaces.error, *more) if error), "")

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns complete lists, watches, events, bookmarks and failures of each followed collection."""
        return {path: asdict(one.since) for path, one in self._followed().items()}

    def following(self) -> dict[str, bool]:
        """Returns for each collection whether it is known and the last attempt to follow it succeeded."""
        return {path: one.synced.is_set() and not one.error for path, one in self._followed().items()}

    def _followed(self) -> dict[str, Follower[Any]]:
        peers = self.peers.followers if self.peers else []
        return {
            **{one.path: one for one in (self.pods, self.namespaces)},
            **{f"{one.path} of the cluster": one for one in peers},
        }


def _others(host_root: str) -> str:
    """Describes istio-cni's agent if it runs on this node; "" if not."""
    from agent.install.host_root import HostRoot  # both are needed rarely
    from agent.migration.istio_agent import RUN_DIR, istio_agent_runs

    return istio_agent_runs(HostRoot(host_root), [RUN_DIR], Path("/proc"))


def _peers(client: Client, identities: Identities) -> ClusterWorkloads[Workload, Service]:
    def workload(namespace: str, name: str, labels: Mapping[str, str]) -> Workload:
        return pod_workload(Pod("", namespace, name, labels=labels), identities.cluster)

    def service(namespace: str, name: str) -> Service:
        return Service(f"{name}.{namespace}.svc.{_DOMAIN}", name, namespace)

    return ClusterWorkloads(
        client=client, know=identities.know_peers, workload=workload, service=service, random=random.random
    )
