# SPDX-License-Identifier: Apache-2.0
"""Listeners in a pod: ztunnel, others on its ports, and the application that a probe may try. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from agent.core import names
from agent.core.model.sockets import Endpoint, TcpSocket, TcpState

SOCKS_PORT: Final = 15080  # ztunnel's SOCKS5 proxy, where it is switched on
ZTUNNEL_PORTS: Final = frozenset(
    (names.OUTBOUND_PORT, names.INBOUND_PORT, names.HBONE_PORT, names.DNS_PORT, SOCKS_PORT)
)


@dataclass(frozen=True, slots=True)
class PortListeners:
    """Listeners on ztunnel's ports in a pod.

    `missing`: expected ports without a listener of ztunnel. `foreign`: lines about listeners of the pod's own
    processes; `taken`: those of them to which rules redirect traffic. `hbone` as in Redirect.
    """

    missing: tuple[int, ...] = ()
    foreign: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    hbone: bool = True


def probed(sockets: Iterable[TcpSocket], addresses: Sequence[str], *, ipv6: bool) -> Endpoint | None:
    """Returns the endpoint to probe: the application's lowest listening port, at the first address that it serves.

    `addresses` in the pod's order, the first is the one that a kubelet probes; without `ipv6` only IPv4 ones.
    None without a listener that can be reached from outside the pod.
    """
    usable = [address for address in map(ipaddress.ip_address, addresses) if ipv6 or address.version == 4]
    for one in sorted(sockets, key=lambda one: one.local[1]):
        if one.state is not TcpState.LISTEN or one.of_ztunnel or one.local[1] in ZTUNNEL_PORTS:
            continue
        for address in usable:
            if _serves(one, address):
                return str(address), one.local[1]
    return None


def _serves(one: TcpSocket, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    bound = ipaddress.ip_address(one.local[0])
    if not bound.is_unspecified:
        return bound == address
    return bound.version == address.version or (bound.version == 6 and not one.v6_only)
