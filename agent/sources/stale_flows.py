"""Entries in a pod's conntrack whose TCP connection has ended unseen, and their removal.

Without rules that need it the kernel does not call conntrack in a namespace (nf_ct_netns_put). Entries stay, and do not
see their connections end. When rules come again, such an entry lasts for days. A SYN from the same ports then belongs
to it, so no rule of NAT is asked: an application's SYN that meets an entry of ztunnel's escapes, and ztunnel's SYN that
meets an entry of an application's is redirected to ztunnel.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from agent.core.errors import KernelError
from agent.core.model.sockets import CARRYING, CONNECTED, Endpoint, TcpState
from agent.kernel import sysctl
from agent.kernel.netlink.conntrack import Conntrack, TcpFlow
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.pod_netns import PodNetns

log = logging.getLogger("sluice.conntrack")
PATIENCE: Final = 60.0  # seconds in which connections that were half closed are awaited
_HALF_CLOSED: Final = CARRYING - {TcpState.ESTABLISHED}
_COUNT: Final = "net/netfilter/nf_conntrack_count"
Sockets = Mapping[tuple[Endpoint, Endpoint], TcpState]


@dataclass(frozen=True, slots=True)
class _HalfClosed:
    """Entries, by number, that may have missed the first FIN, until a monotonic time."""

    numbers: frozenset[int]
    until: float


class StaleFlows:
    """Blocking; never fails: the rules are in place without it."""

    def __init__(self) -> None:
        self._half_closed: WeakKeyDictionary[PodNetns, _HalfClosed] = WeakKeyDictionary()

    def forget(self, target: PodNetns, *, changed: bool) -> bool:
        """Call it when the rules are in place; `changed` if they were not. True when it has to be called again soon."""
        awaited = self._half_closed.pop(target, None)
        if not changed and awaited is None:
            return False
        try:
            addresses = frozenset(target.addresses())
            left = target.netns.call(lambda: _forget(addresses))
        except KernelError as error:
            log.warning("conntrack entries of ended connections stay, new ones may join them: %s", error)
            return False
        if awaited is not None and not changed:
            left &= awaited.numbers
        until = time.monotonic() + PATIENCE if changed or awaited is None else awaited.until
        if left and time.monotonic() < until:
            self._half_closed[target] = _HalfClosed(left, until)
        return target in self._half_closed


def _forget(addresses: frozenset[str]) -> frozenset[int]:
    """In the current namespace, which has these addresses: deletes stale entries, and returns those half closed."""
    if not sysctl.read(_COUNT):
        return frozenset()
    half_closed = set()
    with contextlib.closing(Conntrack()) as conntrack, contextlib.closing(SockDiag()) as diag:
        flows = list(conntrack.open_flows())  # before the sockets: what opens in between is not among them
        sockets = {(one.local, one.remote): one.state for one in diag.both(CONNECTED)} if flows else {}
        for flow in flows:
            states = _states(flow, sockets)
            if states & _HALF_CLOSED:
                half_closed.add(flow.number)
            if not states and _is_of(flow, addresses) and not _is_open(flow, diag):
                conntrack.delete(flow)
    return frozenset(half_closed)


def _is_of(flow: TcpFlow, addresses: frozenset[str]) -> bool:
    """Whether an end of the flow is a socket here. Others are forwarded, to a virtual machine for example."""
    return flow.asking[0][0] in addresses or flow.answering[0][0] in addresses


def _states(flow: TcpFlow, sockets: Sockets) -> frozenset[TcpState]:
    """Of the sockets at both ends of the flow, as far as they are here."""
    return frozenset(sockets[ends] for ends in (flow.asking, flow.answering) if ends in sockets)


def _is_open(flow: TcpFlow, diag: SockDiag) -> bool:
    """Asked of the kernel's table of connections, since a dump may miss a socket."""
    found = (diag.find(*ends) for ends in (flow.asking, flow.answering))
    return any(one is not None and one.state in CONNECTED for one in found)
