# SPDX-License-Identifier: Apache-2.0
"""Follows the mesh: a local file, which may change at any time, or istiod. The last good state is kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from agent.core.errors import SettingsError
from agent.kernel.files import WatchedFile
from agent.ztunnel.mesh import local_mesh
from agent.ztunnel.mesh.local_mesh import MeshFileError
from agent.ztunnel.mesh.mesh_store import Mesh, MeshDelta
from agent.ztunnel.telemetry.traffic_metrics import Series
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

if TYPE_CHECKING:
    from grpclib.client import Channel

    from agent.ztunnel.control.xds_client import Node

LOOK_SECONDS: Final = 0.5  # between two looks at the file

Changed = Callable[[Mesh | MeshDelta], Awaitable[None]]

log = logging.getLogger(__name__)


class MeshSource(Protocol):
    """Follows the mesh. `synced` is set once its first state is there; `error` is "" while all is well."""

    synced: asyncio.Event

    @property
    def error(self) -> str:
        """Returns why the state may be out of date."""

    def series(self) -> Series:
        """Returns the source's own metrics."""

    async def run(self) -> None:
        """Runs until cancelled."""


class LocalMeshFile:
    """Reads the file again whenever it has changed. A bad file is logged, and the previous state stays."""

    def __init__(self, path: Path, changed: Changed) -> None:
        self._file = WatchedFile(path)
        self._changed = changed
        self.synced = asyncio.Event()
        self.error = f"{path} has not been read yet"

    def series(self) -> Series:
        return {}

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Reads the file if it has changed."""
        path = self._file.path
        try:
            text = self._file.read()
            if text is None:
                return
            if not text:
                raise MeshFileError("it does not exist or is empty")
            mesh = local_mesh.parse(text)
        except (OSError, UnicodeDecodeError, MeshFileError) as error:
            self.error = f"mesh file {path}: {getattr(error, 'strerror', None) or error}"
            kept = "; the previous mesh is kept" if self.synced.is_set() else ""
            log.error("%s%s", self.error, kept)
            return
        self.error = ""
        log.info("mesh file %s: %d workloads, %d services, %d policies", path, len(mesh.workloads),
                 len(mesh.services), len(mesh.policies))  # fmt: skip
        await self._changed(mesh)
        self.synced.set()


def mesh_source(settings: ZtunnelSettings, changed: Changed) -> MeshSource:
    """Returns the source that the settings name; it calls `changed` with each change. Raises SettingsError."""
    if not settings.mesh:
        raise SettingsError("no mesh is set")
    if "://" not in settings.mesh:
        return LocalMeshFile(Path(settings.mesh), changed)
    from agent.ztunnel.control import grpc_channel
    from agent.ztunnel.control.xds_client import XdsClient

    def connect() -> Channel:
        return grpc_channel.channel(settings.mesh, settings.mesh_roots, settings.mesh_name)

    return XdsClient(connect, istiod_node(settings), lambda: call_metadata(settings), changed)


def call_metadata(settings: ZtunnelSettings) -> dict[str, str]:
    """Returns the metadata of a call to istiod, with the current token. A missing token is left to istiod to refuse."""
    from agent.ztunnel.control import grpc_channel

    try:
        token = Path(settings.token_file).read_text()
    except OSError as error:
        log.warning("token %s: %s", settings.token_file, error.strerror)
        token = ""
    return grpc_channel.istio_metadata(settings.mesh_headers, settings.cluster_id, token)


def istiod_node(settings: ZtunnelSettings) -> Node:
    """Returns who this ztunnel is to istiod."""
    from agent.ztunnel.control.xds_client import Node

    ip = settings.pod_ip or "1.1.1.1"  # istiod wants one
    namespace = settings.pod_namespace
    return Node(
        f"ztunnel~{ip}~{settings.pod_name}.{namespace}~{namespace}.svc.{settings.cluster_domain}",
        {
            "NAME": settings.pod_name,
            "NAMESPACE": namespace,
            "INSTANCE_IPS": ip,
            "NODE_NAME": settings.node_name,
            **settings.metadata,
        },
    )
