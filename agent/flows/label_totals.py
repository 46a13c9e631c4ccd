# SPDX-License-Identifier: Apache-2.0
"""The totals of connections by label sets, bounded in number. Pure: the clock is an argument.

A connection is counted once, when it is opened or has failed to. Nothing here grows with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Generic, NamedTuple, TypeVar

from agent.core.model.pods import Pod
from agent.flows import labels
from agent.flows.identity import Identities, Service, Workload, pod_workload
from agent.flows.record import DURATION_BOUNDS, RTT_BOUNDS, Delta, Direction, Fate, Quality, Reason

# Not traffic of the pod with a peer: only its fate is counted.
_WITHIN = frozenset((Reason.LOOPBACK, Reason.ZTUNNEL))

_REST = labels.OVERFLOW
_PART, _LEAST = 4, 64  # one workload may have a quarter of the rows, but at least 64

_Peers = tuple[Direction, Workload | None, Workload | None, Service | None]
_Owner = tuple[str, str, Direction]  # namespace and workload of the pod
_Fates = tuple[str, str, Direction, Fate, Reason]


class TrafficTotals(NamedTuple):
    """One label set of istio_tcp_*: `labels` is what labels.traffic() wrote. Bytes of payload.

    `sent` is in the direction of responses, destination to source, and `received` in that of requests, at both ends:
    istio.io/docs/reference/config/metrics ("total bytes sent during response"), github.com/istio/istio/issues/32399;
    ztunnel counts upstream-to-downstream as sent at both ends (src/copy.rs) and turns it back for its log.
    """

    labels: str
    opened: int
    closed: int
    failed: int
    sent: int
    received: int


class Fated(NamedTuple):
    """`socket` is the latest one's cookie, 0 if unknown, and `at` when it was counted, in seconds since the epoch."""

    labels: str
    connections: int
    socket: int
    at: float


class Measured(NamedTuple):
    """Counts by bucket are not cumulative, one more than there are bounds; sums in seconds."""

    labels: str
    rtt: tuple[int, ...]
    rtt_sum: float
    duration: tuple[int, ...]
    duration_sum: float
    retransmitted: int


class Snapshot(NamedTuple):
    """All totals at one moment. `overflow`: how often there was no room for a label set, by kind."""

    traffic: list[TrafficTotals]
    fates: list[Fated]
    measured: list[Measured]
    overflow: dict[str, int]


@dataclass(slots=True)
class _TrafficRow:
    labels: str
    _: KW_ONLY
    seen: float = 0.0
    opened: int = 0
    closed: int = 0
    failed: int = 0
    sent: int = 0
    received: int = 0

    def add(self, delta: Delta) -> None:
        self.opened += delta.opened
        self.closed += delta.closed
        self.failed += delta.failed
        outbound = delta.direction is Direction.OUTBOUND  # so the pod sends the request
        self.sent += delta.received if outbound else delta.sent
        self.received += delta.sent if outbound else delta.received

    def frozen(self) -> TrafficTotals:
        return TrafficTotals(
            labels=self.labels,
            opened=self.opened,
            closed=self.closed,
            failed=self.failed,
            sent=self.sent,
            received=self.received,
        )


@dataclass(slots=True)
class _FatedRow:
    labels: str
    _: KW_ONLY
    seen: float = 0.0
    count: int = 0
    socket: int = 0
    at: float = 0.0

    def frozen(self) -> Fated:
        return Fated(self.labels, self.count, self.socket, self.at)


@dataclass(slots=True)
class _MeasuredRow:
    labels: str
    _: KW_ONLY
    seen: float = 0.0
    rtt: list[int] = field(default_factory=lambda: [0] * (len(RTT_BOUNDS) + 1))
    rtt_sum: float = 0.0
    duration: list[int] = field(default_factory=lambda: [0] * (len(DURATION_BOUNDS) + 1))
    duration_sum: float = 0.0
    retransmitted: int = 0

    def add(self, quality: Quality) -> None:
        self.rtt = [a + b for a, b in zip(self.rtt, quality.rtt, strict=True)]
        self.duration = [a + b for a, b in zip(self.duration, quality.duration, strict=True)]
        self.rtt_sum += quality.rtt_sum
        self.duration_sum += quality.duration_sum
        self.retransmitted += quality.retransmitted

    def frozen(self) -> Measured:
        return Measured(
            labels=self.labels,
            rtt=tuple(self.rtt),
            rtt_sum=self.rtt_sum,
            duration=tuple(self.duration),
            duration_sum=self.duration_sum,
            retransmitted=self.retransmitted,
        )


_Key = TypeVar("_Key")
_Row = TypeVar("_Row", _TrafficRow, _FatedRow, _MeasuredRow)


class _Rows(Generic[_Key, _Row]):
    """Keeps at most `cap` rows, and one more per `rest(key)`, which takes the excess.

    With `owned`, each owner has a share of the rows, and its excess is added to the row of `owned(key)`.

    Rows are kept by their label text, which must be unique; `_known` only spares writing it again.
    """

    def __init__(
        self,
        cap: int,
        make: Callable[[str], _Row],
        text: Callable[[_Key], str],
        *,
        rest: Callable[[_Key], _Key],
        owned: Callable[[_Key], _Key] | None = None,
    ) -> None:
        self._cap = cap
        self._text = text
        self._rest = rest
        self._owned = owned
        self._share = max(_LEAST, cap // _PART)
        self._make: Callable[[str], _Row] = make
        self._taken: dict[_Key, set[str]] = {}  # owned(key) -> that owner's rows
        self._rows: dict[str, _Row] = {}
        self._known: dict[_Key, _Row] = {}
        self.overflow = 0

    def of(self, key: _Key, now: float) -> _Row:
        row = self._known.get(key) or self._find(key)
        row.seen = now
        return row

    def _find(self, key: _Key) -> _Row:
        mine = None if self._owned is None else self._taken.setdefault(self._owned(key), set())
        if full := len(self._rows) >= self._cap or (mine is not None and len(mine) >= self._share):
            self.overflow += 1
            key = self._rest(key) if self._owned is None or len(self._rows) >= self._cap else self._owned(key)
            if known := self._known.get(key):
                return known
        text = self._text(key)
        row = self._rows.setdefault(text, self._make(text))
        if mine is not None and not full:
            mine.add(text)
        if len(self._known) < 2 * self._cap:
            self._known[key] = row
        return row

    def expire(self, limit: float) -> None:
        gone = [text for text, row in self._rows.items() if row.seen < limit]
        for text in gone:
            del self._rows[text]
        if gone:
            self._taken = {owner: left for owner, held in self._taken.items() if (left := held & self._rows.keys())}
            self._known = {key: row for key, row in self._known.items() if row.seen >= limit}

    def all(self) -> Iterable[_Row]:
        return self._rows.values()


class LabelTotals:
    """Totals by label set.

    `cap` bounds the rows of each of the three kinds; traffic and quality expire `ttl` seconds after their last change.
    Fates never expire, so their sums cover all connections ever: there are as many as pods had workloads, and beyond
    the cap they lose the workload, not the fate.
    """

    def __init__(self, identities: Identities, cap: int = 5000, ttl: float = 900.0) -> None:
        self._identities = identities
        self._ttl = ttl
        self._traffic: _Rows[_Peers, _TrafficRow] = _Rows(
            cap,
            _TrafficRow,
            lambda key: labels.traffic(*key, identities.trust_domain),
            rest=lambda key: (key[0], *labels.REST),
            owned=lambda key: (*key[:2], *labels.REST[1:]),
        )
        self._fates: _Rows[_Fates, _FatedRow] = _Rows(
            cap, _FatedRow, lambda key: labels.fated(*key), rest=lambda key: (_REST, _REST, *key[2:])
        )
        self._measured: _Rows[_Owner, _MeasuredRow] = _Rows(
            cap, _MeasuredRow, lambda key: labels.owner(*key), rest=lambda key: (_REST, _REST, key[2])
        )

    def add(
        self,
        deltas: Iterable[Delta],
        qualities: Iterable[Quality],
        identify: Callable[[int], Pod | None],
        now: float,
    ) -> None:
        """Adds counts. `identify` finds the pod by the cookie of its netns; `now` is in seconds since the epoch."""
        known: dict[int, tuple[Workload | None, tuple[str, ...]]] = {}

        def pod_of(cookie: int) -> tuple[Workload | None, tuple[str, ...]]:
            if cookie not in known:
                pod = identify(cookie)
                known[cookie] = (pod_workload(pod, self._identities.cluster), pod.addresses) if pod else (None, ())
            return known[cookie]

        for delta in deltas:
            workload, addresses = pod_of(delta.pod)
            self._add_fate(delta, workload, now)
            if delta.reason not in _WITHIN:
                self._traffic.of(self._peers(delta, workload, addresses), now).add(delta)
        for quality in qualities:
            self._measured.of((*_names(pod_of(quality.pod)[0]), quality.direction), now).add(quality)
        self._traffic.expire(now - self._ttl)
        self._measured.expire(now - self._ttl)

    def _add_fate(self, delta: Delta, workload: Workload | None, now: float) -> None:
        count = delta.opened + delta.failed
        if not count:
            return
        row = self._fates.of((*_names(workload), delta.direction, delta.fate, delta.reason), now)
        row.count += count
        if delta.socket:
            row.socket = delta.socket
            row.at = now

    def _peers(self, delta: Delta, workload: Workload | None, addresses: tuple[str, ...]) -> _Peers:
        where = (delta.remote,) if delta.direction is Direction.OUTBOUND else addresses
        services = (self._identities.service(address, delta.port) for address in where)
        return delta.direction, workload, self._identities.workload(delta.remote), next(filter(None, services), None)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            traffic=[row.frozen() for row in self._traffic.all()],
            fates=[row.frozen() for row in self._fates.all()],
            measured=[row.frozen() for row in self._measured.all()],
            overflow={
                "traffic": self._traffic.overflow,
                "fate": self._fates.overflow,
                "quality": self._measured.overflow,
            },
        )


def _names(workload: Workload | None) -> tuple[str, str]:
    return (workload.namespace, workload.name) if workload else ("", "")
