# SPDX-License-Identifier: Apache-2.0
"""The buffer of records that ended: numbers, losses, and who is told."""

from __future__ import annotations

from agent.flows.recent import Recent


def every(_: int) -> bool:
    return True


def even(number: int) -> bool:
    return number % 2 == 0


def empty(limit: int = 10) -> Recent[str, int]:
    return Recent[str, int](int, limit)


def filled(upto: int) -> Recent[str, int]:
    """Each record is its own number, as text until somebody reads it."""
    made = empty()
    for number in range(1, upto + 1):
        made.add([str(number)])
    return made


def test_the_newest_come_oldest_first() -> None:
    recent = filled(25)
    assert recent.number == 25
    assert recent.last(3, every) == [23, 24, 25]
    assert recent.last(100, every) == list(range(16, 26))
    assert recent.last(2, even) == [22, 24]
    assert recent.last(0, every) == recent.last(-1, every) == empty().last(5, every) == []


def test_since_tells_what_came_and_where_it_ends() -> None:
    recent = filled(8)
    assert recent.since(0, every, 100) == ([1, 2, 3, 4, 5, 6, 7, 8], 0, 8)
    assert recent.since(5, every, 100) == ([6, 7, 8], 0, 8)
    assert recent.since(8, every, 100) == ([], 0, 8)
    assert empty().since(0, every, 100) == ([], 0, 0)


def test_a_follower_that_comes_late_learns_how_many_it_missed() -> None:
    recent = filled(25)
    assert recent.since(15, every, 100) == (list(range(16, 26)), 0, 25)
    assert recent.since(14, every, 100) == (list(range(16, 26)), 1, 25)
    assert recent.since(3, every, 100) == (list(range(16, 26)), 12, 25)


def test_more_at_once_than_fit() -> None:
    recent = empty(4)
    recent.add([str(number) for number in range(1, 11)])
    assert recent.since(0, every, 100) == ([7, 8, 9, 10], 6, 10)


def test_bad_ones_outlive_later_good_ones_up_to_a_share_of_their_own() -> None:
    recent = Recent[str, int](int, 4, bad=lambda raw: int(raw) % 5 == 0, share=2)
    for number in range(1, 13):
        recent.add([str(number)])
    assert recent.last(100, every) == [5, 9, 10, 11, 12]
    assert recent.last(1, lambda number: number < 9) == [5]
    recent.add([str(number) for number in range(13, 33)])  # more at once than fit: of these too
    assert recent.last(100, every) == [20, 25, 29, 30, 31, 32]
    assert recent.since(0, every, 100) == ([29, 30, 31, 32], 28, 32)


def test_pages_follow_each_other_without_gap_or_repetition() -> None:
    recent, at, got = filled(10), 0, list[int]()
    for _ in range(4):
        page, lost, at = recent.since(at, even, 2)
        assert lost == 0
        got += page
    assert (got, at) == ([2, 4, 6, 8, 10], 10)
    assert recent.since(2, every, 3) == ([3, 4, 5], 0, 5)


def test_what_is_not_wanted_is_passed_by() -> None:
    assert filled(9).since(0, lambda number: False, 100) == ([], 0, 9)


def test_a_number_of_an_earlier_agent_begins_anew() -> None:
    assert filled(3).since(4711, every, 100) == ([1, 2, 3], 0, 3)
    assert filled(25).since(4711, every, 2) == ([16, 17], 0, 17)


def test_only_what_is_asked_for_is_read() -> None:
    read = list[int]()
    recent = Recent[int, int](lambda raw: read.append(raw) or raw, 10)  # type: ignore[func-returns-value]
    recent.add(range(1, 26))
    assert read == []
    recent.last(2, every)
    recent.since(22, every, 2)
    assert read == [25, 24, 23, 24]


def test_listeners_are_told_of_additions_while_they_listen() -> None:
    recent, told = empty(), list[str]()
    assert not recent.followed
    with recent.listening(lambda: told.append("one")):
        recent.add([])
        assert told == [] and recent.followed
        recent.add(["1", "2"])
        with recent.listening(lambda: told.append("two")):
            recent.add(["3"])
        recent.add(["4"])
    recent.add(["5"])
    assert told == ["one", "one", "two", "one"] and not recent.followed
