# SPDX-License-Identifier: Apache-2.0
"""A stall is one connection that waits too long; its end is a queue that became shorter."""

from __future__ import annotations

from collections.abc import Collection

from agent.core.policy.accept_queue import NOTHING_WAITS, PATIENCE, AcceptQueue, QueueReading, Stall

LISTENER, OTHER = 7, 8


def reading(waiting: Collection[int], *, more: int = 0, listener: int = LISTENER) -> QueueReading:
    """Connections that wait, and `more` in the queue that their clients have reset."""
    queue = AcceptQueue(15001, listener, len(waiting) + more)
    return QueueReading((queue,) if queue.waiting else (), frozenset(waiting))


def after(*readings: QueueReading, step: float = PATIENCE / 2) -> Stall:
    """The stall after readings at an interval, the first at 100."""
    one = Stall()
    for number, each in enumerate(readings):
        one.observe(each, 100 + number * step)
    return one


def test_nothing_waits() -> None:
    one = after(*[NOTHING_WAITS] * 9)
    assert (one.since, one.suspected) == (None, False)


def test_one_connection_that_waits_is_suspected_then_a_stall_since_it_was_seen() -> None:
    assert (after(reading({1})).since, after(reading({1})).suspected) == (None, True)
    assert after(reading({1}), reading({1, 2})).since is None
    assert after(reading({1}), reading({1, 2}), reading({1, 2})).since == 100


def test_a_queue_that_is_never_empty_is_no_stall() -> None:
    """Busy, and as long or longer at each reading: but its connections are others."""
    assert after(*(reading(range(10 * step, 10 * step + 3 + step)) for step in range(9))).since is None


def test_a_stall_lasts_while_clients_give_up() -> None:
    """Those that were reset are not to be seen any more, and still in the queue."""
    begun = [reading({1, 2})] * 3
    assert after(*begun, reading({2}, more=1), reading((), more=2), reading((), more=2)).since == 100
    assert after(*begun, reading((), more=2), reading({3}, more=2), reading((), more=3)).since == 100


def test_it_ends_when_ztunnel_accepts() -> None:
    begun = [reading({1, 2})] * 3
    assert after(*begun, reading({2})).since is None  # it has begun to
    assert after(*begun, NOTHING_WAITS).since is None
    assert not after(*begun, NOTHING_WAITS).suspected
    # Another listener, of a ztunnel that took its place.
    assert after(*begun, reading({5, 6}, listener=OTHER)).since is None


def test_it_lasts_while_one_listener_of_two_stalls() -> None:
    def both(busy: Collection[int]) -> QueueReading:
        queues = AcceptQueue(15001, LISTENER, 1), AcceptQueue(15006, OTHER, len(busy))
        return QueueReading(queues, frozenset({1, *busy}))

    assert after(both({2, 3}), both({4, 5}), both({6}), both({7})).since == 100


def test_after_its_end_patience_begins_anew() -> None:
    begun = [reading({1, 2, 3})] * 3
    assert after(*begun, reading({2, 3}), reading({2, 3})).since is None
    assert after(*begun, *[reading({2, 3})] * 4).since == 100 + 4 * PATIENCE / 2


def test_where_they_wait_is_said() -> None:
    queues = AcceptQueue(15001, LISTENER, 3), AcceptQueue(15006, OTHER, 1)
    assert str(after(QueueReading(queues, frozenset({1})))) == "3 on port 15001, 1 on port 15006"
