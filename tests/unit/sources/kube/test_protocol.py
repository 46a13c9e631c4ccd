# SPDX-License-Identifier: Apache-2.0
"""What is asked next, when, and what counts as an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.core.errors import KubeError, ProtocolError
from agent.sources.kube.protocol import (
    BusyError,
    Course,
    Lines,
    Listing,
    Pace,
    Rows,
    WatchVerb,
    event,
    refusal,
    version,
)

PACE = Pace(first=1, last=8, longest=60, watch=100, slack=10, silence=40, page=5)
GONE = KubeError("too old", 410, "Expired")
LOST = KubeError("no answer", 0)


def course(random: float = 0.0) -> Course:
    return Course(lambda: random, PACE)


def watching(random: float = 0.0) -> Course:
    found = course(random)
    found.query(0)
    assert found.page("7", "")
    return found


def test_the_first_list_is_of_the_cache_and_in_pages() -> None:
    """Pages after the first name no version; the list counts with its last one."""
    asked = course()
    assert asked.query(0) == {"limit": "5", "resourceVersion": "0"}
    assert not asked.page("7", "next") and asked.listing
    assert asked.query(0) == {"limit": "5", "continue": "next"}
    assert asked.page("7", "") and not asked.listing
    assert asked.query(0) == {
        "watch": "1", "allowWatchBookmarks": "true", "resourceVersion": "7", "timeoutSeconds": "100"
    }  # fmt: skip


def test_watches_of_all_nodes_do_not_end_together() -> None:
    """Up to a quarter longer."""
    assert int(watching(0.999).query(0)["timeoutSeconds"]) == 124


def test_a_watch_goes_on_from_what_was_told_last() -> None:
    """Events and bookmarks move the version; an object without one does not."""
    asked = watching()
    asked.query(0)
    asked.received("9")
    asked.received("")
    asked.ended(50)
    assert asked.pause(50) == 0 and not asked.listing and asked.query(50)["resourceVersion"] == "9"


def test_a_lost_connection_costs_no_list() -> None:
    """Pauses double, with jitter, up to the longest; what is told again begins anew."""
    asked = watching()
    pauses = []
    for _ in range(6):
        asked.failed(LOST, 10)
        pauses.append(asked.pause(10))
    assert pauses == [0.5, 1, 2, 4, 4, 4] and not asked.listing
    asked.query(20)
    asked.received("8")
    asked.failed(LOST, 20)
    assert asked.pause(20) == 0.5
    assert course(0.999).pause(0) == 0
    other = watching(0.5)
    other.failed(LOST, 0)
    assert other.pause(0) == 0.75


def test_an_expired_version_is_listed_at_once_but_once() -> None:
    """As new as what was seen, from the cache and so without a limit; in a circle of 410 with pauses."""
    asked = watching()
    asked.failed(GONE, 0)
    assert asked.listing and asked.pause(0) == 0 and asked.query(0) == {"resourceVersion": "7"}
    asked.page("20", "")
    asked.failed(GONE, 0)
    assert asked.listing and asked.pause(0) == 0.5


@pytest.mark.parametrize("error", [GONE, KubeError("too large resource version", 504, "Timeout"), KubeError("?", 400)])
def test_a_list_that_is_refused_for_its_version_is_asked_as_new_as_can_be(error: KubeError) -> None:
    """Without any version: etcd is read."""
    asked = watching()
    asked.failed(GONE, 0)
    asked.query(0)
    asked.failed(error, 0)
    assert asked.listing and asked.query(0) == {"limit": "5"}
    asked.page("3", "")
    assert asked.query(0)["resourceVersion"] == "3"


def test_an_expired_page_begins_again_in_one() -> None:
    """A list that takes longer than history lasts would never end otherwise."""
    asked = course()
    asked.page("7", "next")
    asked.failed(GONE, 0)
    assert asked.more == "" and asked.query(0) == {}


def test_a_page_that_was_lost_is_asked_again() -> None:
    """The pages before it count."""
    asked = course()
    asked.page("7", "next")
    asked.failed(LOST, 0)
    assert asked.query(1) == {"limit": "5", "continue": "next"}


def test_a_server_that_asks_for_time_gets_it() -> None:
    """Retry-After, a little more so that not all nodes come back at once, and not for ever."""
    asked = watching(0.999)
    asked.failed(BusyError("busy", 429, "TooManyRequests", 20), 0)
    assert 20 <= asked.pause(0) <= 25 and not asked.listing
    asked.failed(BusyError("busy", 429, "TooManyRequests", 86400), 100)
    assert 60 <= asked.pause(100) <= 75


def test_what_is_no_answer_is_listed_anew() -> None:
    """An event that could not be read is lost otherwise."""
    asked = watching()
    asked.failed(ProtocolError("half a line"), 0)
    assert asked.listing and asked.query(0) == {"resourceVersion": "7"}


def test_watches_that_end_at_once_are_slowed_down() -> None:
    """A proxy in between may answer 200 and hang up."""
    asked = watching()
    pauses = []
    for _ in range(3):
        asked.query(10)
        asked.ended(10.1)
        pauses.append(round(asked.pause(10.1), 3))
    assert pauses == [0.5, 1, 2] and not asked.listing


def test_a_watch_that_told_nothing_in_all_its_time_is_not_believed() -> None:
    """Not even a bookmark: the server may be waiting for versions that will not come (a restored etcd)."""
    asked = watching()
    asked.query(0)
    asked.ended(100)
    assert asked.listing and asked.pause(100) == 0


def test_silence_where_bookmarks_came() -> None:
    """Is noticed sooner; a server that has ceased to send them is believed again."""
    asked = watching()
    asked.query(0)
    assert asked.silence == 110
    asked.received("8")
    assert asked.silence == 110
    asked.received("9", bookmark=True)
    assert asked.silence == 40
    asked.failed(LOST, 50)
    asked.query(60)
    assert asked.silence == 40
    asked.failed(LOST, 100)
    assert asked.silence == 110


def listed(text: str, size: int) -> tuple[list[Any], tuple[str, str]]:
    listing, found, data = Listing(), list[Any](), text.encode()
    for at in range(0, len(data), size):
        found += listing.feed(data[at : at + size])
    return found, listing.end()


ITEMS = [{"a": "é€𝄞", "b": [1, {"c": "]}"}]}, {}, {"items": [{"no": "item"}]}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_in_any_pieces(size: int, indent: int | None) -> None:
    """Objects as they are complete, the version and where to go on; keys in any order."""
    value = {"kind": "PodList", "metadata": {"resourceVersion": "5", "continue": "c", "n": 12}, "items": ITEMS, "x": 1}
    assert listed(json.dumps(value, indent=indent, ensure_ascii=False), size) == (ITEMS, ("5", "c"))
    value = {"items": ITEMS, "metadata": {"resourceVersion": "5"}}
    assert listed(json.dumps(value, indent=indent), size) == (ITEMS, ("5", ""))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "{}", "[]", '"x"', "null", '{"items": []}', '{"metadata": {"resourceVersion": "5"}}', "\xff{}", "<a>",
        '{"metadata": {"resourceVersion": "5"}, "items": [{}', '{"metadata": {"resourceVersion": "5"}, "items": [{}]',
        '{"metadata": {"resourceVersion": 5}, "items": []}', '{"metadata": {"resourceVersion": "5"}, "items": {}}',
        '{"metadata": {"resourceVersion": ""}, "items": []}', '{"metadata": {"resourceVersion": "5"}, "items": 1}',
    ],
)  # fmt: skip
def test_what_is_no_whole_list(text: str) -> None:
    """Nothing is pruned for it."""
    with pytest.raises(ProtocolError):
        listed(text, 1000)


def test_an_empty_list() -> None:
    """As Go writes one that was made, and one that was not."""
    for items in ([], None):
        assert listed(json.dumps({"metadata": {"resourceVersion": "5"}, "items": items}), 5) == ([], ("5", ""))


def test_a_table() -> None:
    """Rows with their cells by name; in a watch the headers come with the first event alone."""
    columns = [{"name": "Name"}, {"name": "IP"}]
    one = {"cells": ["web", "10.0.0.1"], "object": {"metadata": {"resourceVersion": "8"}}}
    value = {"metadata": {"resourceVersion": "5"}, "columnDefinitions": columns, "rows": [one]}
    row = {"metadata": {"resourceVersion": "8"}, "cells": {"Name": "web", "IP": "10.0.0.1"}, "conditions": None}
    assert listed(json.dumps(value), 9) == ([row], ("5", ""))
    rows, first, later = Rows(), {"kind": "Table", **value}, {"kind": "Table", "rows": [one], "columnDefinitions": None}
    assert rows.unfold(first) == rows.unfold(later) == [row]
    assert (version(first), version(later), version({"metadata": None}), version({})) == ("5", "8", "", "")


def test_lines() -> None:
    """A half line is none, whatever pieces it comes in."""
    lines = Lines()
    assert list(lines.feed(b"one\ntw")) == [b"one"]
    assert list(lines.feed(b"o")) == []
    assert list(lines.feed(b"\n\n \nthree\nfour")) == [b"two", b"three"]
    with pytest.raises(ProtocolError, match="longer than"):
        for _ in range(9):
            list(lines.feed(b"x" * 1_000_000))


def test_events() -> None:
    """ERROR holds a Status; everything else that is none of the four is refused."""
    assert event(b'{"type":"ADDED","object":{"a":1}}') == (WatchVerb.ADDED, {"a": 1})
    with pytest.raises(KubeError, match="410 Expired: too old") as error:
        event(b'{"type":"ERROR","object":{"code":410,"reason":"Expired","message":"too old"}}')
    assert (error.value.status, error.value.reason) == (410, "Expired")
    for line in (b"{", b"[]", b"1", b"{}", b'{"type":"X","object":{}}', b'{"type":"ADDED"}', b"\xff", b"[" * 100_000):
        with pytest.raises(ProtocolError):
            event(line)
    for line in (b'{"type":"ADDED","object":[]}', b'{"type":"ERROR","object":1}', b'{"type":["ADDED"],"object":{}}'):
        with pytest.raises(ProtocolError):
            event(line)


def test_refusals_are_one_line() -> None:
    """A Status in its own words, or what a proxy in between wrote, cut short."""
    body = json.dumps({"kind": "Status", "reason": "Forbidden", "message": "no\nrights", "code": 403}).encode()
    error = refusal("GET /x", 403, body, {})
    assert (str(error), error.status, error.reason) == ("GET /x: 403 Forbidden: no rights", 403, "Forbidden")
    assert str(refusal("GET /x", 502, b"<html>\xff" + b"y" * 999, {})).startswith("GET /x: 502 : <html>")
    assert len(str(refusal("GET /x", 502, b"y" * 999, {}))) < 250
    busy = refusal("GET /x", 429, b"", {"retry-after": "3"})
    assert isinstance(busy, BusyError) and busy.seconds == 3
    for odd in ("-1", "soon", "", "9" * 400, "٣", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert not isinstance(refusal("GET /x", 429, b"", {"retry-after": odd}), BusyError)
