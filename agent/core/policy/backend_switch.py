# SPDX-License-Identifier: Apache-2.0
"""A change between capture by translation (NAT) and by socket (eBPF) in a pod that keeps its connections. Pure.

A translated connection is lost once translation stops: conntrack knows where its packets go, but translates them only
while some chain of NAT exists (Redirect.draining). A connection captured by its sockets needs nothing; but conntrack
has not seen it, takes it for new in mid-stream, and the rules would redirect it (Redirect.preserve).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from agent.core import names
from agent.core.model.preexisting import Select, report
from agent.core.model.sockets import CAPTURE_PORTS, CONNECTED, OPENING, TcpSocket, in_order, taken

_REDIRECTED: Final = CAPTURE_PORTS - {names.HBONE_PORT}


def proxied(sockets: Iterable[TcpSocket]) -> tuple[TcpSocket, ...]:
    """Returns both ends of what was redirected to ztunnel, and of what it says to the application in a client's name.

    By rules and by sockets alike. Not ztunnel's own connections with others: it keeps those for long.
    """
    ends = [one for one in sockets if one.state in CONNECTED]
    served = {one.remote for one in ends if one.local[1] in _REDIRECTED}
    of_ztunnel = {pair for one in ends if one.of_ztunnel for pair in ((one.local, one.remote), (one.remote, one.local))}
    pairs = {(one.remote, one.local) for one in ends}
    return in_order(
        one
        for one in ends
        if one.local[1] in _REDIRECTED
        or one.local in served
        or ((one.local, one.remote) in of_ztunnel and (one.local, one.remote) in pairs)
    )


def translated(sockets: Sequence[TcpSocket]) -> tuple[TcpSocket, ...]:
    """Returns connections that rules have proxied, and handshakes: their first packet may have met the rules."""
    opening = (one for one in sockets if one.state in OPENING and not one.of_ztunnel and one.with_others)
    return in_order({one.cookie: one for one in (*proxied(sockets), *opening)}.values())


def unknown(sockets: Sequence[TcpSocket]) -> tuple[TcpSocket, ...]:
    """Returns what conntrack may see in mid-stream: all connections with other endpoints, opened by either side.

    Not the pod's connections with itself, nor those of other ztunnels with ours, which no rule touches.
    """
    here = taken(sockets)
    return in_order(
        one
        for one in sockets
        if one.state in CONNECTED and one.cookie not in here and one.with_others and one.local[1] != names.HBONE_PORT
    )


def carried(*, by_socket: bool) -> Select:
    """Returns those that a change to capture by socket (or else by translation) has to think of."""
    return translated if by_socket else unknown


def summary(connections: Sequence[TcpSocket], backend: str) -> str:
    """Returns one line for people, "" for none, after a change to `backend`."""
    of_pod = [one for one in connections if not one.of_ztunnel and one.local[1] not in CAPTURE_PORTS]
    return report(of_pod or connections, f"the change to {backend}", "carried on as before")
