# SPDX-License-Identifier: Apache-2.0
"""One pod's namespace as backends use it: the handle, and the sockets that stay open in it.

They are opened in one entry and kept for the pod's life: entering costs as much as asking, closing an nf_tables
socket after a change waits some 20 ms for the kernel's readers, and tables that we own belong to its port.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

from agent.core.model.topology import PodTopology
from agent.core.wire.netlink import type_filter
from agent.core.wire.nftables import GROUP_NFTABLES, NETLINK_NETFILTER, NEWGEN
from agent.core.wire.rtnetlink import LOOPBACK_INDEX
from agent.kernel import sysctl
from agent.kernel.netlink.nf_tables import NftSocket
from agent.kernel.netlink.notifications import NotificationMark, Notifications
from agent.kernel.netlink.route_socket import GROUPS, MOST_ROUTES, Address, RouteSocket
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netns import Netns


@dataclass(frozen=True, slots=True)
class _Sockets:
    nft: NftSocket
    route: RouteSocket
    events: Notifications
    route_events: Notifications


@dataclass(frozen=True, slots=True, kw_only=True)
class NetnsFacts:
    """Facts of a namespace: whether it has IPv6, and its addresses without loopback and link-local ones.

    Also whether lo is up, and whether it then has 127.0.0.1 and ::1.
    """

    ipv6: bool
    addresses: tuple[str, ...]
    loopback4: bool
    loopback6: bool
    up: bool = True


class PodNetns:
    """A namespace and its sockets. Not for two threads at once, but that notifications are taken by the event loop."""

    def __init__(self, netns: Netns) -> None:
        self.netns = netns
        self._opened: _Sockets | None = None
        self._diag: SockDiag | None = None
        self._facts: tuple[NotificationMark, NetnsFacts] | None = None
        self._wiring: tuple[NotificationMark, PodTopology] | None = None

    @property
    def nft(self) -> NftSocket:
        return self._sockets.nft

    @property
    def route(self) -> RouteSocket:
        return self._sockets.route

    @property
    def events(self) -> Notifications:
        """The socket that receives each new generation of nf_tables in this namespace."""
        return self._sockets.events

    @property
    def route_events(self) -> Notifications:
        """Changes of links, addresses, routes and policy rules in this namespace, also of families it lacks.

        Membership in the groups of IPv6 is kept where there is no IPv6: it asks IPv6 for nothing, and is how we
        learn that the namespace gets it.
        """
        return self._sockets.route_events

    @property
    def diag(self) -> SockDiag:
        """Returns the socket for sock_diag, opened at its first use: not every namespace needs one."""
        if self._diag is None:
            self._diag = self.netns.call(SockDiag)
        return self._diag

    def addresses(self) -> tuple[str, ...]:
        """Returns every address in the namespace but loopback and link-local ones, without prefix lengths."""
        return self.facts().addresses

    def has_ipv6(self) -> bool:
        """True if this namespace has IPv6 and lo may use it."""
        return self.facts().ipv6

    def facts(self) -> NetnsFacts:
        """Returns the last read while no notification says otherwise."""
        if self._facts is not None and self.route_events.unchanged_since(self._facts[0]):
            return self._facts[1]
        mark = self.route_events.mark()
        up = self.route.lo_is_up()
        ipv6 = self.netns.call(sysctl.has_ipv6)
        facts = _facts(self.route.held_addresses(), up=up, ipv6=ipv6)
        # No notification is of disable_ipv6 itself. While lo is up, setting it takes ::1 away and clearing it brings
        # ::1 back, which is notified. Where that cannot be seen the answer does not last.
        self._facts = (mark, facts) if up and facts.loopback6 == ipv6 else None
        return facts

    def wiring(self) -> PodTopology:
        """Returns interfaces, addresses and routes, as last read while no notification says otherwise.

        Forwarding is switched on without a notification, and so may be seen late: as a rule before there are links.
        """
        if self._wiring is not None and self.route_events.unchanged_since(self._wiring[0]):
            return self._wiring[1]
        mark = self.route_events.mark()
        ipv6 = self.has_ipv6()
        links = self.route.links()
        held = [tuple(self.route.main_routes(family)) for family in ((4, 6) if ipv6 else (4,))]
        addresses = tuple(one.address for one in self.route.held_addresses())
        forwards = len(links) > 1 and self.netns.call(_forwards)
        cut = any(len(routes) == MOST_ROUTES for routes in held)
        elsewhere = cut or any(rule.elsewhere for rule in self.route.rules(ipv6=ipv6))
        topology = PodTopology(
            links,
            addresses=addresses,
            routes=sum(held, ()),
            forwards=forwards,
            loopback4=self.facts().loopback4,
            elsewhere=elsewhere,
        )
        self._wiring = (mark, topology)
        return topology

    def close(self) -> None:
        opened = self._opened
        self._opened = None
        self._facts = None
        self._wiring = None
        if self._diag is not None:
            self._diag.close()
            self._diag = None
        if opened is not None:
            for one in (opened.nft, opened.route, opened.events, opened.route_events):
                one.close()
        self.netns.close()

    @property
    def _sockets(self) -> _Sockets:
        if self._opened is None:
            self._opened = self.netns.call(_open)
        return self._opened


def _open() -> _Sockets:
    with contextlib.ExitStack() as undo:
        nft = undo.enter_context(contextlib.closing(NftSocket()))
        route = undo.enter_context(contextlib.closing(RouteSocket()))
        # Of the datagrams of a transaction, one for each object, the last one is enough.
        rules_only = type_filter(NEWGEN)
        events = undo.enter_context(
            contextlib.closing(Notifications(NETLINK_NETFILTER, [GROUP_NFTABLES], only=rules_only))
        )
        route_events = Notifications(socket.NETLINK_ROUTE, GROUPS)
        undo.pop_all()
    return _Sockets(nft, route, events, route_events)


def _forwards() -> bool:
    return any(sysctl.read(f"net/{switch}") for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"))


def _facts(held: tuple[Address, ...], *, up: bool, ipv6: bool) -> NetnsFacts:
    lo = {str(one.address) for one in held if one.index == LOOPBACK_INDEX} if up else set()
    others = (one.address for one in held if not one.address.is_loopback and not one.address.is_link_local)
    return NetnsFacts(
        ipv6=ipv6,
        addresses=tuple(str(one) for one in others),
        loopback4="127.0.0.1" in lo,
        loopback6="::1" in lo,
        up=up,
    )
