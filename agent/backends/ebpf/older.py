# SPDX-License-Identifier: Apache-2.0
"""Finds pre-existing connections: those that should be captured and are not, since they began earlier. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from ipaddress import ip_address, ip_network

from agent.core import names
from agent.core.model.exclusions import within
from agent.core.model.preexisting import candidates
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket
from agent.core.model.topology import Address, PodTopology


def older(
    redirect: Redirect, wiring: PodTopology, sockets: Sequence[TcpSocket], listening: Collection[int]
) -> tuple[TcpSocket, ...]:
    """Selects from all connections of the pod. An incoming one is known by its port, on which a process listens."""
    return tuple(one for one in candidates(sockets) if _meant(redirect, wiring, one, one.local[1] in listening))


def _meant(redirect: Redirect, wiring: PodTopology, one: TcpSocket, inbound: bool) -> bool:
    peer = ip_address(one.remote[0])
    exclude = redirect.exclude
    if not (redirect.ipv4 if peer.version == 4 else redirect.ipv6):
        return False
    if str(peer) in (redirect.probe_ipv4, redirect.probe_ipv6) or _behind(wiring, peer, exclude.interfaces):
        return False
    if inbound:
        if redirect.ingress_only or one.local[1] == names.HBONE_PORT:
            return False
        return not (within(one.local[1], exclude.inbound_ports) or _within(peer, exclude.inbound_networks))
    return not (
        within(one.remote[1], exclude.outbound_ports)
        or _within(peer, exclude.outbound_networks)
        or within(one.uid, exclude.users)
    )


def _within(address: Address, networks: Iterable[str]) -> bool:
    return any(address in ip_network(network) for network in networks)


def _behind(wiring: PodTopology, peer: Address, interfaces: Iterable[str]) -> bool:
    """True if the way there, or from there, is an excluded interface."""
    excluded = wiring.indexes(interfaces)
    if not excluded:
        return False
    ways = [(network.prefixlen, index) for network, index in wiring.by_network().items() if peer in network]
    return bool(ways) and max(ways)[1] in excluded
