# SPDX-License-Identifier: Apache-2.0
"""Finds the sockets of one namespace that are the two ends of one connection. Pure.

REDIRECT changes the destination of packets and keeps their source. So the application's socket shows the original
destination, and ztunnel's accepted one the application's endpoint. Inbound, ztunnel connects to the application with
the client's address: there both sockets show the same two endpoints.

Only where two connections of the application share a local port, towards different peers, the kernel must translate the
port of one of them (nf_nat_used_tuple), also if the other one has ended and conntrack still knows it. Then ztunnel's
socket shows another port: a stray, which conntrack knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agent.core import names
from agent.core.model.sockets import Endpoint, TcpSocket

TAKES_OUTBOUND: Final = frozenset((names.OUTBOUND_PORT, names.DNS_PORT))


class Mirrors:
    """Indexes sockets by their ends, each with its cookie: live ones, and those that have ended recently."""

    def __init__(self, sockets: Iterable[TcpSocket] = ()) -> None:
        self._served: dict[int, tuple[int, ...]] = {}  # by the client's port that ztunnel sees
        self._pairs: dict[tuple[Endpoint, Endpoint], int] = {}
        self._facing: dict[tuple[str, int], dict[int, None]] = {}  # by local address and remote port
        self._sharing: dict[Endpoint, int] = {}  # how many sockets have that local end
        for one in sockets:
            self.add(one.cookie, one.local, one.remote)

    def add(self, cookie: int, local: Endpoint, remote: Endpoint) -> None:
        self._pairs[local, remote] = cookie
        if local[1] in TAKES_OUTBOUND:
            self._served[remote[1]] = (*self._served.get(remote[1], ()), cookie)
        else:
            self._sharing[local] = self._sharing.get(local, 0) + 1
            self._facing.setdefault((local[0], remote[1]), {})[cookie] = None

    def drop(self, cookie: int, local: Endpoint, remote: Endpoint) -> None:
        """Removes a socket; another one that has the same ends by now stays."""
        if self._pairs.get((local, remote)) == cookie:
            del self._pairs[local, remote]
        if local[1] in TAKES_OUTBOUND:
            left = tuple(one for one in self._served.get(remote[1], ()) if one != cookie)
            if left:
                self._served[remote[1]] = left
            else:
                self._served.pop(remote[1], None)
            return
        facing = self._facing.get((local[0], remote[1]), {})
        facing.pop(cookie, None)
        if not facing:
            self._facing.pop((local[0], remote[1]), None)
        if self._sharing.get(local, 0) > 1:
            self._sharing[local] -= 1
        else:
            self._sharing.pop(local, None)

    def served(self, port: int) -> tuple[int, ...]:
        """Returns ztunnel's sockets that accepted connections from that port, the oldest first."""
        return self._served.get(port, ())

    def facing(self, address: str, port: int) -> Iterable[int]:
        """Returns sockets with that local address and remote port."""
        return self._facing.get((address, port), ())

    def sharing(self, local: Endpoint) -> int:
        """Returns how many sockets other than ztunnel's have that local end."""
        return self._sharing.get(local, 0)

    def pair(self, local: Endpoint, remote: Endpoint) -> int:
        """Returns the socket at the other end, in the same namespace and without translation; 0 for none."""
        return self._pairs.get((remote, local), 0)
