# SPDX-License-Identifier: Apache-2.0
"""The node's own network namespace as host mechanisms use it, and the sockets that stay open in it.

It is the namespace that the agent itself runs in, and a type of its own: what programs a pod takes a PodNetns,
which refuses the node's namespace, and cannot be handed this one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from agent.core.wire.netlink import messages
from agent.core.wire.nftables import GROUP_NFTABLES, NETLINK_NETFILTER, NEWGEN
from agent.kernel import sysctl
from agent.kernel.netlink.ipset import IpsetSocket
from agent.kernel.netlink.nf_tables import NftSocket, committer
from agent.kernel.netlink.routes import RouteSocket
from agent.kernel.netlink.socket import NetlinkSocket

T = TypeVar("T")


class Door(Protocol):
    """Something one thread can be inside of for a moment; tests bring a kernel.netns.Netns that plays the host."""

    def call(self, function: Callable[[], Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Sockets:
    nft: NftSocket
    route: RouteSocket
    ipset: IpsetSocket
    events: NetlinkSocket


class HostNetns:
    """Sockets of the node's namespace. Not for two threads at once, but for `events` and `changed`."""

    def __init__(self, door: Door | None = None) -> None:
        """Opens sockets behind `door`, else in the calling thread's namespace. Raises OSError when they are refused."""
        self.door = door
        self._sockets: _Sockets = self.call(_open)

    @property
    def nft(self) -> NftSocket:
        return self._sockets.nft

    @property
    def route(self) -> RouteSocket:
        return self._sockets.route

    @property
    def ipset(self) -> IpsetSocket:
        return self._sockets.ipset

    @property
    def events(self) -> NetlinkSocket:
        """Notifications of nf_tables changes; not blocking."""
        return self._sockets.events

    def call(self, function: Callable[[], T]) -> T:
        """Runs `function` in the node's namespace, on this thread."""
        if self.door is None:
            return function()
        result: T = self.door.call(function)
        return result

    def has_ipv6(self) -> bool:
        return self.call(sysctl.has_ipv6)

    def changed(self) -> str:
        """Reads all waiting notifications: who changed nf_tables last, as "nft[4711]"; "" when it was only us."""
        cause = ""
        try:
            while True:
                for message in messages(self.events.socket.recv(1 << 16)):
                    if message.kind == NEWGEN and message.port != self.nft.port:
                        cause = committer(message.body) or cause
        except BlockingIOError:
            return cause
        except OSError:
            return "unknown"  # ENOBUFS: notifications were lost

    def close(self) -> None:
        for one in (self.nft, self.route, self.ipset, self.events):
            one.close()


def _open() -> _Sockets:
    with contextlib.ExitStack() as undo:
        nft = NftSocket()
        undo.callback(nft.close)
        route = RouteSocket()
        undo.callback(route.close)
        ipset = IpsetSocket()
        undo.callback(ipset.close)
        events = NetlinkSocket(NETLINK_NETFILTER, groups=[GROUP_NFTABLES])
        events.socket.setblocking(False)
        undo.pop_all()
    return _Sockets(nft, route, ipset, events)
