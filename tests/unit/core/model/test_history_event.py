# SPDX-License-Identifier: Apache-2.0
"""Events as lines: whatever a crash or a full disk leaves of a file, whole lines are read and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.core.model.history_event import EventKind, HistoryEvent, decode

TIMES = st.integers(0, 4_000_000_000_000).map(lambda milliseconds: milliseconds / 1000)
NUMBERS = st.integers(1, 1 << 62)
EVENTS = st.builds(
    HistoryEvent, NUMBERS, NUMBERS, time=TIMES, last=TIMES, count=NUMBERS, node=st.text(), namespace=st.text(),
    pod=st.text(), kind=st.sampled_from(EventKind).map(str), text=st.text(), by=st.text(),
)  # fmt: skip
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda one: st.lists(one))


@given(st.lists(EVENTS, max_size=5))
def test_lines_are_read_as_they_were_written(events: list[HistoryEvent]) -> None:
    assert list(decode(b"".join(one.line() for one in events))) == events


@given(st.lists(EVENTS, min_size=1, max_size=5), st.data())
def test_a_torn_line_is_ignored_and_no_other(events: list[HistoryEvent], data: st.DataObject) -> None:
    whole = b"".join(one.line() for one in events)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    assert list(decode(cut)) == events[: cut.count(b"\n")]


def test_a_line_without_its_end_is_torn() -> None:
    """What is appended to it would be part of it."""
    line = HistoryEvent(1, 1, time=1.5, last=1.5, kind="repaired", text="x").line()
    assert list(decode(line[:-1])) == []


@given(st.lists(EVENTS, max_size=3), st.binary(), st.lists(EVENTS, max_size=3))
def test_garbage_between_lines_is_ignored(
    before: list[HistoryEvent], garbage: bytes, after: list[HistoryEvent]
) -> None:
    lines = [one.line() for one in before], [one.line() for one in after]
    found = list(decode(b"".join(lines[0]) + garbage + b"\n" + b"".join(lines[1])))
    assert found == before + after


@given(EVENTS, st.sampled_from(sorted(HistoryEvent.__dataclass_fields__)), JSON)
def test_a_field_of_another_type_is_no_event(event: HistoryEvent, name: str, value: Any) -> None:
    given = {**event.as_dict(), name: value}
    for one in decode(json.dumps(given).encode() + b"\n"):
        assert type(getattr(one, name)) is type(getattr(event, name))
        one.line()


def test_keys_of_a_newer_agent_are_ignored_and_a_missing_one_is_not() -> None:
    event = HistoryEvent(1, 1, time=1.5, last=1.5, kind="stalled", text="of a newer agent")
    assert list(decode(json.dumps({**event.as_dict(), "trace": 7}).encode() + b"\n")) == [event]
    given = event.as_dict()
    del given["by"]
    assert list(decode(json.dumps(given).encode() + b"\n")) == []


def test_every_kind_is_in_the_document() -> None:
    page = (Path(__file__).resolve().parents[4] / "docs" / "operate.md").read_text()
    assert [kind for kind in EventKind if f"| `{kind}` |" not in page] == []
