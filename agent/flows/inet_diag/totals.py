# SPDX-License-Identifier: Apache-2.0
"""The totals of connections since the last reading, by peer, and their quality. Pure; forgets what it returns."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from agent.flows.record import DURATION_BOUNDS, RTT_BOUNDS, Connection, Delta, Direction, Fate, Quality, Reason

_Key = tuple[Direction, Fate, Reason, str, int]


@dataclass(slots=True, kw_only=True)
class _Tally:
    opened: int = 0
    closed: int = 0
    failed: int = 0
    sent: int = 0
    received: int = 0
    socket: int = 0


@dataclass(slots=True, kw_only=True)
class _Measures:
    rtt: list[int] = field(default_factory=lambda: [0] * (len(RTT_BOUNDS) + 1))
    duration: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BOUNDS) + 1))
    rtt_sum: float = 0.0
    duration_sum: float = 0.0
    retransmitted: int = 0
    segments_out: int = 0
    segments_in: int = 0


class Sums:
    """Keeps the totals of one pod."""

    def __init__(self, pod: int) -> None:
        self._pod = pod
        self._tallies: dict[_Key, _Tally] = {}
        self._measures: dict[Direction, _Measures] = {}

    def add(
        self,
        key: _Key,
        *,
        opened: int = 0,
        closed: int = 0,
        failed: int = 0,
        sent: int = 0,
        received: int = 0,
        socket: int = 0,
    ) -> None:
        total = self._tallies.get(key)
        if total is None:
            total = self._tallies[key] = _Tally()
        total.opened += opened
        total.closed += closed
        total.failed += failed
        total.sent += sent
        total.received += received
        if opened or failed:
            total.socket = socket

    def ended(self, one: Connection) -> None:
        """Adds the quality of a connection, if it was established; RTT only if it was measured."""
        if not one.established or one.closed is None:
            return
        measures = self._measures.setdefault(one.direction, _Measures())
        duration = max(0.0, one.closed - one.opened)
        measures.duration[bisect_left(DURATION_BOUNDS, duration)] += 1
        measures.duration_sum += duration
        if one.rtt is not None:
            measures.rtt[bisect_left(RTT_BOUNDS, one.rtt)] += 1
            measures.rtt_sum += one.rtt
        measures.retransmitted += one.retransmitted
        measures.segments_out += one.segments_out
        measures.segments_in += one.segments_in

    def take(self) -> tuple[list[Delta], list[Quality]]:
        tallies, measures = self._tallies, self._measures
        self._tallies = {}
        self._measures = {}
        deltas = [
            Delta(
                pod=self._pod,
                direction=direction,
                fate=fate,
                reason=reason,
                remote=remote,
                port=port,
                opened=one.opened,
                closed=one.closed,
                failed=one.failed,
                sent=one.sent,
                received=one.received,
                socket=one.socket,
            )
            for (direction, fate, reason, remote, port), one in tallies.items()
        ]
        return deltas, [
            Quality(
                pod=self._pod,
                direction=direction,
                rtt=tuple(one.rtt),
                rtt_sum=one.rtt_sum,
                duration=tuple(one.duration),
                duration_sum=one.duration_sum,
                retransmitted=one.retransmitted,
                segments_out=one.segments_out,
                segments_in=one.segments_in,
            )
            for direction, one in measures.items()
        ]
