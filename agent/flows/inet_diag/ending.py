"""What a connection's last counts mean: its payload, how it ended and who ended it. Pure.

The kernel tells of the end what the counts were, and neither the reason nor whether the peer's FIN is among the bytes
received. This is concluded here; what stays doubtful is said where it is.
"""

from __future__ import annotations

from typing import Final

from agent.core.model.sockets import TcpState
from agent.core.wire.tcp_info import TcpInfo, TcpReport
from agent.flows.record import Closer, How

_FIN_SEEN: Final = (TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.CLOSING)
_FIN_SENT: Final = (TcpState.FIN_WAIT1, TcpState.FIN_WAIT2)
_PERSISTENT: Final = 3  # retransmissions or probes in a row, without an answer, that make a timeout of an end
_NEVER_CONNECTED: Final = 3  # see TcpReport: the SYN, and two that tcp_disconnect adds


def sent(info: TcpInfo, active: bool) -> int:
    """Payload that was acknowledged: exact, but for packets that the pod's own queueing dropped (one byte more).

    What was sent need not have arrived, what was acknowledged may have a FIN in it: the smaller one is the payload.
    """
    return max(0, min(info.acked - active, info.unique))


def finished(info: TcpInfo, active: bool) -> bool:
    """Our FIN was acknowledged: an orderly end from this side."""
    return info.beyond > active


def was_established(report: TcpReport, active: bool) -> bool:
    if report.disconnected:
        return report.unacked > _NEVER_CONNECTED
    return not active or report.info.acked > 0


def fin_received(report: TcpReport, last: TcpState | None, waiting: TcpState | None, active: bool) -> bool | None:
    """Whether the peer's FIN counts in `received`; None when the counts do not tell.

    `last` is the state in the last dump before the end, `waiting` that of the timer afterwards. An application that
    closes before the peer does never reads the peer's FIN, so that this is unread, or has not come before the end.
    """
    info = report.info
    if not info.data_in or last in _FIN_SEEN or (report.unread == 1 and info.received):
        return info.received > 0
    if waiting is TcpState.FIN_WAIT2 or not finished(info, active):
        return False
    return None


def received(report: TcpReport, fin: bool | None, mirror: TcpInfo | None) -> int:
    """Payload that came in order. `mirror` are the counts of the other end, where that is in the same namespace.

    Without a mirror, and where the counts do not tell, a FIN is taken to be among them: it is not when the application
    closed first, the peer acknowledged that by itself, and the peer's FIN came after the end and before the next dump.
    """
    count = report.info.received
    if mirror is not None and mirror.unique in (count, count - 1):
        return mirror.unique
    return max(0, count - (fin is not False))


def outcome(
    report: TcpReport, established: bool, active: bool, first: Closer, *, reset: bool = False
) -> tuple[How, Closer]:
    """How it ended and who began that.

    `first` is who sent the first FIN, if there was any. `reset`: the other end is known to have reset itself. ss --kill
    looks like a reset of the peer, and so does a reset by a process that had read everything (SO_LINGER 0) elsewhere.
    """
    info = report.info
    if report.disconnected:
        return (How.RESET, Closer.LOCAL) if established else (How.UNKNOWN, Closer.NOBODY)
    if not established:
        return (How.REFUSED, Closer.REMOTE) if info.segments_in else (How.UNKNOWN, Closer.NOBODY)
    if finished(info, active) and not reset:
        return How.FIN, first
    if report.unread > 1 and not reset:
        return How.RESET, Closer.LOCAL
    if max(info.retransmits, info.probes) >= _PERSISTENT:
        return How.TIMEOUT, Closer.NOBODY
    return How.RESET, Closer.REMOTE


def first_fin(last: TcpState | None, own: bool, other: bool | None, looked: bool) -> Closer:
    """Who sent the first FIN: the end of which a timer of TIME_WAIT is left.

    `own` and `other` tell whether there is one, `other` None where that end is elsewhere; `looked` whether anybody
    looked since the end. `last` is the state in the last dump before it.
    """
    if own or last in _FIN_SENT:
        return Closer.LOCAL
    if other or last in _FIN_SEEN or (looked and other is None):
        return Closer.REMOTE
    return Closer.NOBODY


def begun(report: TcpReport, closed: float) -> float:
    """A time, in seconds since the epoch, at which the connection was there: of one whose beginning nobody saw.

    From the ages of its last packets, so never before its beginning; `closed` itself when there are none.
    """
    info = report.info
    if not info.segments_in:
        return closed
    return closed - max(info.age_sent, info.age_received, info.age_acked) / 1000
