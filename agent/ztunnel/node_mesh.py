# SPDX-License-Identifier: Apache-2.0
"""The mesh of one node in two parts: one process follows it and asks for certificates, each worker decides by it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from agent.ztunnel import ztunnel_settings
from agent.ztunnel.dns.mesh_names import MeshNames
from agent.ztunnel.hbone.next_hop import Router
from agent.ztunnel.hbone.tunnels import HboneTunnels
from agent.ztunnel.host_resolver import HostResolver
from agent.ztunnel.mesh.mesh_store import PART, Mesh, MeshDelta, MeshStore
from agent.ztunnel.mesh_router import GatewayRouter, MeshRouter, RouterSettings
from agent.ztunnel.mesh_sources import MeshSource, mesh_source
from agent.ztunnel.relay.poller import Poller
from agent.ztunnel.tls.certificates import Certificates
from agent.ztunnel.tls.contexts import ContextStore, Credentials
from agent.ztunnel.tls.sources import credentials_source
from agent.ztunnel.tls.spiffe import SpiffeId
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

if TYPE_CHECKING:
    from agent.ztunnel.telemetry.traffic_metrics import Series
    from agent.ztunnel.tls.revocation import Revocations

SYNC_SECONDS: Final = 10.0  # then pods are served with what is known

log = logging.getLogger(__name__)


class MeshUser(Protocol):
    """Gets what the node's one MeshControl has found."""

    def mesh_changed(self, change: MeshDelta) -> None:
        """Takes a change, which the store of the MeshControl has already."""

    def put(self, credentials: Credentials) -> None:
        """Takes new credentials. Raises CredentialsError if they cannot be used."""


class MeshControl:
    """Follows the mesh and keeps the certificates of the node. Call `start` first, and `close` at the end."""

    def __init__(self, settings: ZtunnelSettings, *, follow: bool) -> None:
        """Takes `follow`: False if the connections are decided without the mesh of the settings. Raises SluiceError."""
        if follow:
            ztunnel_settings.check(settings)
        self.store = MeshStore(settings.preferred_namespace)
        self.source: MeshSource | None = mesh_source(settings, self._changed) if settings.mesh else None
        self._credentials = credentials_source(settings, self._renew)
        self.certificates = Certificates(self._credentials.issue, self._deliver)
        self._user: MeshUser | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, user: MeshUser) -> None:
        self._user = user
        parts = [self._credentials.run(), *([self.source.run()] if self.source else [])]
        self._tasks = [asyncio.get_running_loop().create_task(part) for part in parts]

    async def synced(self) -> None:
        """Waits for the first state of the mesh, at most SYNC_SECONDS."""
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

    def _renew(self, identity: SpiffeId) -> None:
        self.certificates.renew(identity)

    async def _changed(self, change: Mesh | MeshDelta) -> None:
        """Applies a change; connections get their turn between its parts."""
        delta = self.store.difference(change) if isinstance(change, Mesh) else change
        for part in delta.parts():
            self.store.apply(part)
            if self._user is not None:
                self._user.mesh_changed(part)
            await asyncio.sleep(0)

    def _deliver(self, credentials: Credentials) -> None:
        if self._user is not None:
            self._user.put(credentials)


class NodeMesh:
    """The decisions, names and tunnels of one event loop. Call `begin` first, and `close` after the last pod."""

    def __init__(
        self,
        settings: ZtunnelSettings,
        poller: Poller,
        store: MeshStore,
        *,
        want: Callable[[SpiffeId], None],
        router: Router | None = None,
    ) -> None:
        """Takes `want`, which requests credentials, and a router in place of the one that the store gives."""
        self.store = store
        self._contexts = ContextStore(want)
        self.router = router or (GatewayRouter if settings.gateway else MeshRouter)(
            store,
            RouterSettings(
                network=settings.network,
                trust_domain=settings.trust_domain,
                response_baggage=settings.response_baggage,
                tunnel_to_loopback=settings.tunnel_to_loopback,
                log_policies=settings.log_policies,
            ),
        )
        self.names = MeshNames(store, settings.cluster_domain) if settings.mesh_names else None
        self._revocations = _revocations(settings)
        hosts = HostResolver(poller.loop, store)
        self.tunnels = HboneTunnels(poller, self._contexts, self.router, hosts=hosts, revocations=self._revocations)
        self.put = self._contexts.put
        self._following: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Begins to follow the revocation lists, and waits for them."""
        if self._revocations is not None:
            self._following = asyncio.get_running_loop().create_task(self._revocations.run())
            await self._revocations.read.wait()

    def series(self) -> Series:
        """Returns the metrics of this part."""
        return self._revocations.series() if self._revocations is not None else {}

    def mesh_changed(self, change: MeshDelta) -> None:
        self.tunnels.reconsider()
        if len(change.changed) >= PART:  # the collector would need 0.1 s for 20,000 workloads, again and again
            gc.freeze()

    def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
        self.tunnels.stop()


def _revocations(settings: ZtunnelSettings) -> Revocations | None:
    """Returns what checks peers; its library, which costs 9 MB, is loaded only where lists are set."""
    if not settings.revocation_lists:
        return None
    from agent.ztunnel.tls.revocation import Revocations

    return Revocations(Path(settings.revocation_lists), closed=settings.revocation_failure == "closed")
