# SPDX-License-Identifier: Apache-2.0
"""The log of connections: lines, rotation, sampling, and a disk or reader that does not take them."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.flows import journal as module
from agent.flows import logfile
from agent.flows.journal import ConnectionJournal, sampled
from agent.flows.logfile import LogFile
from agent.flows.record import Connection, Direction, Fate, Reason
from agent.flows.resolved_record import ResolvedRecord

NAMED = ResolvedRecord(
    connection=Connection(
        pod=1,
        socket=0,
        direction=Direction.OUTBOUND,
        fate=Fate.CAPTURED,
        reason=Reason.NONE,
        local=("10.0.0.1", 40000),
        remote=("10.0.0.2", 80),
        opened=1.0,
        closed=2.0,
    ),
    node="n1",
    pod="web",
    namespace="shop",
    workload="web",
)


def records(first: int, count: int, **facts: Any) -> list[ResolvedRecord]:
    return [replace(NAMED, connection=replace(NAMED.connection, socket=first + n, **facts)) for n in range(count)]


def sockets(path: Path) -> list[int]:
    return [json.loads(line)["socket"] for line in path.read_text().splitlines()]


def written(
    path: Path, *batches: list[ResolvedRecord], limit: int = 1 << 30, keep: int = 2, one_in: int = 1
) -> ConnectionJournal:
    """The journal after its end."""
    made = ConnectionJournal(LogFile(str(path), limit, keep), one_in)
    for batch in batches:
        made.write(batch)
    made.close()
    return made


# --- lines


def test_a_line_for_each_in_order_and_for_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    before = os.umask(0)
    try:
        journal = written(path, records(0, 1000), [], records(1000, 1))
    finally:
        os.umask(before)
    assert sockets(path) == list(range(1001))
    assert json.loads(path.read_text().splitlines()[7]) == records(7, 1)[0].as_dict()
    assert (path.stat().st_mode & 0o777, journal.written) == (0o600, 1001)
    assert journal.losses() == {"log_slow": 0, "log_failed": 0}


def test_a_programs_name_may_be_any_bytes(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    name = b'a\xff\n"\xc3\xa4'.decode(errors="surrogateescape")
    written(path, records(1, 1, command=name))
    assert json.loads(path.read_bytes())["command"] == name and path.read_bytes().count(b"\n") == 1


def test_what_is_there_stays_and_a_torn_line_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"socket":1}\n{"sock')
    path.chmod(0o640)
    written(path, records(2, 1))
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"socket":1}', '{"sock'] and json.loads(lines[2])["socket"] == 2
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    made = ConnectionJournal(LogFile("-", 1 << 16, 1))
    made.write(records(5, 3))
    made.close()
    assert [json.loads(line)["socket"] for line in capfd.readouterr().out.splitlines()] == [5, 6, 7]
    os.fstat(1)


def test_one_of_many_is_written_and_every_leaked_or_failed_one(tmp_path: Path) -> None:
    path, plain = tmp_path / "c.json", records(0, 1000)
    leaked, failed = records(2000, 5, fate=Fate.LEAKED), records(3000, 5, established=False)
    journal = written(path, plain, leaked, failed, one_in=10)
    chosen = [each.connection.socket for each in plain if sampled(each.connection, 10)]
    assert 50 < len(chosen) < 150
    assert sockets(path) == [*chosen, *range(2000, 2005), *range(3000, 3005)]
    assert sum(journal.losses().values()) == 0, "what is not in the sample is not lost"


# --- rotation

LINE = len(json.dumps(records(1000, 1)[0].as_dict(), separators=(",", ":"))) + 1


def rotated(path: Path, count: int, *, lines: int, keep: int) -> None:
    """One record at a time into files of so many lines."""
    file = LogFile(str(path), lines * LINE, keep)
    for record in records(1000, count):
        file.write(module._line(record))
    file.close()


def test_files_never_grow_above_the_limit_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    rotated(path, 10, lines=3, keep=2)
    assert {file.name: [number - 1000 for number in sockets(file)] for file in tmp_path.iterdir()} == {
        "c.json": [9], "c.json.1": [6, 7, 8], "c.json.2": [3, 4, 5],
    }  # fmt: skip
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in tmp_path.iterdir())
    rotated(path, 2, lines=3, keep=2)
    assert [number - 1000 for number in sockets(path)] == [9, 0, 1], "an earlier agent's file is gone on with"


def test_without_old_files_it_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    rotated(path, 10, lines=3, keep=0)
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"] and sockets(path) == [1009]


def test_more_in_one_write_than_the_limit_is_still_written(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    written(path, records(1000, 600), limit=LINE, keep=9)
    files = sorted(tmp_path.iterdir(), reverse=True)
    assert [number for file in files for number in sockets(file)] == list(range(1000, 1600)) and len(files) >= 3


def test_a_file_that_somebody_else_moved_or_removed_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    file = LogFile(str(path), 1 << 20, 1)
    for change in (lambda: path.rename(tmp_path / "moved"), path.unlink, lambda: os.truncate(path, 0)):
        file.write(b"before\n")
        change()
        file.write(b"after\n")
        assert path.read_text() == "after\n"
        path.unlink()
    assert (tmp_path / "moved").read_text() == "before\n"


# --- what does not take them


class Disk:
    """Instead of os.write: takes `room` bytes, then refuses."""

    def __init__(self, room: int) -> None:
        self.room, self.write = room, os.write

    def __call__(self, fd: int, data: Any) -> int:
        part = bytes(data)[: self.room]
        if not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(part)
        return self.write(fd, part)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(1 << 30)
    monkeypatch.setattr(logfile.os, "write", made)
    return made


def wait(until: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(1000):
        if until():
            return
        done.wait(0.01)
    raise AssertionError("not within 10 s")


def test_a_full_disk_is_counted_and_told_of_once_and_leaves_no_half_line(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "c.json"
    made = ConnectionJournal(LogFile(str(path), 1 << 20, 1))
    made.write(records(0, 3))
    wait(lambda: made.written == 3)
    for first in (10, 20, 30):
        disk.room = 100
        made.write(records(first, 5))
        wait(lambda first=first: made.losses()["log_failed"] == (first - 10) // 2 + 5)  # type: ignore[misc]
    assert sockets(path) == [0, 1, 2]
    disk.room = 1 << 20
    made.write(records(40, 2))
    wait(lambda: made.written == 5)
    disk.room = 0
    made.write(records(50, 1))
    made.close()
    assert sockets(path) == [0, 1, 2, 40, 41]
    assert made.losses() == {"log_slow": 0, "log_failed": 16}
    assert [record.getMessage() for record in caplog.records] == [
        f"connection log {path}: [Errno 28] No space left on device; records are lost until it can be written",
        f"connection log {path} is written again; 15 records were lost",
    ]


def test_a_place_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "none" / "c.json"
    made = ConnectionJournal(LogFile(str(path), 1 << 20, 1))
    made.write(records(0, 2))
    wait(lambda: made.losses()["log_failed"] == 2)
    path.parent.mkdir()
    made.write(records(2, 2))
    made.close()
    assert sockets(path) == [2, 3]
    assert "No such file or directory" in caplog.text and len(caplog.records) == 1


def test_where_files_cannot_be_rotated_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.json"
    (tmp_path / "c.json.1").mkdir()  # in the way
    (tmp_path / "c.json.1" / "x").touch()
    journal = written(path, records(1000, 1), limit=LINE, keep=1)
    assert journal.written == 1
    journal = written(path, records(1001, 1), limit=LINE, keep=1)
    assert journal.losses()["log_failed"] == 1 and sockets(path) == [1000]


def test_a_reader_that_stalls_costs_records_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAITING", 300)
    reached, go = threading.Event(), threading.Event()

    class Stalled(LogFile):
        got = b""

        def write(self, lines: bytes) -> None:
            reached.set()
            go.wait()
            self.got += lines

    file = Stalled("pipe", 1, 1)
    made = ConnectionJournal(file)
    made.write(records(0, 1))
    assert reached.wait(10)
    made.write(records(1, 200))
    made.write(records(201, 200))
    assert made.losses() == {"log_slow": 100, "log_failed": 0}
    go.set()
    made.close()
    assert [json.loads(line)["socket"] for line in file.got.splitlines()] == list(range(301))
    made.write(records(0, 7))
    assert made.losses()["log_slow"] == 107, "after the end nothing is taken"
