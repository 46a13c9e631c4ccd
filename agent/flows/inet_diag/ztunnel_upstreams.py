# SPDX-License-Identifier: Apache-2.0
"""Finds the sockets that ztunnel connected upstream for accepted connections, where no dump saw them. Pure.

At its end a socket shows neither mark nor process. But ztunnel relays: for each connection that it accepts it makes one
with the same payload, and closes both together. So for each accepted one, one ended socket with the same payload is
ztunnel's, and only one: if an application imitates it, ztunnel's own socket is left over and stays undecided.
"""

from __future__ import annotations

from itertools import chain

from agent.flows.inet_diag import ending
from agent.flows.inet_diag.flow import TrackedFlow

_Payload = tuple[int, int]  # bytes from the application, bytes to it
_Flows = dict[_Payload, dict[int, TrackedFlow]]  # by cookie


class Onward:
    """Holds ended connections that ztunnel accepted, while their upstream connections are not known."""

    def __init__(self) -> None:
        self._accepted: _Flows = {}
        self._cut: dict[int, TrackedFlow] = {}  # accepted ones that did not end in order, by cookie
        self._known: _Flows = {}  # certainly ztunnel's, for an accepted one that has not ended yet
        self._keys: dict[int, _Payload] = {}  # by cookie: what a later dump shows may change a payload

    def accepted(self, flow: TrackedFlow) -> None:
        """Takes the end of a connection that ztunnel accepted."""
        if not _in_order(flow):
            self._cut[flow.cookie] = flow
        elif not _take(self._known, _payload(flow)):
            self._add(self._accepted, flow)

    def made(self, flow: TrackedFlow) -> None:
        """Takes the end of a socket that is known to be ztunnel's."""
        if _in_order(flow) and not self._claims(flow):
            self._add(self._known, flow)

    def adopt(self, flow: TrackedFlow, *, loosely: bool) -> bool:
        """Marks `flow`, an ended one, as ztunnel's if ztunnel made it for an accepted connection.

        `loosely`: one of both was cut off, or the application closed before the rest of the answer came. Ask after all
        flows were tried without it.
        """
        if flow.looked and flow.user < 0:
            flow.owned = flow.mirrored = self._claims(flow) or (loosely and self._claims_loosely(flow))
        return flow.owned

    def forget(self, flow: TrackedFlow) -> None:
        self._cut.pop(flow.cookie, None)
        if (payload := self._keys.pop(flow.cookie, None)) is None:
            return
        for table in (self._accepted, self._known):
            if (flows := table.get(payload)) is not None:
                flows.pop(flow.cookie, None)
                if not flows:
                    del table[payload]

    def _add(self, table: _Flows, flow: TrackedFlow) -> None:
        payload = self._keys[flow.cookie] = _payload(flow)
        table.setdefault(payload, {})[flow.cookie] = flow

    def _claims(self, flow: TrackedFlow) -> bool:
        return _in_order(flow) and _take(self._accepted, _payload(flow))

    def _claims_loosely(self, flow: TrackedFlow) -> bool:
        for one in chain(self._cut.values(), *(flows.values() for flows in self._accepted.values())):
            if _is_relayed_in_part(flow, one):
                self.forget(one)
                return True
        return False


def _take(table: _Flows, payload: _Payload) -> bool:
    if (flows := table.get(payload)) is None:
        return False
    del flows[next(iter(flows))]  # the oldest: it is forgotten first
    if not flows:
        del table[payload]
    return True


def _payload(flow: TrackedFlow) -> _Payload:
    sent, received = flow.payload()
    return (sent, received) if flow.active else (received, sent)


def _in_order(flow: TrackedFlow) -> bool:
    return ending.finished(flow.report.info, flow.active)


def _is_relayed_in_part(flow: TrackedFlow, accepted: TrackedFlow) -> bool:
    if not _in_order(flow) or not _in_order(accepted):
        return accepted.asked in ("", flow.remote[0])  # the counts may differ, so the destination must not
    # A FIN may be among the bytes received, and the end does not always show that.
    lacking = accepted.info.received - ending.sent(flow.info, True)
    return 0 <= lacking <= 1 and ending.sent(accepted.info, False) <= flow.info.received
