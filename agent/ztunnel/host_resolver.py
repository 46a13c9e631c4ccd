# SPDX-License-Identifier: Apache-2.0
"""Resolves the host names of workloads without an address, by the resolver of this process, as Istio's ztunnel does."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

from agent.ztunnel.mesh.mesh_store import MeshStore

RESOLVE_SECONDS: Final = 5.0  # then the name counts as one without an address
KEPT_SECONDS: Final = 30.0  # the C library does not say how long an answer holds
FAILED_SECONDS: Final = 2.0

log = logging.getLogger(__name__)


class HostResolver:
    """Fills `MeshStore.resolved`. Belongs to one thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, store: MeshStore) -> None:
        self._loop = loop
        self._store = store
        self._waiting: dict[str, list[Callable[[], None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def resolve(self, host: str, done: Callable[[], None]) -> None:
        """Calls `done` later, when the store has the addresses of the host, or none because the lookup failed."""
        waiting = self._waiting.setdefault(host, [])
        waiting.append(done)
        if len(waiting) == 1:
            task = self._loop.create_task(self._look_up(host))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _look_up(self, host: str) -> None:
        found: tuple[str, ...] = ()
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                infos = await self._loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            found = tuple(dict.fromkeys(str(ip_address(info[4][0])) for info in infos))
        except (OSError, ValueError, TimeoutError) as error:  # ValueError: no host name, or a scoped address
            log.warning("host name %s of a workload cannot be resolved: %s", host, error or "no answer")
        self._store.resolved[host] = found
        self._loop.call_later(KEPT_SECONDS if found else FAILED_SECONDS, self._store.resolved.pop, host, None)
        for done in self._waiting.pop(host):
            done()
