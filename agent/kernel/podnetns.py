"""One pod's namespace as backends use it: the handle, and the sockets that stay open in it.

They are opened in one entry and kept for the pod's life: entering costs as much as asking, closing an nf_tables
socket after a change waits some 20 ms for the kernel's readers, and tables that we own belong to its port.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from agent.core.nftables import GROUP_NFTABLES, NETLINK_NETFILTER
from agent.kernel.netlink import NetlinkSocket
from agent.kernel.netns import Netns
from agent.kernel.nfnetlink import NftSocket
from agent.kernel.rtnetlink import RouteSocket


@dataclass(frozen=True, slots=True)
class _Sockets:
    nft: NftSocket
    route: RouteSocket
    events: NetlinkSocket


@dataclass(frozen=True, slots=True)
class Facts:
    """What a namespace is like: whether it has IPv6, its addresses, and whether lo has 127.0.0.1 and ::1."""

    ipv6: bool
    addresses: tuple[str, ...]
    loopback4: bool
    loopback6: bool


class PodNetns:
    """A namespace and its sockets. Not for two threads at once."""

    def __init__(self, netns: Netns) -> None:
        self.netns = netns
        self._opened: _Sockets | None = None

    @property
    def nft(self) -> NftSocket:
        return self._sockets.nft

    @property
    def route(self) -> RouteSocket:
        return self._sockets.route

    @property
    def events(self) -> NetlinkSocket:
        """Notifications of nf_tables changes in this namespace; not blocking."""
        return self._sockets.events

    def addresses(self) -> tuple[str, ...]:
        """Every address in the namespace but loopback and link-local ones, without prefix lengths."""
        return self.route.addresses()

    def has_ipv6(self) -> bool:
        """Whether this namespace has IPv6 and lo may use it."""
        return self.netns.call(_has_ipv6)

    def facts(self) -> Facts:
        found = self.route.addresses(loopback=True)
        others = tuple(a for a in found if a != "::1" and not a.startswith("127."))
        return Facts(self.has_ipv6(), others, "127.0.0.1" in found, "::1" in found)

    def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            for one in (opened.nft, opened.route, opened.events):
                one.close()
        self.netns.close()

    @property
    def _sockets(self) -> _Sockets:
        if self._opened is None:
            self._opened = self.netns.call(_open)
        return self._opened


def _open() -> _Sockets:
    with contextlib.ExitStack() as undo:
        nft = NftSocket()
        undo.callback(nft.close)
        route = RouteSocket()
        undo.callback(route.close)
        events = NetlinkSocket(NETLINK_NETFILTER, groups=[GROUP_NFTABLES])
        events.socket.setblocking(False)
        undo.pop_all()
    return _Sockets(nft, route, events)


def _has_ipv6() -> bool:
    # /proc/sys/net shows the namespace of the thread that opens the file.
    with contextlib.suppress(OSError), Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").open("rb", 0) as file:
        return file.read(1) == b"0"
    return False
