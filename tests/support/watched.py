# SPDX-License-Identifier: Apache-2.0
"""A pod under a real DriftWatcher, and what is asked of the kernel for it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support.node import until
from support.rules import Pod

from agent.kernel import exec
from agent.kernel.netlink.netlink_socket import NetlinkSocket
from agent.kernel.netlink.nf_tables import NftSocket
from agent.kernel.pod_netns import PodNetns
from agent.lab.links import links
from agent.sources.drift import DriftWatcher, Wake

SECONDS = 20
_LOCAL_TABLE = 255
SYSCTL = "sysctl -qw net.ipv6.conf"


def prepare(pod: Pod) -> None:
    """Gives it an interface with addresses of both families, when the kernel has nothing more to tell of it.

    That its peer is down, and that it has an IPv6 address, is notified later: as a change that nobody made.
    """

    def has_address() -> bool:
        routes = inside.rtnl.get_routes(family=socket.AF_INET6, table=_LOCAL_TABLE)
        return any(route.get_attr("RTA_DST") == "fd09::2" for route in routes)

    with links(pod.name) as inside:
        inside.veth("eth0", "w")
        inside.add_addresses("eth0", "10.9.0.2/24", "fd09::2/64")
        until(lambda: inside.state("eth0") == "LOWERLAYERDOWN", "the kernel has seen that the peer is down")
        until(has_address, "the kernel has made the route of the address")
        inside.up("eth0")  # changes nothing, but waits for the lock under which the kernel does this and notifies


class Reading(DriftWatcher):
    """Says when it has read something."""

    def __init__(self) -> None:
        super().__init__()
        self.read = asyncio.Event()

    def _rules_changed(self, uid: str, target: PodNetns, wake: Wake) -> None:
        super()._rules_changed(uid, target, wake)
        self.read.set()

    def _routes_changed(self, uid: str, target: PodNetns, wake: Wake) -> None:
        super()._routes_changed(uid, target, wake)
        self.read.set()


class Watched:
    """A pod under a real DriftWatcher; `causes` are those that it was woken with."""

    def __init__(self, pod: Pod) -> None:
        self.pod, self.causes = pod, list[str]()
        self.watcher = Reading()
        self.watcher.watch("uid", pod.target, lambda uid, cause: self.causes.append(cause))

    async def sh(self, script: str) -> list[str]:
        """The causes that the script woke the pod with. The kernel notifies before a program's call returns."""
        await self.told()
        self.causes.clear()
        await asyncio.to_thread(self.pod.sh, script)
        await self.told()
        return list(self.causes)

    async def told(self) -> None:
        """Returns when all that waits has been read."""
        for events in (self.pod.target.events, self.pod.target.route_events):
            while not events.unchanged_since(events.mark()):
                await self.reads()

    async def reads(self) -> None:
        """Returns when something has been read."""
        self.watcher.read.clear()
        await asyncio.wait_for(self.watcher.read.wait(), SECONDS)


def watch(pod: Pod, script: Callable[[Watched], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        watched = Watched(pod)
        try:
            await script(watched)
        finally:
            watched.watcher.close()

    asyncio.run(run())


class Spy:
    """What is asked of the kernel: operations by name, families of rtnetlink and nf_tables, programs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.families: list[int] = []
        self.programs: list[str] = []
        request, dumped, commit, run = NetlinkSocket.request, NftSocket.dumped, NftSocket.commit, exec.run

        def spied_request(sock: Any, operation: str, kind: int, flags: int, body: bytes, **options: Any) -> Any:
            self.asked.append(operation)
            self.families.append(body[0])
            return request(sock, operation, kind, flags, body, **options)

        def spied_dump(sock: Any, kind: int, *rest: Any, **most: Any) -> tuple[bytes, bool]:
            self.asked.append("dump")
            return dumped(sock, kind, *rest, **most)

        def spied_commit(sock: Any, operation: str, commands: Any, generation: int | None) -> None:
            self.families += [command.family for command in commands]
            commit(sock, operation, commands, generation)

        def spied_run(argv: list[str], **options: Any) -> Any:
            self.programs.append(argv[0])
            return run(argv, **options)

        monkeypatch.setattr(NetlinkSocket, "request", spied_request)
        monkeypatch.setattr(NftSocket, "dumped", spied_dump)
        monkeypatch.setattr(NftSocket, "commit", spied_commit)
        monkeypatch.setattr(exec, "run", spied_run)
