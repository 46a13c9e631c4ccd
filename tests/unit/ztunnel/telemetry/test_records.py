# SPDX-License-Identifier: Apache-2.0
"""Records reach a file or pipe as whole lines, and never hold up or fail the writer."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.ztunnel.telemetry import records as module
from agent.ztunnel.telemetry.records import Record, RecordWriter

ONE = Record(
    started=0.25,
    kind="tcp",
    direction="outbound",
    pod="shop/web",
    uid="u",
    source=("10.0.0.1", 5),
    destination=("fd00::1", 80, 0, 0),
    sent=3,
    received=4,
    seconds=0.5,
    close="fin",
    error="",
    via=("10.0.0.1", 6),
)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def test_a_line() -> None:
    assert json.loads(ONE.line()) == {
        "time": "1970-01-01T00:00:00.250000Z", "kind": "tcp", "direction": "outbound", "pod": "shop/web", "uid": "u",
        "source": "10.0.0.1:5", "destination": "[fd00::1]:80", "sent": 3, "received": 4, "seconds": 0.5,
        "close": "fin", "error": "", "via": "10.0.0.1:6",
    }  # fmt: skip


@pytest.mark.parametrize("text", ['"', "\\", "a\nb", "\x00\x1b\x7f", "ä\u2028\udc80", "}"])
def test_a_line_with_any_text_is_json(text: str) -> None:
    line = ONE._replace(pod=text, uid=text, error=text, via=None, seconds=1e-7).line()
    found = json.loads(line)
    assert (found["pod"], found["uid"], found["error"], found["via"], found["seconds"]) == (text, text, text, "", 0.0)
    assert line.count(b"\n") == 1 and line.isascii()


def test_close_writes_all(loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    records = RecordWriter(loop, str(tmp_path / "r"))
    for _ in range(1000):
        records.add(ONE)
    records.close()
    assert (tmp_path / "r").read_bytes() == ONE.line() * 1000


def test_a_missing_folder_that_appears(loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    path = tmp_path / "later" / "r"
    records = RecordWriter(loop, str(path))
    records.add(ONE)
    records.flush()
    path.parent.mkdir()
    records.close()
    assert path.read_bytes() == ONE.line()


def test_a_pipe_nobody_reads(loop: asyncio.AbstractEventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD_BYTES", 200_000)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    records = RecordWriter(loop, str(path))
    for _ in range(5000):
        records.add(ONE)
    records.flush()  # returns although the pipe is full
    got = bytearray()
    while True:
        try:
            got += os.read(reader, 1 << 20)
        except BlockingIOError:
            records.flush()
            try:
                got += os.read(reader, 1 << 20)
            except BlockingIOError:
                break
    records.close()
    os.close(reader)
    lines = [json.loads(line) for line in got.splitlines()]
    lost = sum(line["count"] for line in lines if line["kind"] == "lost")
    assert lost > 0
    assert lost + sum(line["kind"] == "tcp" for line in lines) == 5000
