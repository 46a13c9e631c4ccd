"""Which sockets ztunnel connected onwards for what it accepted, where no dump saw them. Pure.

At its end a socket shows neither mark nor process. But for each connection that is captured ztunnel makes one of its
own, with the same payload: it relays. So for each captured connection one socket with the same remote endpoint and the
same payload is ztunnel's, and only one: should an application imitate it, ztunnel's is left over and counts instead.
"""

from __future__ import annotations

from agent.flows.inet_diag import ending
from agent.flows.inet_diag.flow import TrackedFlow
from agent.flows.inet_diag.pairing import TAKES_OUTBOUND
from agent.flows.record import Connection, How


class Onward:
    """Captured outbound connections that have ended and that nothing was found for yet."""

    def __init__(self) -> None:
        # By the remote address alone: what has reset itself has no remote port any more. "" where it is hidden.
        self._ended: dict[str, dict[int, Connection]] = {}
        self._known: dict[str, dict[int, TrackedFlow]] = {}  # what ztunnel surely made, for one that is still to end

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
        """One that is known to be ztunnel's has ended."""
        if not self.claims(flow, loosely=False):
            self._known.setdefault(flow.remote[0], {})[flow.cookie] = flow

    def claims(self, flow: TrackedFlow, *, loosely: bool) -> bool:
        """Whether `flow`, which has ended and may be ztunnel's, was made for one of them; each serves for one only.

        `loosely`: the last FIN need not have come, see ending.received, and the application may have closed before the
        rest of the answer came. To be asked after all others had their turn.
        """
        for found in (self._ended.get(flow.remote[0], {}), self._ended.get("", {})):
            for cookie, record in found.items():
                if _fits(flow, record, loosely=loosely):
                    del found[cookie]
                    return True
        return False

    def forget(self, flow: TrackedFlow) -> None:
        for table in (self._ended, self._known):
            for address in (flow.remote[0], ""):
                if (found := table.get(address)) is not None:
                    found.pop(flow.cookie, None)
                    if not found:
                        del table[address]


def is_hidden(flow: TrackedFlow) -> bool:
    """Whether its socket does not show whom the application asked for: where eBPF captures, it has ztunnel's port."""
    return flow.remote[1] in TAKES_OUTBOUND


def _fits(flow: TrackedFlow, record: Connection, *, loosely: bool) -> bool:
    info = flow.report.info
    known = flow.remote[1] and record.remote[1] and record.remote[1] not in TAKES_OUTBOUND
    if known and flow.remote[1] != record.remote[1]:
        return False
    if record.how is not How.FIN or not ending.finished(info, True):
        return record.how is not How.FIN  # what was cut off on one side was on the other, and need not be equal
    sent, received = flow.payload()
    return sent == record.sent and (record.received <= info.received if loosely else record.received == received)


def carried_alike(flow: TrackedFlow, accepted: TrackedFlow) -> bool:
    """Whether the application's socket and one that ztunnel accepted carried the same, as ends of one connection do."""
    here = flow.info
    there = accepted.info
    if accepted.remote[0] != flow.local[0] or (flow.closed is None) != (accepted.closed is None):
        return False
    if flow.closed is not None and not (ending.finished(here, True) and ending.finished(there, False)):
        return not ending.finished(here, True) and not ending.finished(there, False)
    up, down = there.received - ending.sent(here, True), here.received - ending.sent(there, False)
    return 0 <= up <= 1 and 0 <= down <= 1
