# SPDX-License-Identifier: Apache-2.0
"""Topology of a pod's network namespace: its interfaces, addresses and routes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Link:
    """An interface other than lo. `xdp`: the number of its XDP program, 0 for none."""

    index: int
    name: str
    _: KW_ONLY
    ethernet: bool = True
    bridge: bool = False
    up: bool = True
    xdp: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the main table; `index` is of the interface that it leads to, 0 for none."""

    network: Network
    index: int
    metric: int


@dataclass(frozen=True, slots=True)
class PodTopology:
    """Interfaces, addresses and routes of a pod.

    `addresses`: in the kernel's order. `forwards`: between interfaces other than lo. `elsewhere`: the pod may have
    other routes than `routes`, in tables to which policy rules lead, or because there are too many to read.
    """

    links: tuple[Link, ...] = ()
    _: KW_ONLY
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    forwards: bool = False
    loopback4: bool = True
    elsewhere: bool = False

    def indexes(self, names: Iterable[str]) -> frozenset[int]:
        """Returns the indexes of those interfaces that exist."""
        wanted = set(names)
        return frozenset(link.index for link in self.links if link.name in wanted)

    def own(self, version: int) -> Address | None:
        """Returns the pod's source address of one family. IPv4 may have a link-local one alone (EKS with IPv6)."""
        usable = [a for a in self.addresses if a.version == version and not a.is_loopback]
        fallback = usable[0] if usable and version == 4 else None
        return next((a for a in usable if not a.is_link_local), fallback)

    def link_local(self) -> Address | None:
        """Returns the first link-local address of IPv6."""
        return next((a for a in self.addresses if a.version == 6 and a.is_link_local), None)

    def by_network(self) -> dict[Network, int]:
        """Returns network -> interface, of the route that counts where several lead to the same one."""
        indexes: dict[Network, int] = {}
        for route in sorted(self.routes, key=lambda route: route.metric):
            indexes.setdefault(route.network, route.index)
        return indexes
