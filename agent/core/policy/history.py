# SPDX-License-Identifier: Apache-2.0
"""The history of a node: which events are kept, which are repetitions of one, and which a reader wants. Pure.

Events are limited in bytes. When they are too many, the oldest event goes of the pod that has most of them, in the
namespace that has most of them. So no pod pushes out the events of another. Events that every start of a pod causes
share one part; of the node's own each kind has one.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf

from agent.core.errors import SluiceError
from agent.core.model.history_event import EventKind, HistoryEvent
from agent.core.text import moment, natural, shortened

WINDOW = 300.0  # seconds from an event in which the same one is counted as its repetition
_LONGEST, _PROCESS = 600, 100  # characters of a text, and of a process
_ROUTINE = (EventKind.ENROLLED, EventKind.EXCLUDED)
# Changes of a state: their order matters, so each is an event of its own.
_CHANGES = (
    *_ROUTINE,
    EventKind.AGENT_STARTED,
    EventKind.AGENT_STOPPED,
    EventKind.BACKEND_SWITCHED,
    EventKind.ZTUNNEL_CONNECTED,
    EventKind.ZTUNNEL_DISCONNECTED,
    EventKind.STALLED,
    EventKind.RESUMED,
)
_NUMBER = re.compile(r"\d+")
Holder = tuple[str, str]  # of a part of the bytes: namespace and pod; for the node "" and the kind
Signature = tuple[str, ...]


class History:
    """Keeps events of at most `limit` bytes. `number` is that of the last change."""

    def __init__(self, limit: float = inf) -> None:
        self.number = 0
        self._limit = limit
        self._events: dict[int, HistoryEvent] = {}
        self._latest: dict[Signature, int] = {}
        self._held: dict[Holder, deque[tuple[int, int]]] = {}  # id and size of each event, the oldest first
        self._sizes: Counter[Holder] = Counter()

    def restore(self, events: Iterable[HistoryEvent]) -> None:
        """Takes the events of an earlier agent. Of several with one id the last change counts."""
        newest = dict[int, HistoryEvent]()
        for one in events:
            if one.id not in newest or one.number > newest[one.id].number:
                newest[one.id] = one
        for one in sorted(newest.values(), key=lambda one: one.id):
            self._add(one)

    def note(
        self, now: float, kind: str, text: str, *, node: str = "", namespace: str = "", pod: str = "", by: str = ""
    ) -> HistoryEvent:
        """Adds an event at `now` (seconds since the epoch) or counts a repetition; returns it as it is now.

        An event is repeated if pod, kind, process name and text are the same but for the numbers in them.
        """
        now = round(now, 3)
        one = HistoryEvent(
            self.number + 1,
            self.number + 1,
            time=now,
            last=now,
            node=node,
            namespace=namespace,
            pod=pod,
            kind=str(kind),
            text=shortened(text, _LONGEST),
            by=shortened(by, _PROCESS),
        )
        before = self._events.get(self._latest.get(_signature(one), 0))
        if before is None or kind in _CHANGES or abs(now - before.time) >= WINDOW:
            self._add(one)
            return one
        self.number += 1
        repeated = replace(before, number=self.number, count=before.count + 1, last=max(now, before.last))
        self._events[before.id] = repeated
        return repeated

    def events(self) -> list[HistoryEvent]:
        """Returns all events in the order in which they happened first."""
        return list(self._events.values())

    def _add(self, one: HistoryEvent) -> None:
        self._events[one.id] = one
        self._latest[_signature(one)] = one.id
        holder = ("routine of all", "") if one.kind in _ROUTINE else (one.namespace, one.pod or one.kind)
        size = len(one.line())
        self._held.setdefault(holder, deque()).append((one.id, size))
        self._sizes[holder] += size
        self.number = max(self.number, one.number)
        while self._sizes.total() > self._limit:
            self._drop()

    def _drop(self) -> None:
        """Drops the oldest event of the largest pod of the largest namespace."""
        namespaces = Counter[str]()
        for (namespace, _), size in self._sizes.items():
            namespaces[namespace] += size
        largest = max(namespaces, key=namespaces.__getitem__)
        holder = max((one for one in self._sizes if one[0] == largest), key=self._sizes.__getitem__)
        number, size = self._held[holder].popleft()
        self._sizes[holder] -= size
        if not self._held[holder]:
            del self._held[holder], self._sizes[holder]
        gone = self._events.pop(number)
        if self._latest.get(signature := _signature(gone)) == number:
            del self._latest[signature]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A choice of events: of `pod` (a name or namespace/name, "" for all) from `since` to `until`, in Unix time.

    An event with repetitions is chosen if any part of its time is within. `after`: only those that changed after this
    number; one that no event has reached is of a history that was lost, and counts as 0.
    """

    pod: str = ""
    since: float = -inf
    until: float = inf
    after: int = 0

    def of(self, events: Iterable[HistoryEvent]) -> list[HistoryEvent]:
        """Returns the chosen ones: in the order of their first time, or of their last change if `after` is given."""
        given = list(events)
        after = self.after if any(one.number >= self.after for one in given) else 0
        chosen = [one for one in given if one.number > after and self._chooses(one)]
        return sorted(chosen, key=lambda one: one.number if after else one.id)

    def _chooses(self, one: HistoryEvent) -> bool:
        named = self.pod in ("", one.pod, f"{one.namespace}/{one.pod}")
        return named and self.since <= one.last and one.time <= self.until


def _signature(one: HistoryEvent) -> Signature:
    return one.namespace, one.pod, one.kind, _NUMBER.sub("#", one.by), _NUMBER.sub("#", one.text)


def selection(query: Mapping[str, str], now: float) -> Selection:
    """Parses pod, since, until and after. Raises SluiceError."""
    chosen = Selection(pod=query.get("pod", ""), after=natural(query, "after"))
    times = dict[str, float]()
    for name in ("since", "until"):
        if text := query.get(name, ""):
            try:
                times[name] = moment(text, now)
            except (ValueError, OverflowError):
                raise SluiceError(
                    f"{name}: {text!r} is neither a time (2026-11-21T03:12:00Z) nor a duration (10m)"
                ) from None
    return replace(chosen, since=times.get("since", -inf), until=times.get("until", inf))
