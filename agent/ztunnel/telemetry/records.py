# SPDX-License-Identifier: Apache-2.0
"""Writes lines about connections and DNS queries, in batches, without delaying traffic.

Lines are held for at most FLUSH_SECONDS. A pipe with a slow reader is written only as far as it has room, in pieces
that fit; beyond HELD_BYTES new lines are dropped and counted, and the count gets a line.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import select
import stat
from typing import NamedTuple, Protocol

from agent.core.model.sockets import text
from agent.core.text import utc
from agent.ztunnel.relay.original_dst import Address

FLUSH_SECONDS = 0.1
HELD_BYTES = 16 << 20
PIECE = select.PIPE_BUF  # a pipe that polls writable takes this much without blocking

Began = tuple[float, float]  # start of a connection or query: wall clock, monotonic clock

_CLOSE_BY_ERRNO = {
    errno.ECONNREFUSED: "refused",
    errno.ETIMEDOUT: "timeout",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.ENOTCONN: "reset",
}

_quoted = json.encoder.encode_basestring_ascii  # as a string of JSON

log = logging.getLogger(__name__)


def close_by(number: int | None, otherwise: str = "error") -> str:
    """Returns the `close` of a connection that an error of its socket has ended; `otherwise` for other errors."""
    return _CLOSE_BY_ERRNO.get(number or 0, otherwise)


def lost(count: int) -> bytes:
    """Returns the line in place of so many others."""
    return json.dumps({"kind": "lost", "count": count}).encode() + b"\n"


class Line(Protocol):
    """Something that becomes a line when it is written."""

    def line(self) -> bytes:
        """Returns the line with its end."""


class Record(NamedTuple):
    """One connection or query as a JSON line. `started` is in seconds since 1970.

    `close`: fin, reset, refused, timeout, error or drained. `via` is the proxy's own address towards the destination:
    it joins the records of two proxies on one path, since conntrack may have given the client another source port.
    """

    started: float
    kind: str
    direction: str
    pod: str
    uid: str
    source: Address
    destination: Address | None
    sent: int
    received: int
    seconds: float
    close: str
    error: str
    via: Address | None = None

    def line(self) -> bytes:
        # Each query has one: json.dumps of a dict takes five times as long.
        destination = text(self.destination) if self.destination else ""
        via = text(self.via) if self.via else ""
        return (
            f'{{"time":"{utc(self.started)}","kind":{_quoted(self.kind)},"direction":{_quoted(self.direction)},'
            f'"pod":{_quoted(self.pod)},"uid":{_quoted(self.uid)},"source":{_quoted(text(self.source))},'
            f'"destination":{_quoted(destination)},"sent":{self.sent},"received":{self.received},'
            f'"seconds":{round(self.seconds, 6)},"close":{_quoted(self.close)},"error":{_quoted(self.error)},'
            f'"via":{_quoted(via)}}}\n'
        ).encode()


class RecordSink(Protocol):
    """Takes lines and never waits."""

    def add(self, record: Line) -> None:
        """Takes a line; its text is made later."""


class RecordWriter:
    """Writes to `path`; "-" is standard output, "" nowhere. An error of the file is never raised."""

    def __init__(self, loop: asyncio.AbstractEventLoop, path: str) -> None:
        self._loop = loop
        self._path = path
        self._fd = -1
        self._pipe = False
        self._waiting: list[Line] = []
        self._held = bytearray()
        self._lost = 0
        self._timer: asyncio.TimerHandle | None = None
        self._reported = False

    def add(self, record: Line) -> None:
        if not self._path:
            return
        self._waiting.append(record)
        if self._timer is None:
            self._timer = self._loop.call_later(FLUSH_SECONDS, self.flush)

    def write(self, lines: bytes) -> None:
        """Writes finished lines that another process has collected."""
        if len(self._held) < HELD_BYTES:
            self._held += lines
        else:
            self._lost += lines.count(b"\n")
        self.flush()

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        waiting = self._waiting
        self._waiting = []
        for record in waiting:
            if len(self._held) < HELD_BYTES:
                self._held += record.line()
            else:
                self._lost += 1
        try:
            self._write()
            self._reported = False
        except OSError as error:
            self._failed(error)
        if self._held:
            self._timer = self._loop.call_later(FLUSH_SECONDS, self.flush)

    def close(self) -> None:
        """Writes as many lines as possible; the rest is lost."""
        self.flush()
        if self._timer is not None:
            self._timer.cancel()
        self._shut()

    def _write(self) -> None:
        if not self._held:
            return
        if self._fd < 0:
            self._open()
        room = select.poll()
        room.register(self._fd, select.POLLOUT)
        while self._held:
            if self._pipe and not room.poll(0):
                return
            del self._held[: os.write(self._fd, self._held[:PIECE] if self._pipe else self._held)]
            if self._lost and len(self._held) < HELD_BYTES:
                self._held += lost(self._lost)
                self._lost = 0

    def _open(self) -> None:
        if self._path == "-":
            self._fd = os.dup(1)
        else:
            # O_NONBLOCK: opening a FIFO without a reader must fail, not wait.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(self._path, flags, 0o640)
        self._pipe = not stat.S_ISREG(os.fstat(self._fd).st_mode)

    def _shut(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _failed(self, error: OSError) -> None:
        if not self._reported:  # once, not ten times a second
            log.error("cannot write records to %s, retrying: %s", self._path, error.strerror)
        self._reported = True
        self._shut()
