# SPDX-License-Identifier: Apache-2.0
"""Finds the mirror of a connection: the socket at its other end, ztunnel's if the connection is captured. Pure.

By the ends of both where they show them; by conntrack where NAT has changed a port; by what a reset leaves of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from agent.core.model.sockets import Endpoint
from agent.flows.inet_diag import ending
from agent.flows.inet_diag.flow import TrackedFlow
from agent.flows.inet_diag.pairing import TAKES_OUTBOUND, Mirrors
from agent.flows.inet_diag.verdict import ANY

Replies = Callable[[Endpoint, Endpoint], tuple[Endpoint, Endpoint] | None]
Own = Callable[[str], bool]  # True for an address of the pod


class MirrorSearch:
    """Indexes the flows of one pod. `replies` as for PodFlows."""

    def __init__(self, flows: Mapping[int, TrackedFlow], replies: Replies) -> None:
        self._flows = flows
        self._replies = replies
        self._mirrors = Mirrors()
        self._strays: dict[int, TrackedFlow] = {}  # accepted by ztunnel, while the application's socket is unknown
        # Undecided ones that were reset before any dump, by the peer's address and their port; mostly empty.
        self._lost: dict[Endpoint, list[TrackedFlow]] = {}

    @property
    def has_strays(self) -> bool:
        return bool(self._strays)

    def add(self, flow: TrackedFlow) -> None:
        self._mirrors.add(flow.cookie, flow.local, flow.remote)
        if flow.local[1] in TAKES_OUTBOUND and not flow.mirrored:
            self._strays[flow.cookie] = flow

    def drop(self, flow: TrackedFlow) -> None:
        self._mirrors.drop(flow.cookie, flow.local, flow.remote)
        self._strays.pop(flow.cookie, None)

    def begin(self, undecided: Iterable[TrackedFlow]) -> None:
        """Begins a pass over these flows."""
        self._lost = {}
        for flow in undecided:
            if flow.lost:
                self._lost.setdefault((flow.remote[0], flow.local[1]), []).append(flow)

    def found(self, mirror: TrackedFlow, flow: TrackedFlow) -> None:
        """Notes that ztunnel's `mirror` is the one of `flow`."""
        mirror.mirrored = True
        mirror.asked = "" if flow.hidden else flow.remote[0]
        self._strays.pop(mirror.cookie, None)

    def mirror(self, flow: TrackedFlow, own: Own) -> TrackedFlow | None:
        other = self._served(flow) or self._flows.get(self._mirrors.pair(flow.local, flow.remote))
        if other is None and flow.report.disconnected:
            other = self._mirror_of_disconnected(flow, own)
        return other or self._disconnected_mirror(flow, own)

    def by_conntrack(self, flow: TrackedFlow) -> TrackedFlow | None:
        """Finds the connection that ztunnel accepted with another port, or has reset: then that port is lost."""
        self._ask(flow)
        if flow.redirected is None:
            return None
        client = flow.redirected[1]
        reset = (one for one in self._strays.values() if one.lost and one.remote[0] == client[0])
        found = self._free(client) or (next(reset, None) if flow.closed else None)
        return found if found and found.accepted_by_ztunnel else None

    def stray(self, flow: TrackedFlow) -> TrackedFlow | None:
        """Finds the connection that ztunnel accepted with another port, if `flow` was reset before any dump."""
        cut = (one for one in self._strays.values() if one.closed is not None and not ending.finished(one.info, False))
        return next(cut, None) if flow.lost else None

    def _served(self, flow: TrackedFlow) -> TrackedFlow | None:
        """Returns ztunnel's socket that accepted the flow; of several with one local end only conntrack knows which."""
        if self._mirrors.sharing(flow.local) > 1:
            self._ask(flow)
            if flow.redirected:
                return self._free(flow.redirected[1])
            if flow.replies or flow.verdicts.outbound(flow.remote, flow.user):
                return None
        return self._free(flow.local)

    def _free(self, client: Endpoint) -> TrackedFlow | None:
        """Returns a socket of ztunnel's that accepted a connection from `client`, and has no mirror yet."""
        address, port = client
        for one in (self._flows[cookie] for cookie in self._mirrors.served(port)):
            # A socket that was reset may have lost its address.
            if address in (one.remote[0], *ANY) and not one.mirrored and one.accepted_by_ztunnel:
                return one
        return None

    def _ask(self, flow: TrackedFlow) -> None:
        """Asks conntrack for the flow."""
        if flow.replies is None and flow.remote[1]:
            flow.replies = self._replies(flow.local, flow.remote)
            if flow.closed is not None and not flow.redirected:
                flow.replies = None  # it may be ztunnel's next one with the same ends

    def _mirror_of_disconnected(self, flow: TrackedFlow, own: Own) -> TrackedFlow | None:
        """Finds ztunnel's socket towards an application that has reset its own: that has no remote port any more."""
        for cookie in self._mirrors.facing(flow.remote[0], flow.local[1]):
            one = self._flows[cookie]
            if not one.mirrored and one.check_owner(own):
                return one
        return None

    def _disconnected_mirror(self, flow: TrackedFlow, own: Own) -> TrackedFlow | None:
        """Finds ztunnel's socket towards an application, after ztunnel has reset it.

        Only its port and the application's address are left. It is ztunnel's: no other process in the pod uses a
        foreign source address.
        """
        if own(flow.remote[0]):
            return None
        for one in self._lost.get((flow.local[0], flow.remote[1]), ()):
            if not one.decided and not one.mirrored:
                one.owned = True
                return one
        return None
