# SPDX-License-Identifier: Apache-2.0
"""A TCP server for many short connections: sends each client the address that it sees of it.

A client sends one line and gets `peer=ADDRESS:PORT`; for the line `bulk N` N bytes follow. The server closes first, so
that the thousands of connections in TIME_WAIT are on its side, not on that of the client's ports.

Plain epoll, since it shares a few cores with the processes under measurement: a third of asyncio's cost per connection.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import select
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TextIO

LINE_LIMIT = 1024
BACKLOG = 4096  # a stall of a second must not lose a SYN
_BLOCK = memoryview(b"sluice--" * 8192)


def shown(address: tuple[str, int]) -> str:
    """Returns `ip:port`, or `[ip]:port`; an IPv4 peer on a dual-stack socket is shown as IPv4."""
    host = address[0].removeprefix("::ffff:") if "." in address[0] else address[0]
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


@dataclass(slots=True)
class EchoConnection:
    """A connection. `remaining`: unsent bytes of a bulk answer; below zero the line is not complete yet."""

    sock: socket.socket
    peer: str
    received: bytes = b""
    remaining: int = -1


class Echo:
    """Serves until a signal raises SystemExit."""

    def __init__(self, port: int, log: TextIO | None) -> None:
        self._log = log
        self._server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        self._server.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._server, select.EPOLLIN)
        self._connections: dict[int, EchoConnection] = {}

    def run(self) -> None:
        listening = self._server.fileno()
        while True:
            for fd, _ in self._epoll.poll():
                if fd == listening:
                    self._accept()
                    continue
                connection = self._connections[fd]
                try:
                    self._progress(connection)
                except BlockingIOError:
                    continue
                except OSError:  # a reset: the client records it
                    self._close(connection)

    def _accept(self) -> None:
        # Bounded, so that a flood of new connections does not starve the existing ones.
        for _ in range(64):
            try:
                sock, address = self._server.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            sock.setblocking(False)
            connection = EchoConnection(sock, shown(address))
            self._connections[sock.fileno()] = connection
            self._epoll.register(sock, select.EPOLLIN)
            if self._log is not None:
                self._log.write(connection.peer + "\n")

    def _progress(self, connection: EchoConnection) -> None:
        if connection.remaining < 0:
            data = connection.sock.recv(LINE_LIMIT)
            connection.received += data
            if not data or len(connection.received) > LINE_LIMIT:
                self._close(connection)
                return
            if not data.endswith(b"\n"):
                return
            fields = connection.received.split()
            bulk = len(fields) == 2 and fields[0] == b"bulk" and fields[1].isdigit()
            connection.remaining = int(fields[1]) if bulk else 0
            connection.sock.send(f"peer={connection.peer}\n".encode())
            if connection.remaining:
                self._epoll.modify(connection.sock, select.EPOLLOUT)
        while connection.remaining:
            connection.remaining -= connection.sock.send(_BLOCK[: connection.remaining])
        self._close(connection)

    def _close(self, connection: EchoConnection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.sock.close()  # also removes it from epoll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=7000)
    parser.add_argument("--log", help="file that gets a line per accepted peer")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(ValueError, OSError):  # each connection is a descriptor
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(args.log, "a", buffering=1)) if args.log else None  # noqa: PTH123
        Echo(args.port, log).run()


if __name__ == "__main__":
    main()
