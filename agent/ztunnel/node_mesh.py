# SPDX-License-Identifier: Apache-2.0
"""The mesh of one node, assembled: its state and source, certificates, decisions and tunnels."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent.ztunnel import ztunnel_settings
from agent.ztunnel.dns.mesh_names import MeshNames
from agent.ztunnel.hbone.next_hop import Router
from agent.ztunnel.hbone.tunnels import HboneTunnels
from agent.ztunnel.host_resolver import HostResolver
from agent.ztunnel.mesh.mesh_store import MeshStore
from agent.ztunnel.mesh_router import GatewayRouter, MeshRouter, RouterSettings
from agent.ztunnel.mesh_sources import MeshSource, mesh_source
from agent.ztunnel.relay.poller import Poller
from agent.ztunnel.tls.certificates import Certificates
from agent.ztunnel.tls.contexts import ContextStore
from agent.ztunnel.tls.sources import credentials_source
from agent.ztunnel.tls.spiffe import SpiffeId
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

if TYPE_CHECKING:
    from agent.ztunnel.tls.revocation import Revocations

SYNC_SECONDS: Final = 10.0  # then pods are served with what is known

log = logging.getLogger(__name__)


class NodeMesh:
    """The parts of a mesh for one event loop. Call `start` first, and `close` after the last pod."""

    def __init__(self, settings: ZtunnelSettings, poller: Poller, router: Router | None = None) -> None:
        """Takes a router in place of the one that the mesh of the settings gives. Raises SluiceError."""
        if router is None:
            ztunnel_settings.check(settings)
        self.store = MeshStore(settings.preferred_namespace)
        self.source: MeshSource | None = mesh_source(settings, self.store, self._changed) if settings.mesh else None
        self._credentials = credentials_source(settings, self._renew)
        self.contexts = ContextStore(self._want)
        self.certificates = Certificates(self._credentials.issue, self.contexts.put)
        self.router = router or (GatewayRouter if settings.gateway else MeshRouter)(
            self.store,
            RouterSettings(
                network=settings.network,
                trust_domain=settings.trust_domain,
                response_baggage=settings.response_baggage,
                tunnel_to_loopback=settings.tunnel_to_loopback,
                log_policies=settings.log_policies,
            ),
        )
        self.names = MeshNames(self.store, settings.cluster_domain) if settings.mesh_names else None
        self.revocations = _revocations(settings)
        hosts = HostResolver(poller.loop, self.store)
        self.tunnels = HboneTunnels(poller, self.contexts, self.router, hosts=hosts, revocations=self.revocations)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to follow the mesh, the certificates and the revocation lists."""
        followed = (self._credentials, self.source, self.revocations)
        self._tasks = [asyncio.get_running_loop().create_task(part.run()) for part in followed if part is not None]

    async def synced(self) -> None:
        """Waits for the revocation lists, and for the first state of the mesh, at most SYNC_SECONDS."""
        if self.revocations is not None:
            await self.revocations.read.wait()
        if self.source is None:
            return
        try:
            async with asyncio.timeout(SYNC_SECONDS):
                await self.source.synced.wait()
        except TimeoutError:
            log.warning("no mesh after %.0f s, pods are served without: %s", SYNC_SECONDS, self.source.error)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.certificates.close()
        self.tunnels.stop()

    def _want(self, identity: SpiffeId) -> None:
        self.certificates.want(identity)

    def _renew(self, identity: SpiffeId) -> None:
        self.certificates.renew(identity)

    def _changed(self) -> None:
        self.tunnels.reconsider()


def _revocations(settings: ZtunnelSettings) -> Revocations | None:
    """Returns what checks peers; its library, which costs 9 MB, is loaded only where lists are set."""
    if not settings.revocation_lists:
        return None
    from agent.ztunnel.tls.revocation import Revocations

    return Revocations(Path(settings.revocation_lists), closed=settings.revocation_failure == "closed")
