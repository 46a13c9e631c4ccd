# SPDX-License-Identifier: Apache-2.0
"""Derives a connection's payload, how it ended and which end closed it from its last counts. Pure.

At the end the kernel reports the counts, but neither the reason nor whether the peer's FIN is among the bytes received.
This is inferred here; each function documents its doubts.
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
    """Returns the acknowledged payload: exact, except for packets that the pod's own queueing dropped (one byte more).

    Sent bytes need not have arrived, acknowledged ones may include a FIN: the smaller count is the payload.
    """
    return max(0, min(info.acked - active, info.unique))


def finished(info: TcpInfo, active: bool) -> bool:
    """Returns True if the local FIN was acknowledged: an orderly end from this side."""
    return info.beyond > active


def was_established(report: TcpReport, active: bool) -> bool:
    if report.disconnected:
        return report.unacked > _NEVER_CONNECTED
    return not active or report.info.acked > 0


def fin_received(report: TcpReport, last: TcpState | None, waiting: TcpState | None, active: bool) -> bool | None:
    """Returns whether the peer's FIN counts in `received`; None if the counts do not show it.

    `last` is the state in the last dump before the end, `waiting` that of the timer afterwards. An application that
    closes before the peer does never reads the peer's FIN: it is unread, or has not arrived before the end.
    """
    info = report.info
    if not info.data_in or last in _FIN_SEEN or (report.unread == 1 and info.received):
        return info.received > 0
    if waiting is TcpState.FIN_WAIT2 or not finished(info, active):
        return False
    return None


def received(report: TcpReport, fin: bool | None, mirror: TcpInfo | None) -> int:
    """Returns the payload received in order. `mirror` are the counts of the other end, if it is in the same namespace.

    Without a mirror, and where the counts do not show it, a FIN is assumed to be among them. That is wrong if the
    application closed first, the peer sent a separate ACK, and its FIN came after the end and before the next dump.
    """
    count = report.info.received
    if mirror is not None and mirror.unique in (count, count - 1):
        return mirror.unique
    return max(0, count - (fin is not False))


def outcome(
    report: TcpReport, established: bool, active: bool, first: Closer, *, reset: bool = False
) -> tuple[How, Closer]:
    """Returns how the connection ended and which end closed it.

    `first` is the end that sent the first FIN, if any. `reset`: the other end is known to have reset the connection. An
    end by ss --kill looks like a reset by the peer, and so does a reset by a remote process that had read everything
    (SO_LINGER 0).
    """
    info = report.info
    if report.disconnected:
        return (How.RESET, Closer.LOCAL) if established else (How.UNKNOWN, Closer.NONE)
    if not established:
        return (How.REFUSED, Closer.REMOTE) if info.segments_in else (How.UNKNOWN, Closer.NONE)
    if finished(info, active) and not reset:
        return How.FIN, first
    if report.unread > 1 and not reset:
        return How.RESET, Closer.LOCAL
    if max(info.retransmits, info.probes) >= _PERSISTENT:
        return How.TIMEOUT, Closer.NONE
    return How.RESET, Closer.REMOTE


def first_fin(last: TcpState | None, own: bool, other: bool | None, looked: bool) -> Closer:
    """Returns which end sent the first FIN: the one that left a TIME_WAIT timer.

    `own` and `other` are True for an end with such a timer, `other` None if that end is elsewhere; `looked` is True if
    there was a dump since the end. `last` is the state in the last dump before the end.
    """
    if own or last in _FIN_SENT:
        return Closer.LOCAL
    if other or last in _FIN_SEEN or (looked and other is None):
        return Closer.REMOTE
    return Closer.NONE


def begun(report: TcpReport, closed: float) -> float:
    """Returns a time (seconds since the epoch) at which a connection existed of which no dump saw the beginning.

    Derived from the ages of its last packets, so never before its beginning; `closed` itself without packets.
    """
    info = report.info
    if not info.segments_in:
        return closed
    return closed - max(info.age_sent, info.age_received, info.age_acked) / 1000
