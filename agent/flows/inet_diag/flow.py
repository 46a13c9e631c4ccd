"""One socket of a pod as it is followed from dump to dump, to its end."""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.model.sockets import CAPTURE_PORTS, Endpoint, TcpState
from agent.core.wire.tcp_info import TcpInfo, TcpReport
from agent.flows.inet_diag import ending
from agent.flows.inet_diag.verdict import Verdicts
from agent.flows.record import Closer, Connection, Direction, Fate, How, Reason

_OPEN = (TcpState.ESTABLISHED, TcpState.CLOSE_WAIT)  # no FIN of ours


@dataclass(slots=True)
class TrackedFlow:
    """`report` is the latest, `state` that of the last dump it was in (None: in none), `looks` in how many it was.

    `before`: it was there before the pod's rules. `owned`: by ztunnel; `shared`: others listen on its port, too. `sent`
    and `received` are what was counted already. `decided`: fate, reason and direction are final.
    """

    cookie: int
    local: Endpoint
    remote: Endpoint
    opened: float
    verdicts: Verdicts
    before: bool
    report: TcpReport
    state: TcpState | None = None
    timer: TcpState | None = None  # of TIME_WAIT, after the end
    looks: int = 0
    looked: bool = False  # after the end
    user: int = -1
    owned: bool = False
    shared: bool = False
    mirror: int = 0
    mirrored: bool = False  # it is the mirror of another one
    decided: bool = False
    told: bool = False
    direction: Direction = Direction.OUTBOUND
    fate: Fate = Fate.UNDECIDED
    reason: Reason = Reason.NONE
    closed: float | None = None
    sent: int = 0
    received: int = 0
    last: TcpInfo | None = None  # the counts of the last dump, should the end not tell

    @property
    def info(self) -> TcpInfo:
        """Of a socket that has disconnected itself those of the last dump."""
        return self.last if self.report.disconnected and self.last is not None else self.report.info

    @property
    def lost(self) -> bool:
        """It was reset before any dump: only its port and its peer's address are left of its ends."""
        return self.report.disconnected and not self.looks

    @property
    def severed(self) -> bool:
        """Cut off before any dump showed its owner. It may be ztunnel's onward one: those end like this, too, and their
        byte counts can no longer be compared."""
        cut = self.closed is not None and not ending.finished(self.report.info, self.active)
        return cut and self.user < 0 and (self.active or self.report.disconnected)

    @property
    def active(self) -> bool:
        return self.direction is Direction.OUTBOUND

    @property
    def connected(self) -> bool | None:
        """It is surely the side that connected (True), or surely not (False)."""
        beyond = self.report.info.beyond
        if self.state is TcpState.SYN_SENT or beyond > 1:
            return True
        if self.closed is None and self.state in _OPEN and beyond >= 0:
            return beyond == 1
        return None

    @property
    def accepted_by_ztunnel(self) -> bool:
        """By its port, where nobody else listens; what an application connects from such a port is not ztunnel's."""
        return self.local[1] in CAPTURE_PORTS and self.connected is not True and (self.owned or not self.shared)

    @property
    def established(self) -> bool:
        if self.looks and self.state is not TcpState.SYN_SENT:
            return True
        if self.closed is None:
            return self.state is not TcpState.SYN_SENT
        return ending.was_established(self.report, self.active)

    @property
    def key(self) -> tuple[Direction, Fate, Reason, str, int]:
        if self.owned:
            return self.direction, Fate.EXEMPT, Reason.ZTUNNEL, "", 0
        port = self.remote[1] if self.active else self.local[1]
        return self.direction, self.fate, self.reason, self.remote[0], port

    def payload(self, mirror: TcpInfo | None = None) -> tuple[int, int]:
        """(sent, received) so far; `mirror` as for ending.received."""
        info, active = self.info, self.active
        if self.report.disconnected and mirror is not None:  # what it sent is what the other end received
            return mirror.received, ending.sent(mirror, not active)
        if self.closed is None or info is self.last:
            seen = self.state in (TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.CLOSING)
            return ending.sent(info, active), max(0, info.received - seen)
        fin = ending.fin_received(self.report, self.state, self.timer, active)
        return ending.sent(info, active), ending.received(self.report, fin, mirror)

    def connection(self, pod: int, peer: TrackedFlow | None) -> Connection:
        """As a record; `peer` is the mirror."""
        info = self.info
        ended = self.closed is not None
        established = self.established
        how = How.OPEN
        closer = Closer.NOBODY
        if ended:
            other = None if peer is None else peer.timer is not None
            first = ending.first_fin(self.state, self.timer is not None, other, self.looked)
            reset = peer is not None and peer.closed is not None and peer.report.disconnected
            how, closer = ending.outcome(self.report, established, self.active, first, reset=reset)
        sent, received = self.payload(peer.info if peer else None)
        address = peer.local if peer and peer.local[1] in CAPTURE_PORTS and peer.local != self.remote else None
        return Connection(
            pod, self.cookie, self.direction, self.fate, self.reason, self.local, self.remote, self.opened, self.closed,
            address, established, sent, received, info.segments_out, info.segments_in, info.retransmitted,
            info.rtt / 1e6 if info.rtt else None, how, closer, self.user,
        )  # fmt: skip
