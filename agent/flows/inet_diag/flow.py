# SPDX-License-Identifier: Apache-2.0
"""One socket of a pod, tracked from dump to dump until its end."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Final

from agent.core.model.sockets import CAPTURE_PORTS, Endpoint, TcpState
from agent.core.wire.tcp_info import TcpInfo, TcpReport
from agent.flows.inet_diag import ending
from agent.flows.inet_diag.pairing import TAKES_OUTBOUND
from agent.flows.inet_diag.verdict import Verdicts
from agent.flows.record import Closer, Connection, Direction, Fate, How, Reason

_OPEN = (TcpState.ESTABLISHED, TcpState.CLOSE_WAIT)  # no FIN was sent
LOOKS: Final = 2  # dumps without a mirror after which a live connection has leaked: one dump may miss it
HOLD: Final = 2.0  # seconds for which an ended connection is held back until its other end is seen


class Stage(Enum):
    """The stages of a pass over all undecided connections: each handles what the previous one left over.

    So no connection is judged before its other end is reported. The value is the delay of a stage after the end of a
    connection, in parts of HOLD.
    """

    MIRRORS = 0.0
    CONNTRACK = 0.5  # knows what was redirected although no mirror fits: NAT has changed a port, or a reset hides it
    ONWARD = 0.75  # ztunnel's upstream connections are matched with those that it accepted
    LATE = 1.1  # the same, less exactly
    REST = 1.25


@dataclass(slots=True)
class TrackedFlow:
    """`report` is the latest, `state` that of the last dump it was in (None: in none), `looks` in how many it was.

    `preexisting`: it is older than the pod's rules. `owned`: by ztunnel; `shared`: others listen on its port, too.
    `user`: of the process that is known to hold it, and is not ztunnel; -1 until a dump has shown that.
    `replies`: source and destination of its replies, by conntrack.
    `sent` and `received` were counted already. `decided`: fate, reason and direction are final.
    """

    cookie: int
    local: Endpoint
    remote: Endpoint
    _: KW_ONLY
    opened: float
    verdicts: Verdicts
    preexisting: bool
    report: TcpReport
    state: TcpState | None = None
    timer: TcpState | None = None  # of TIME_WAIT, after the end
    looks: int = 0
    looked: bool = False  # after the end
    user: int = -1
    marked: bool = False  # in the last dump it had ztunnel's mark, but ztunnel did not hold it
    owned: bool = False
    shared: bool = False
    replies: tuple[Endpoint, Endpoint] | None = None
    mirror: int = 0
    mirrored: bool = False  # it is the mirror of another one
    asked: str = ""  # the address that its mirror, an application's socket, asked for
    decided: bool = False
    reported: bool = False  # its opening was counted
    direction: Direction = Direction.OUTBOUND
    fate: Fate = Fate.UNDECIDED
    reason: Reason = Reason.NONE
    closed: float | None = None
    sent: int = 0
    received: int = 0
    last: TcpInfo | None = None  # the counts of the last dump, in case the end does not show them

    @property
    def info(self) -> TcpInfo:
        """The counts; for a disconnected socket those of the last dump."""
        return self.last if self.report.disconnected and self.last is not None else self.report.info

    @property
    def lost(self) -> bool:
        """True if it was reset before any dump: only its port and its peer's address are left of its ends."""
        return self.report.disconnected and not self.looks

    @property
    def redirected(self) -> tuple[Endpoint, Endpoint] | None:
        """Returns ztunnel's end, and the client as ztunnel sees it, if conntrack has shown that it was redirected."""
        if self.replies is None or self.replies[0] == self.remote or self.replies[0][1] not in TAKES_OUTBOUND:
            return None
        return self.replies

    @property
    def hidden(self) -> bool:
        """True if the socket does not show the original destination: where eBPF captures, it has ztunnel's port."""
        return self.remote[1] in TAKES_OUTBOUND

    @property
    def active(self) -> bool:
        return self.direction is Direction.OUTBOUND

    @property
    def connected(self) -> bool | None:
        """True if it is certainly the side that connected, False if certainly not, None if unknown."""
        beyond = self.report.info.beyond
        if self.state is TcpState.SYN_SENT or beyond > 1:
            return True
        if self.closed is None and self.state in _OPEN and beyond >= 0:
            return beyond == 1
        return None

    @property
    def accepted_by_ztunnel(self) -> bool:
        """True by its port, unless others listen there, or an application has connected from that port."""
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
        """Returns (sent, received) so far; `mirror` as for ending.received."""
        info = self.info
        active = self.active
        if self.report.disconnected and mirror is not None:  # it sent what the other end received
            return mirror.received, ending.sent(mirror, not active)
        if self.closed is None or info is self.last:
            seen = self.state in (TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.CLOSING)
            return ending.sent(info, active), max(0, info.received - seen)
        fin = ending.fin_received(self.report, self.state, self.timer, active)
        return ending.sent(info, active), ending.received(self.report, fin, mirror)

    @property
    def awaits_mirror(self) -> bool:
        """True for a connection that may be captured, but the dumps may have missed its other end."""
        return self.closed is None and self.looks < LOOKS

    def incomplete(self, mirror: TrackedFlow | None) -> bool:
        """Returns True for an ended flow if a later dump can still show its timers, or the counts of its `mirror`."""
        if self.closed is None or self.owned:
            return False
        return not self.looked or (mirror is not None and not mirror.looked)

    def take_growth(self, mirror: TcpInfo | None) -> tuple[int, int]:
        """Returns the (sent, received) bytes since the last call, and marks the flow as reported."""
        sent, received = self.payload(mirror)
        more_sent = max(0, sent - self.sent)
        more_received = max(0, received - self.received)
        self.sent += more_sent
        self.received += more_received
        self.reported = True
        return more_sent, more_received

    def check_owner(self, own: Callable[[str], bool]) -> bool:
        """Returns True if the flow is ztunnel's, and then sets its direction; `own` knows the pod's addresses."""
        # ztunnel connects to the application with the client's address, which no process in the pod has.
        self.owned = (
            self.owned
            or self.accepted_by_ztunnel
            or (not own(self.local[0]) and own(self.remote[0]) and not self.report.disconnected)
        )
        if self.owned:
            self.direction = Direction.INBOUND if self.accepted_by_ztunnel else Direction.OUTBOUND
        return self.owned

    def inferred_direction(self, listeners: Collection[int]) -> Direction:
        """Returns the direction, from the ports of the pod's `listeners` where the socket does not show it."""
        connected = self.connected
        if connected is None:
            port = self.local[1]
            # The listener may have gone in the meantime: a client's port is usually the higher one.
            connected = port not in listeners and (port > self.remote[1] or self.report.disconnected)
        return Direction.OUTBOUND if connected else Direction.INBOUND

    def connection(self, pod: int, peer: TrackedFlow | None) -> Connection:
        """Returns the record; `peer` is the mirror."""
        info = self.info
        ended = self.closed is not None
        established = self.established
        how = How.OPEN
        closer = Closer.NONE
        if ended:
            other = None if peer is None else peer.timer is not None
            first = ending.first_fin(self.state, self.timer is not None, other, self.looked)
            reset = peer is not None and peer.closed is not None and peer.report.disconnected
            how, closer = ending.outcome(self.report, established, self.active, first, reset=reset)
        sent, received = self.payload(peer.info if peer else None)
        address = peer.local if peer and peer.local[1] in CAPTURE_PORTS and peer.local != self.remote else None
        return Connection(
            pod=pod,
            socket=self.cookie,
            direction=self.direction,
            fate=self.fate,
            reason=self.reason,
            local=self.local,
            remote=self.remote,
            opened=self.opened,
            closed=self.closed,
            peer=address,
            established=established,
            sent=sent,
            received=received,
            segments_out=info.segments_out,
            segments_in=info.segments_in,
            retransmitted=info.retransmitted,
            rtt=info.rtt / 1e6 if info.rtt else None,
            how=how,
            closer=closer,
            user=self.user,
        )
