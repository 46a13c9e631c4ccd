# SPDX-License-Identifier: Apache-2.0
"""Decides from accept queues whether ztunnel has stalled: it listens in a pod, and does not accept connections. Pure.

The kernel completes handshakes for a process that hangs, so its connections look established. What waits in the queue
is the only trace, with every backend and every ztunnel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

PATIENCE: Final = 3.0  # seconds; a ztunnel that has work to do accepts within milliseconds


@dataclass(frozen=True, slots=True)
class AcceptQueue:
    """The queue of one listener, which `cookie` names; `waiting` connections are not accepted yet."""

    port: int
    cookie: int
    waiting: int


@dataclass(frozen=True, slots=True)
class QueueReading:
    """The queues of ztunnel in a pod in which connections wait, and the cookies of those connections."""

    queues: tuple[AcceptQueue, ...] = ()
    waiting: frozenset[int] = frozenset()


NOTHING_WAITS: Final = QueueReading()


@dataclass(slots=True)
class Stall:
    """Follows the queues of one pod. `since` is when the stall began, on the caller's clock; None without one."""

    since: float | None = None
    reading: QueueReading = NOTHING_WAITS
    _seen: dict[int, float] = field(default_factory=dict)  # when each waiting connection was first seen

    def observe(self, reading: QueueReading, now: float) -> None:
        """Takes the next reading.

        A stall begins when one connection has waited for PATIENCE: a queue that is never empty is no stall, as each
        connection leaves it soon. It ends when no queue is as long as before: only accepting makes one shorter, while
        waiting connections vanish also when their clients reset them.
        """
        self._seen = {cookie: self._seen.get(cookie, now) for cookie in reading.waiting}
        if self.since is None:
            oldest = min(self._seen.values(), default=now)
            self.since = oldest if now - oldest >= PATIENCE else None
        else:
            before = {queue.cookie: queue.waiting for queue in self.reading.queues}
            if not any(queue.waiting >= before.get(queue.cookie, queue.waiting + 1) for queue in reading.queues):
                self.since = None
                self._seen = {}
        self.reading = reading

    @property
    def suspected(self) -> bool:
        """True if connections wait, so the next reading should be soon."""
        return self.since is not None or bool(self._seen)

    def __str__(self) -> str:
        """Returns how many connections wait, and where."""
        waiting = [f"{queue.waiting} on port {queue.port}" for queue in self.reading.queues]
        return ", ".join(waiting)
