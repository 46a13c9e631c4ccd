# SPDX-License-Identifier: Apache-2.0
"""Load generator: opens new TCP connections at a set rate to several targets in turn; records each one.

Open loop: a slow answer does not delay the next connection, so that a stall shows. The number in flight is bounded; a
connection that was due and not opened is counted as skipped, never silent.
Each record is a JSON line: time (Unix, of the opening), source, target, ok, error, seen_peer, seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from itertools import cycle
from typing import TextIO

from agent.lab.programs.echo import shown

FLUSH_SECONDS = 0.2
Target = tuple[str, int]


def parse_target(text: str) -> Target:
    """Parses `1.2.3.4:80` or `[2001:db8::1]:80`: an address, never a name, so that no resolver is involved."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    socket.getaddrinfo(host, int(port), flags=socket.AI_NUMERICHOST)
    return host, int(port)


@dataclass(slots=True, kw_only=True)
class LoadConnection:
    """A connection. `time` is Unix, `began` monotonic, both in seconds. `fd` is -1 when it is done."""

    sock: socket.socket
    fd: int
    target: str
    time: float
    began: float
    source: str = ""
    sent: bool = False
    answer: bytes = b""


class LoadGenerator:
    """One run: an epoll loop with a schedule, since it shares a few cores with the processes under measurement."""

    def __init__(self, out: TextIO, targets: list[Target], timeout: float, limit: int) -> None:
        self._out = out
        self._targets = cycle(targets)
        self._timeout = timeout
        self._limit = limit
        self._epoll = select.epoll()
        self._flying: dict[int, LoadConnection] = {}
        self._oldest: deque[LoadConnection] = deque()  # in order of opening, hence of their time limits
        self.opened = self.ok = self.skipped = 0
        self.errors: Counter[str] = Counter()
        self.stopped = False

    def run(self, rate: float, seconds: float | None) -> None:
        """Runs for `seconds` or until `stopped` is set; then waits until the last connection ends or times out."""
        began = flushed = time.monotonic()
        due = 0
        while not self.stopped or self._flying:
            now = time.monotonic()
            if not self.stopped:
                wanted = int(min(now - began, seconds or now) * rate)
                for _ in range(wanted - due):
                    self._open(next(self._targets))
                due = wanted
                self.stopped = self.stopped or (seconds is not None and now - began >= seconds)
            pause = 0.05 if self.stopped else (due + 1) / rate - (now - began)
            for fd, _ in self._epoll.poll(min(max(pause, 0.0), 0.05)):
                self._progress(self._flying[fd])
            self._expire(now)
            if now - flushed >= FLUSH_SECONDS:
                self._out.flush()
                flushed = now
        self._out.flush()

    def _open(self, target: Target) -> None:
        if len(self._flying) >= self._limit:
            self.skipped += 1
            return
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        connection = LoadConnection(
            sock=sock, fd=sock.fileno(), target=shown(target), time=time.time(), began=time.monotonic()
        )
        self.opened += 1
        self._flying[connection.fd] = connection
        self._oldest.append(connection)
        number = sock.connect_ex(target)
        # The kernel has chosen the source by now; other records of a failed connection are found only by it.
        connection.source = shown(sock.getsockname())
        if number in (0, errno.EINPROGRESS):
            self._epoll.register(connection.fd, select.EPOLLOUT)
        else:
            self._finish(connection, os.strerror(number))

    def _progress(self, connection: LoadConnection) -> None:
        sock = connection.sock
        try:
            if not connection.sent:
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    raise OSError(number, os.strerror(number))
                sock.send(b"hello\n")
                connection.sent = True
                self._epoll.modify(connection.fd, select.EPOLLIN)
                return
            data = sock.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._finish(connection, error.strerror or str(error))
            return
        connection.answer += data
        if not data:
            good = connection.answer.startswith(b"peer=") and connection.answer.endswith(b"\n")
            wrong = "wrong answer" if connection.answer else "closed without an answer"
            self._finish(connection, "" if good else wrong)

    def _expire(self, now: float) -> None:
        while self._oldest and (self._oldest[0].fd < 0 or now - self._oldest[0].began > self._timeout):
            connection = self._oldest.popleft()
            if connection.fd >= 0:
                self._finish(connection, "answer timed out" if connection.sent else "connect timed out")

    def _finish(self, connection: LoadConnection, error: str) -> None:
        del self._flying[connection.fd]
        connection.sock.close()
        connection.fd = -1
        if error:
            self.errors[error] += 1
        else:
            self.ok += 1
        record = {
            "time": round(connection.time, 6), "source": connection.source, "target": connection.target,
            "ok": not error, "error": error,
            "seen_peer": "" if error else connection.answer[5:-1].decode(errors="replace"),
            "seconds": round(time.monotonic() - connection.began, 6),
        }  # fmt: skip
        self._out.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="+", type=parse_target, help="IP:PORT or [IP]:PORT")
    parser.add_argument("--rate", type=float, default=250, help="new connections per second")
    parser.add_argument("--seconds", type=float, help="how long; without it until SIGTERM")
    parser.add_argument("--timeout", type=float, default=5, help="seconds for one connection, all in all")
    parser.add_argument("--in-flight", type=int, default=1000, help="most connections at a time")
    parser.add_argument("--out", help="file that gets the records; without it stdout")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(args.out, "a")) if args.out else sys.stdout  # noqa: PTH123
        load = LoadGenerator(out, args.target, args.timeout, args.in_flight)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(load, "stopped", True))
        load.run(args.rate, args.seconds)
    cpu = os.times()
    summary = {
        "opened": load.opened, "ok": load.ok, "skipped": load.skipped, "errors": dict(load.errors),
        "cpu_seconds": round(cpu.user + cpu.system, 3),
    }  # fmt: skip
    print(json.dumps(summary), file=sys.stdout if args.out else sys.stderr)


if __name__ == "__main__":
    main()
