# SPDX-License-Identifier: Apache-2.0
"""Which events a history keeps, what it counts as a repetition, and what a reader gets."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import SluiceError
from agent.core.model.history_event import EventKind, HistoryEvent
from agent.core.policy.history import WINDOW, History, Selection, selection

NOW = 1_764_576_000.0
NAMES = st.sampled_from(("", "web", "db", "x"))


def note(history: History, text: str = "what", at: float = 0.0, **facts: str) -> HistoryEvent:
    return history.note(NOW + at, **{"kind": "repaired", "namespace": "shop", "pod": "web", **facts}, text=text)


def texts(history: History, **chosen: object) -> list[str]:
    return [one.text for one in Selection(**chosen).of(history.events())]  # type: ignore[arg-type]


def test_a_repetition_is_counted_whatever_numbers_are_in_it() -> None:
    history = History()
    first = note(history, "gone for 3.1 ms", by="nft[4711]")
    again = note(history, "gone for 12.0 ms", 7, by="nft[4712]")
    assert (again.id, again.number, again.count, again.last) == (first.id, 2, 2, NOW + 7)
    assert (again.text, again.by, again.time) == (first.text, first.by, first.time)
    assert history.events() == [again]


@pytest.mark.parametrize("other", [{"pod": "db"}, {"namespace": "a"}, {"kind": "leaked"}, {"by": "iptables[4711]"}])
def test_another_event_is_none(other: dict[str, str]) -> None:
    history = History()
    note(history, by="nft[4711]")
    note(history, **{"by": "nft[4711]", **other})
    assert [one.count for one in history.events()] == [1, 1]


def test_after_a_while_it_is_an_event_of_its_own() -> None:
    history = History()
    for at in (0, WINDOW - 1, WINDOW, WINDOW + 1):
        note(history, at=at)
    assert [one.count for one in history.events()] == [2, 2]


def test_the_order_of_changes_of_a_state_is_kept() -> None:
    history = History()
    wanted = [EventKind.ENROLLED, EventKind.EXCLUDED, EventKind.ENROLLED]
    for kind in wanted:
        note(history, kind=kind)
    assert [one.kind for one in history.events()] == wanted


def test_a_clock_that_was_set_back_changes_no_order() -> None:
    history = History()
    note(history, "first", 0)
    note(history, "second", -7200)
    assert texts(history) == ["first", "second"]
    assert note(history, "second", -7300).last == NOW - 7200


def words(number: int) -> str:
    """A text that is no repetition of that of another number."""
    return "".join(chr(97 + int(digit)) for digit in str(number))


def test_a_pod_with_many_events_pushes_out_its_own_alone() -> None:
    history = History(20_000)
    note(history, "of the node", pod="", namespace="", kind=EventKind.BACKEND_SWITCHED)
    note(history, "of another pod", pod="db")
    note(history, "of another namespace", namespace="a")
    for number in range(2000):
        note(history, words(number))
    left = texts(history)
    assert left[:3] == ["of the node", "of another pod", "of another namespace"]
    assert left[-1] == words(1999) and len(left) > 20
    assert sum(len(one.line()) for one in history.events()) <= 20_000
    assert len(history._latest) == len(left)  # nothing is kept of an event that is gone


def test_many_pods_of_one_namespace_push_out_none_of_another() -> None:
    history = History(20_000)
    note(history, "once", namespace="a")
    for number in range(2000):
        note(history, pod=f"web-{number}", kind=EventKind.FAILED)
    assert "once" in texts(history)


def test_pods_that_start_and_end_without_pause_push_out_nothing_else() -> None:
    history = History(20_000)
    for number in range(10):
        note(history, words(number), pod=f"p{number}")
    for number in range(2000):
        note(history, "routine", pod=f"job-{number}", namespace=f"n{number}", kind=EventKind.ENROLLED)
    assert texts(history)[:10] == list(map(words, range(10)))


def test_a_ztunnel_that_comes_and_goes_pushes_out_no_other_event_of_the_node() -> None:
    history = History(20_000)
    note(history, "switched", namespace="", pod="", kind=EventKind.BACKEND_SWITCHED)
    for _ in range(1000):
        note(history, "came", namespace="", pod="", kind=EventKind.ZTUNNEL_CONNECTED)
        note(history, "left", namespace="", pod="", kind=EventKind.ZTUNNEL_DISCONNECTED)
    assert texts(history)[0] == "switched"


def test_a_long_text_is_cut() -> None:
    assert len(note(History(), "x" * 100_000, by="y" * 5000).line()) < 2000


@given(st.lists(st.tuples(NAMES, NAMES, st.sampled_from(("repaired", "enrolled", "new")), st.text(max_size=60))))
def test_a_history_is_the_same_after_a_restart(noted: list[tuple[str, str, str, str]]) -> None:
    history = History(4000)
    for at, (namespace, pod, kind, text) in enumerate(noted):
        note(history, text, at, namespace=namespace, pod=pod, kind=kind)
    assert sum(len(one.line()) for one in history.events()) <= 4000 + 50 * len(noted)  # counts that got longer
    restored = History(8000)
    restored.restore(reversed(history.events()))
    assert restored.events() == history.events()
    assert note(restored, "next", 10_000).number > max((one.number for one in history.events()), default=0)


def test_of_several_lines_of_one_event_the_last_change_counts() -> None:
    history = History()
    first, again = note(history), note(history)
    for lines in ([first, again], [again, first]):
        restored = History()
        restored.restore(lines)
        assert restored.events() == [again]
        assert note(restored).count == 3  # a repetition also after a restart


def test_times_and_pods() -> None:
    history = History()
    note(history, "a", 0)
    note(history, "a", 100)
    note(history, "b", 50, pod="db")
    note(history, "c", 200, namespace="other")
    note(history, "d", 300, namespace="", pod="")
    assert texts(history, since=NOW + 60, until=NOW + 200) == ["a", "c"]  # the first one was repeated since then
    assert texts(history, until=NOW + 49) == ["a"]
    assert texts(history, pod="web") == ["a", "c"]
    assert texts(history, pod="shop/web") == ["a"]
    assert texts(history, pod="shop/none") == []


def test_a_follower_gets_repetitions_and_never_an_event_twice() -> None:
    history = History()
    note(history, "a")
    note(history, "b")
    assert texts(history, after=2) == []
    note(history, "a")
    assert texts(history, after=2) == ["a"]
    note(history, "c")
    assert texts(history, after=2) == ["a", "c"]
    assert texts(history, after=99) == ["a", "b", "c"]  # of a history that is lost: all are new


def test_queries() -> None:
    assert selection({}, NOW) == Selection(pod="", since=-inf, until=inf, after=0)
    asked = {"pod": "web", "since": "1h30m", "until": "2025-12-01T08:00:00Z", "after": "7"}
    assert selection(asked, NOW) == Selection(pod="web", since=NOW - 5400, until=NOW, after=7)
    for key, value in (("since", "yesterday"), ("until", "10"), ("since", "9999999d x"), ("after", "-1")):
        with pytest.raises(SluiceError, match=key):
            selection({key: value}, NOW)
