# SPDX-License-Identifier: Apache-2.0
"""Removes entries of a pod's conntrack that have outlived their TCP connection.

Without rules that need it the kernel does not call conntrack in a namespace (nf_ct_netns_put). Entries stay, and do not
see their connections end. When rules come again, such an entry lasts for days. A SYN from the same ports then belongs
to it, so no rule of NAT is asked: an application's SYN that meets an entry of ztunnel's escapes, and ztunnel's SYN that
meets an entry of an application's is redirected to ztunnel.

An entry is stale if one of its ends that belong to this pod has no socket. The other one may still have one: without
rules an application's connection is reset, and ztunnel does not hear of that. A connection that lives on may become
stale later: conntrack has missed its first FIN, or takes a RST for false because it has missed the packets before.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from agent.core.errors import KernelError
from agent.core.model.sockets import CONNECTED, Endpoint
from agent.kernel import sysctl
from agent.kernel.netlink.ctnetlink import Conntrack
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.pod_netns import PodNetns

log = logging.getLogger("sluice.conntrack")
FIRST_PAUSE, LAST_PAUSE = 2.0, 32.0  # seconds until connections that lived through the gap are looked at again
_COUNT: Final = "net/netfilter/nf_conntrack_count"
_LOOPBACK: Final = frozenset(("127.0.0.1", "::1"))


@dataclass(frozen=True, slots=True)
class _Awaited:
    """Entries, by number, of connections that lived on; when to look next (monotonic), and the pause before that."""

    numbers: frozenset[int]
    next: float
    pause: float


class StaleFlows:
    """Blocking; never fails: the rules are in place without it."""

    def __init__(self) -> None:
        self._awaited: WeakKeyDictionary[PodNetns, _Awaited] = WeakKeyDictionary()

    def forget(self, target: PodNetns, *, changed: bool) -> bool:
        """Deletes stale flows, with the rules in place. `changed`: they were not before. True: call again soon."""
        awaited = self._awaited.pop(target, None)
        if not changed and awaited is None:
            return False
        pause = FIRST_PAUSE
        if not changed and awaited is not None:
            if time.monotonic() < awaited.next:
                self._awaited[target] = awaited
                return True
            pause = awaited.pause * 2
        try:
            addresses = _LOOPBACK | frozenset(target.addresses())
            left = target.netns.call(lambda: _forget(addresses))
        except KernelError as error:
            log.warning("conntrack entries of ended connections stay, new ones may join them: %s", error)
            return False
        if not changed and awaited is not None:
            left &= awaited.numbers
        if left and pause <= LAST_PAUSE:
            self._awaited[target] = _Awaited(left, time.monotonic() + pause, pause)
        return target in self._awaited


def _forget(addresses: frozenset[str]) -> frozenset[int]:
    """Deletes stale entries of the current namespace, which has these addresses, and returns the others."""
    if not sysctl.read(_COUNT):
        return frozenset()
    left = set()
    with contextlib.closing(Conntrack()) as conntrack, contextlib.closing(SockDiag()) as diag:
        flows = list(conntrack.open_flows())  # before the sockets: what opens in between is not among them
        sockets = {(one.local, one.remote) for one in diag.both(CONNECTED)} if flows else set()
        for flow in flows:
            # A forwarded flow, of a virtual machine for example, has no end here.
            here = [ends for ends in (flow.asking, flow.answering) if ends[0][0] in addresses]
            if any(ends not in sockets and not _is_open(ends, diag) for ends in here):
                conntrack.delete(flow)
            elif here:
                left.add(flow.number)
    return frozenset(left)


def _is_open(ends: tuple[Endpoint, Endpoint], diag: SockDiag) -> bool:
    """Asks the kernel's table of connections, since a dump may miss a socket."""
    one = diag.find(*ends)
    return one is not None and one.state in CONNECTED
