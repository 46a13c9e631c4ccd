# SPDX-License-Identifier: Apache-2.0
"""Compiles intent to map entries: one pod's Redirect and its namespace's topology, as the programs read them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from agent.backends.ebpf import abi
from agent.backends.ebpf.abi import MAPPED, InterfaceRole, PodFlag, PodValue, PolicyKind, Prefix
from agent.core.model.exclusions import Range
from agent.core.model.redirect import Redirect
from agent.core.model.topology import Network, PodTopology

_ALL4, _ALL6 = ip_network("0.0.0.0/0"), ip_network("::/0")
_NETWORKS = (PolicyKind.TO, PolicyKind.FROM, PolicyKind.ROUTE)


@dataclass(frozen=True, slots=True)
class Entries:
    """The map entries of one pod, and the interfaces where its packets are watched."""

    pod: PodValue
    prefixes: tuple[Prefix, ...]
    links: tuple[int, ...]


@lru_cache(1024)  # most passes are over a pod that is as it was, and both backend and account ask
def entries(redirect: Redirect, wiring: PodTopology, cookie: int) -> Entries:
    """Compiles a pod's entries; `cookie` is the namespace's. Pods never share prefixes: each can be changed alone."""
    own4 = wiring.own(4)
    own6 = wiring.own(6)
    link6 = wiring.link_local()
    prefixes = tuple(sorted(_apart({*_prefixes(redirect, wiring, {own4, own6, link6})})))
    has = 0
    for one in prefixes:
        has |= 1 << one.kind
    pod = PodValue(
        flags=_flags(redirect, wiring),
        has=has,
        policy=policy(cookie, prefixes),
        own4=own4,
        own6=own6,
        link6=link6,
        probe4=ip_address(redirect.probe_ipv4),
        probe6=ip_address(redirect.probe_ipv6),
    )
    return Entries(pod, prefixes, tuple(sorted(link.index for link in wiring.links)))


def policy(cookie: int, prefixes: Iterable[Prefix]) -> int:
    """Returns the id of a set of prefixes: a hash, so that it identifies them. 0 for an empty set."""
    if not (texts := [one.key(0) + one.encode() for one in prefixes]):
        return 0
    digest = blake2b(abi.cookie(cookie) + b"".join(texts), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _flags(redirect: Redirect, wiring: PodTopology) -> PodFlag:
    flags = PodFlag(0)
    takes = not redirect.draining
    for flag, on in (
        (PodFlag.IPV4, redirect.ipv4 and takes),
        (PodFlag.IPV6, redirect.ipv6 and takes),
        (PodFlag.DNS, redirect.dns and takes),
        (PodFlag.INGRESS_ONLY, redirect.ingress_only),
        (PodFlag.REFUSE, redirect.refuse_non_tcp and takes),
        (PodFlag.NO_HBONE, not redirect.hbone),
        (PodFlag.FORWARDS, wiring.forwards),
        (PodFlag.LOOPBACK4, wiring.loopback4),
        (PodFlag.ETHERNET, all(link.ethernet for link in wiring.links)),
        (PodFlag.SINGLE, len(wiring.links) == 1),
    ):
        flags |= flag if on else PodFlag(0)
    return flags


def _prefixes(redirect: Redirect, wiring: PodTopology, primary: set[Any]) -> Iterator[Prefix]:
    exclude = redirect.exclude
    for address in wiring.addresses:
        if address not in primary and not address.is_loopback:
            yield Prefix(PolicyKind.OWN, abi.address(address), 128)
    for kind, networks in ((PolicyKind.TO, exclude.outbound_networks), (PolicyKind.FROM, exclude.inbound_networks)):
        for text in networks:
            yield _network(kind, ip_network(text))
    for kind, ranges, width in (
        (PolicyKind.PORT_OUT, exclude.outbound_ports, 16),
        (PolicyKind.PORT_IN, exclude.inbound_ports, 16),
        (PolicyKind.USER, exclude.users, 32),
    ):
        for one in ranges:
            yield from (_number(kind, first, bits, width) for first, bits in split(one, width))
    for text in redirect.dns_to:
        yield Prefix(PolicyKind.RESOLVER, abi.address(ip_address(text)), 128)
    excluded = wiring.indexes(exclude.interfaces)
    if excluded:
        for network, index in wiring.by_network().items():
            yield _network(PolicyKind.ROUTE, network, int(index in excluded))
    for network, index in _ways(redirect, wiring).items():
        yield _network(PolicyKind.REACH, network, int(index > 0))
    for role, indexes in (
        (InterfaceRole.VIRTUAL, wiring.indexes(redirect.virtual_interfaces) - excluded),
        (InterfaceRole.EXCLUDED, excluded),
    ):
        yield from (_number(PolicyKind.INTERFACE, index, 32, 32, role) for index in indexes)


def _ways(redirect: Redirect, wiring: PodTopology) -> dict[Network, int]:
    """Returns network -> interface, 0 for an unreachable one.

    {} if every captured family has a default route, or if the pod may have other routes than those that were read.
    """
    interfaces = wiring.by_network()
    captured = [default for default, on in ((_ALL4, redirect.ipv4), (_ALL6, redirect.ipv6)) if on]
    if wiring.elsewhere or all(interfaces.get(default) for default in captured):
        return {}
    return {_ALL4: 0, _ALL6: 0} | interfaces


def _apart(prefixes: set[Prefix]) -> set[Prefix]:
    """Keeps IPv4 out of IPv6 networks as wide as ::/0, which have ::ffff:0:0/96 in them."""
    ipv4 = abi.address(IPv4Address(0))
    wide = {one.kind for one in prefixes if one.kind in _NETWORKS and one.bits < MAPPED and not any(one.value)}
    taken = {one.kind for one in prefixes if (one.value, one.bits) == (ipv4, MAPPED)}
    return prefixes | {Prefix(kind, ipv4, MAPPED, 0) for kind in wide - taken}


def _network(kind: PolicyKind, network: Any, verdict: int = 1) -> Prefix:
    address: IPv4Address | IPv6Address = network.network_address
    return Prefix(kind, abi.address(address), network.prefixlen + (MAPPED if address.version == 4 else 0), verdict)


def _number(kind: PolicyKind, first: int, bits: int, width: int, verdict: int = 1) -> Prefix:
    """Numbers stand at the front, in network order."""
    return Prefix(kind, (first << (32 - width)).to_bytes(4, "big") + bytes(12), bits, verdict)


def split(numbers: Range, width: int) -> Iterator[tuple[int, int]]:
    """Yields a range of numbers of `width` bits as prefixes: (first, bits)."""
    first, last = numbers
    while first <= last:
        size = first & -first if first else 1 << width
        while first + size - 1 > last:
            size >>= 1
        yield first, width - size.bit_length() + 1
        first += size
