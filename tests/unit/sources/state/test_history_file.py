# SPDX-License-Identifier: Apache-2.0
"""The history on disk: what a killed agent leaves, a disk that refuses, and files that grow."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core.model.history_event import EventKind
from agent.core.policy.history import Selection
from agent.sources.state import history_file
from agent.sources.state.history_file import HistoryFile

KIND = EventKind.REPAIRED


@contextlib.contextmanager
def opened(run_dir: Path, limit: int = 1 << 20) -> Iterator[HistoryFile]:
    made = HistoryFile(str(run_dir), limit, "n1")
    made.open()
    try:
        yield made
    finally:
        made.close()


def texts(run_dir: Path) -> list[str]:
    return [one.text for one in history_file.read(str(run_dir))]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def words(number: int) -> str:
    return "".join(chr(97 + int(digit)) for digit in str(number))


def test_events_are_on_disk_while_the_agent_runs(tmp_path: Path) -> None:
    with opened(tmp_path) as history:
        history.note(KIND, "first", namespace="shop", pod="web", by="nft[4711]")
        until(lambda: texts(tmp_path) == ["first"])  # a killed agent leaves it
        history.note(KIND, "second", by="unknown")
        until(lambda: texts(tmp_path) == ["first", "second"])
    assert [(one.node, one.namespace, one.pod, one.by) for one in history_file.read(str(tmp_path))] == [
        ("n1", "shop", "web", "nft[4711]"),
        ("n1", "", "", ""),
    ]
    assert history_file.path(str(tmp_path)).stat().st_mode & 0o777 == 0o600


def test_a_later_agent_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    with opened(tmp_path) as history:
        history.note(KIND, "first")
    with history_file.path(str(tmp_path)).open("ab") as file:
        file.write(b'{"id":2,"number":2,"ti')
    with opened(tmp_path) as history:
        history.note(KIND, "second")
        assert [one.text for one in history.select(Selection())[0]] == ["first", "second"]
    assert texts(tmp_path) == ["first", "second"]
    assert [one.number for one in history_file.read(str(tmp_path))] == [1, 2]


def test_what_was_not_written_in_time_is_written_later_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_file, "_RETRY", 0.01)
    run_dir = tmp_path / "run"
    with caplog.at_level(logging.ERROR), opened(run_dir) as history:  # there is no such directory
        for number in range(1500):  # more than wait for the disk
            history.note(KIND, words(number), namespace="shop", pod="web")
        assert len(history._waiting) <= history_file._WAITING  # a disk that hangs costs no memory
        until(lambda: caplog.records)
        time.sleep(0.3)  # for several tries
        run_dir.mkdir()
        until(lambda: len(texts(run_dir)) == 1500)
    assert len(caplog.records) == 1 and "No such file or directory" in caplog.text


def test_a_file_that_was_removed_is_written_again(tmp_path: Path) -> None:
    with opened(tmp_path) as history:
        history.note(KIND, "first")
        until(lambda: texts(tmp_path) == ["first"])
        history_file.path(str(tmp_path)).unlink()
        history.note(KIND, "second")
        until(lambda: texts(tmp_path) == ["first", "second"])


def test_the_file_stays_below_its_limit(tmp_path: Path) -> None:
    limit = 20_000
    with opened(tmp_path, limit) as history:
        largest = 0
        for number in range(3000):
            history.note(KIND, words(number), namespace="shop", pod="web")
            history.note(KIND, "the same", namespace="shop", pod="web")
            if number % 300 == 0:
                latest = words(number)
                until(lambda: latest in texts(tmp_path))  # noqa: B023 - called at once
                largest = max(largest, history_file.path(str(tmp_path)).stat().st_size)
    assert 0 < largest <= limit and history_file.path(str(tmp_path)).stat().st_size <= limit
    assert words(2999) in texts(tmp_path)


def test_threads_and_listeners(tmp_path: Path) -> None:
    told = list[int]()
    with opened(tmp_path) as history:
        with history.listening(lambda: told.append(1)):
            threads = [
                threading.Thread(target=lambda n=n: [history.note(KIND, "x", pod=f"p{n}") for _ in range(100)])
                for n in range(4)
            ]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
        history.note(KIND, "y")
        events, number = history.select(Selection())
    assert len(told) == 400 and number == 401
    assert {one.pod: one.count for one in events} == {"p0": 100, "p1": 100, "p2": 100, "p3": 100, "": 1}
    assert history_file.read(str(tmp_path)) == events


def test_after_the_end_nothing_is_noted(tmp_path: Path) -> None:
    with opened(tmp_path) as history:
        history.note(KIND, "last")
    history.note(KIND, "too late")
    assert texts(tmp_path) == ["last"]
