# SPDX-License-Identifier: Apache-2.0
"""Finds the sockets that ztunnel connected upstream for accepted connections, where no dump saw them. Pure.

At its end a socket shows neither mark nor process. But ztunnel relays: for each captured connection it makes one with
the same payload. So for each captured connection one socket with the same remote endpoint and the same payload is
ztunnel's, and only one: if an application imitates it, ztunnel's own socket is left over and counts instead.
"""

from __future__ import annotations

from agent.flows.inet_diag import ending
from agent.flows.inet_diag.flow import TrackedFlow
from agent.flows.inet_diag.pairing import TAKES_OUTBOUND
from agent.flows.record import Connection, How


class Onward:
    """Holds captured outbound connections that have ended and have no upstream connection yet."""

    def __init__(self) -> None:
        # By the remote address alone: a socket that was reset has lost its remote port. "" where it is hidden.
        self._ended: dict[str, dict[int, Connection]] = {}
        # Certainly ztunnel's, for a connection that has not ended yet.
        self._known: dict[str, dict[int, TrackedFlow]] = {}

    def ended(self, flow: TrackedFlow, record: Connection) -> None:
        if not flow.mirror or not flow.active:
            return
        hidden = is_hidden(flow)
        for known in list(self._known.values()) if hidden else [self._known.get(flow.remote[0], {})]:
            for cookie, one in known.items():
                if _fits(one, record, loosely=False):
                    del known[cookie]
                    return
        self._ended.setdefault("" if hidden else flow.remote[0], {})[flow.cookie] = record

    def made(self, flow: TrackedFlow) -> None:
        """Takes the end of a socket that is known to be ztunnel's."""
        if not self.claims(flow, loosely=False):
            self._known.setdefault(flow.remote[0], {})[flow.cookie] = flow

    def claims(self, flow: TrackedFlow, *, loosely: bool) -> bool:
        """Returns True if `flow`, an ended one, was made for a captured connection; each connection matches once.

        `loosely`: the last FIN need not have come, see ending.received, and the application may have closed before the
        rest of the answer came. Ask after all flows were tried without it.
        """
        for records in (self._ended.get(flow.remote[0], {}), self._ended.get("", {})):
            for cookie, record in records.items():
                if _fits(flow, record, loosely=loosely):
                    del records[cookie]
                    return True
        return False

    def adopt(self, flow: TrackedFlow, *, loosely: bool) -> bool:
        """Marks `flow` as ztunnel's if ztunnel made it for a captured connection; `loosely` as for `claims`."""
        if flow.looked:
            flow.owned = self.claims(flow, loosely=False) or (loosely and self.claims(flow, loosely=True))
            flow.mirrored = flow.owned
        return flow.owned

    def forget(self, flow: TrackedFlow) -> None:
        for table in (self._ended, self._known):
            for address in (flow.remote[0], ""):
                if (records := table.get(address)) is not None:
                    records.pop(flow.cookie, None)
                    if not records:
                        del table[address]


def is_hidden(flow: TrackedFlow) -> bool:
    """Returns True if the socket does not show the original destination: where eBPF captures, it has ztunnel's port."""
    return flow.remote[1] in TAKES_OUTBOUND


def _fits(flow: TrackedFlow, record: Connection, *, loosely: bool) -> bool:
    info = flow.report.info
    known = flow.remote[1] and record.remote[1] and record.remote[1] not in TAKES_OUTBOUND
    if known and flow.remote[1] != record.remote[1]:
        return False
    if record.how is not How.FIN or not ending.finished(info, True):
        return record.how is not How.FIN  # cut off on one side, it is cut off on the other; its counts may differ
    sent, received = flow.payload()
    return sent == record.sent and (record.received <= info.received if loosely else record.received == received)


def carried_alike(flow: TrackedFlow, accepted: TrackedFlow) -> bool:
    """Returns True if the application's socket and an accepted one have equal payload, as ends of one connection do."""
    here = flow.info
    there = accepted.info
    if accepted.remote[0] != flow.local[0] or (flow.closed is None) != (accepted.closed is None):
        return False
    if flow.closed is not None and not (ending.finished(here, True) and ending.finished(there, False)):
        return not ending.finished(here, True) and not ending.finished(there, False)
    up = there.received - ending.sent(here, True)
    down = here.received - ending.sent(there, False)
    return 0 <= up <= 1 and 0 <= down <= 1
