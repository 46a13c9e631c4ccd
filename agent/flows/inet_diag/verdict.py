# SPDX-License-Identifier: Apache-2.0
"""Decides why a connection of a pod is exempt, if it is: the decisions of bpf/pod.h, in their order. Pure.

Where netfilter rules check in another order the outcome is the same, but the reason may differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from agent.core import names
from agent.core.model.exclusions import Range, within
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import Endpoint
from agent.core.model.topology import Network, PodTopology
from agent.flows.record import Reason

_LOOPBACK = ip_network("127.0.0.0/8")
_LINK_LOCAL = ip_network(names.LINK_LOCAL)
ANY = ("0.0.0.0", "::")  # a connect to these goes to loopback
_LOCALHOST = ("127.0.0.1", "::1")  # the one address that is loopback to the rules on DNS over TCP
_DNS = 53


class Verdicts:
    """Decides for one pod, while neither its Redirect nor its topology change.

    The interface of a connection is inferred from the routes of the main table, in both directions.
    """

    def __init__(self, redirect: Redirect, wiring: PodTopology) -> None:
        self.redirect = redirect
        self.wiring = wiring
        exclude = redirect.exclude
        self._own = frozenset(map(str, wiring.addresses))
        self._to, self._from = (_networks(n) for n in (exclude.outbound_networks, exclude.inbound_networks))
        self._excluded = wiring.indexes(exclude.interfaces)
        self._virtual = wiring.indexes(redirect.virtual_interfaces) - self._excluded
        self._routes = sorted(wiring.by_network().items(), key=lambda route: -route[0].prefixlen)
        self._interface = lru_cache(4096)(self._way)

    def outbound(self, remote: Endpoint, user: int = -1) -> Reason | None:
        """Decides on a connection to `remote` by that user (-1 unknown); None if it must be captured."""
        address, port = remote
        if not self._family(address):
            return Reason.FAMILY
        if reason := self._excluded_outbound(address, port, user):
            return reason
        if self._probe(address):
            return Reason.PROBE
        if port == _DNS and self.redirect.dns and self._resolver(address):
            return None
        if self.own(address):
            return Reason.LOOPBACK
        return Reason.EXCLUDED_NETWORK if _contains(_LINK_LOCAL, ip_address(address)) else None

    def inbound(self, remote: Endpoint, local: Endpoint) -> Reason | None:
        """Decides on a connection from `remote` to the pod's `local`; None if it must be captured, or is HBONE."""
        source = remote[0]
        (address, port) = local
        if self.own(source):
            return Reason.LOOPBACK
        interface = self._interface(source) if self._excluded or self._virtual else 0
        if interface in self._excluded:
            return Reason.EXCLUDED_INTERFACE
        if not self._family(address):
            return Reason.FAMILY
        exclude = self.redirect.exclude
        if interface in self._virtual:
            return _listed(address, port, self._to, exclude.outbound_ports)
        if self.redirect.ingress_only:
            return Reason.INGRESS_ONLY
        if self._probe(source):
            return Reason.PROBE
        return _listed(source, port, self._from, exclude.inbound_ports)

    def own(self, address: str) -> bool:
        """Returns True for an address to which packets never leave the pod."""
        return address in self._own or address in ANY or _is_loopback(address)

    def _family(self, address: str) -> bool:
        return self.redirect.ipv6 if ":" in address else self.redirect.ipv4

    def _probe(self, address: str) -> bool:
        return address == (self.redirect.probe_ipv6 if ":" in address else self.redirect.probe_ipv4)

    def _resolver(self, address: str) -> bool:
        return address in self.redirect.dns_to if self.redirect.dns_to else address not in _LOCALHOST

    def _excluded_outbound(self, address: str, port: int, user: int) -> Reason | None:
        exclude = self.redirect.exclude
        if self._excluded and self._interface(address) in self._excluded:
            return Reason.EXCLUDED_INTERFACE
        if user >= 0 and within(user, exclude.users):
            return Reason.EXCLUDED_USER
        return _listed(address, port, self._to, exclude.outbound_ports)

    def _way(self, address: str) -> int:
        """Returns the index of the interface that the longest prefix leads to, 0 for none."""
        parsed = ip_address(address)
        return next((index for network, index in self._routes if _contains(network, parsed)), 0)


def _listed(address: str, port: int, networks: tuple[Network, ...], ports: tuple[Range, ...]) -> Reason | None:
    if networks and any(_contains(network, ip_address(address)) for network in networks):
        return Reason.EXCLUDED_NETWORK
    return Reason.EXCLUDED_PORT if within(port, ports) else None


def _contains(network: Network, address: IPv4Address | IPv6Address) -> bool:
    return network.version == address.version and address in network


def _networks(texts: Iterable[str]) -> tuple[Network, ...]:
    return tuple(map(ip_network, texts))


@lru_cache(4096)
def _is_loopback(address: str) -> bool:
    parsed = ip_address(address)
    return parsed == ip_address("::1") if parsed.version == 6 else parsed in _LOOPBACK
