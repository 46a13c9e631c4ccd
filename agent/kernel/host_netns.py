# SPDX-License-Identifier: Apache-2.0
"""The node's own network namespace as host mechanisms use it, and the sockets that stay open in it.

It is the namespace that the agent itself runs in, and a type of its own: what programs a pod takes a PodNetns,
which refuses the node's namespace, and cannot be handed this one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from agent.core.wire.netlink import messages
from agent.core.wire.nftables import GROUP_NFTABLES, NETLINK_NETFILTER, NEWGEN
from agent.kernel import sysctl
from agent.kernel.netlink.ipset import IpsetSocket
from agent.kernel.netlink.netlink_socket import NetlinkSocket
from agent.kernel.netlink.nf_tables import NftSocket, committer
from agent.kernel.netlink.route_socket import RouteSocket
from agent.kernel.netns import Netns

T = TypeVar("T")


class HostNetns:
    """Sockets of the node's namespace. Not for two threads at once, but for `events` and `changed`.

    `events`: notifications of nf_tables changes; not blocking.
    """

    def __init__(self, door: Netns | None = None) -> None:
        """Opens sockets behind `door`, in tests a namespace that plays the host; else in the calling thread's.

        Raises OSError when they are refused.
        """
        self.door = door
        self.nft, self.route, self.ipset, self.events = self.call(_open)

    def call(self, function: Callable[[], T]) -> T:
        """Runs `function` in the node's namespace, on this thread."""
        return function() if self.door is None else self.door.call(function)

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


def _open() -> tuple[NftSocket, RouteSocket, IpsetSocket, NetlinkSocket]:
    with contextlib.ExitStack() as undo:
        nft = undo.enter_context(contextlib.closing(NftSocket()))
        route = undo.enter_context(contextlib.closing(RouteSocket()))
        ipset = undo.enter_context(contextlib.closing(IpsetSocket()))
        events = NetlinkSocket(NETLINK_NETFILTER, groups=[GROUP_NFTABLES])
        events.socket.setblocking(False)
        undo.pop_all()
    return nft, route, ipset, events
