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
from agent.core.model.status import State
from agent.core.settings import Settings
from agent.flows.identity import Service, Who, Workload, pod_workload
from agent.sources.kube import objects, source
from agent.sources.kube.access import Access
from agent.sources.kube.admission import Admission
from agent.sources.kube.annotating import Annotator
from agent.sources.kube.client import Client
from agent.sources.kube.conditions import ZtunnelCondition
from agent.sources.kube.events import Events
from agent.sources.kube.follower import Follower
from agent.sources.kube.nodes import KubeNode, Taint
from agent.sources.kube.review import Review
from agent.sources.kube.tainting import Tainting
from agent.sources.kube.workloads import ClusterWorkloads
from agent.sources.state.offline_allowlist import OfflineAllowlist

_DOMAIN = "cluster.local"
_PATIENCE = 5.0  # seconds that a start waits for an API server that does not answer


class Kubernetes:
    """Everything that communicates with the API server."""

    def __init__(
        self,
        settings: Settings,
        node: str,
        table: PodTable,
        state: Callable[[str], State],
        wake: Callable[[str], None],
        captured: Callable[[str], bool],
        exempt: OfflineAllowlist,
        who: Who,
        lacking: Callable[[], str],
        connected: Callable[[], bool],
        met: Callable[[], bool],
    ) -> None:
        """`lacking`: why a pod that starts now might run uncaptured, "" if it cannot.

        `connected`: a ztunnel is connected; `met`: one has been since this agent started.
        """
        self.client = client = Client(Access(settings.kube_server, settings.kube_token_file, settings.kube_ca_file))
        self._exempt = exempt
        self.admission = Admission(client, table, settings)
        self.annotator = Annotator(
            client=client,
            table=table,
            state=state,
            captured=captured,
            period=settings.verify_seconds,
            random=random.random,
            known=lambda: met() and not self.missing,
            others=lambda: _others(settings.host_root),
            fought=lambda uid, words: self.events.fought(uid, words),
        )
        self.events = Events(client, table, node, self.annotator.look)
        self.source = pods = source.PodSink(table, wake, captured, self._looked)
        namespaces = source.NamespaceSink(table, wake, exempt.update)
        self.review = Review(client)
        self.condition = ZtunnelCondition(
            client=client,
            table=table,
            namespace=settings.own_namespace,
            connected=connected,
            report=self.events.report_node,
        )
        self.tainting = None
        if settings.startup_taint:
            taint = Taint.parse(settings.startup_taint)
            returns = settings.startup_taint_returns
            self.tainting = Tainting(KubeNode(client, node), taint, lacking, returns=returns)
        self.peers = _peers(client, who) if settings.kube_peers else None
        here = {"fieldSelector": f"spec.nodeName={node}"}
        self.pods = Follower(client, "/api/v1/pods", query=here, decode=objects.pod, sink=pods, random=random.random)
        self.namespaces = Follower(
            client, "/api/v1/namespaces", query={}, decode=objects.namespace, sink=namespaces, random=random.random
        )

    def _looked(self, uid: str) -> None:
        """Handles a change of this pod at the API server."""
        self.annotator.look(uid)
        self._exempt.update()

    def parts(self) -> list[Coroutine[Any, Any, None]]:
        more = [part.run() for part in (self.tainting, self.peers) if part is not None]
        more += [self.annotator.run(), self.events.run(), self.condition.run()]
        return [self.pods.run(), self.namespaces.run(), *more]

    async def settle(self) -> None:
        """Returns when pods and namespaces are known, or when the time for the API server is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self.namespaces.synced.wait()
                await self.pods.synced.wait()

    @property
    def missing(self) -> str:
        """Why pods are not known yet; "" once they are."""
        known = self.pods.synced.is_set() and self.namespaces.synced.is_set()
        return "" if known else f"this node's pods are not known from Kubernetes yet: {self.error or 'listing them'}"

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
    from agent.migration.istio_agent import RUN_DIR, theirs_runs

    return theirs_runs(HostRoot(host_root), [RUN_DIR], Path("/proc"))


def _peers(client: Client, who: Who) -> ClusterWorkloads[Workload, Service]:
    def workload(namespace: str, name: str, labels: Mapping[str, str]) -> Workload:
        return pod_workload(Pod("", namespace, name, labels=labels), who.cluster)

    def service(namespace: str, name: str) -> Service:
        return Service(f"{name}.{namespace}.svc.{_DOMAIN}", name, namespace)

    return ClusterWorkloads(
        client=client, know=who.know_peers, workload=workload, service=service, random=random.random
    )
