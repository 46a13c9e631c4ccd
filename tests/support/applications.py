# SPDX-License-Identifier: Apache-2.0
"""Applications for tests: processes of their own in a pod, which count for themselves what they do."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pickle
import signal
import socket
import struct
import termios
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from support.ebpf_pod import SECONDS, Where, domain, written
from support.node import until

SO_COOKIE = 57  # asm-generic/socket.h
RESETS = struct.pack("=ii", 1, 0)  # SO_LINGER: close sends RST
_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """A process of its own that runs `function` in `where`'s namespace, and the value that it returned.

    It has none of our descriptors but `keep`: what we listen with is not kept open by it.
    """

    def __init__(self, where: Path, function: Callable[[], Any], keep: tuple[int, ...] = ()) -> None:
        self._answer, into = os.pipe()
        number, name = os.pipe()
        # A child of ours would count as a worker of ztunnel where the test stands for ztunnel.
        between = os.fork()
        if not between:
            child = os.fork()
            if not child:
                _live(where, function, into, {*keep, into})
            os.write(name, str(child).encode())
            os._exit(0)
        os.waitpid(between, 0)
        self.pid = int(os.read(number, 20))
        for one in (into, number, name):
            os.close(one)

    def result(self) -> Any:
        """Waits for its end. Raises AssertionError with its own words when it failed."""
        with open(self._answer, "rb", closefd=False) as answer:
            data = answer.read()
        os.close(self._answer)
        self._answer = -1
        self.pid = 0
        assert data, "the child ended without a result"
        good, value = pickle.loads(data)
        assert good, value
        return value

    def close(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            until(lambda: not psutil.pid_exists(self.pid), "it has ended")
            os.close(self._answer)
            self.pid = 0


def _live(where: Path, function: Callable[[], Any], into: int, keep: set[int]) -> None:
    """Never returns."""
    try:
        with where.open("rb") as namespace:
            assert _libc.setns(namespace.fileno(), 0x40000000) == 0, "setns"
        last = 2
        for one in sorted(keep):
            os.closerange(last + 1, one)
            last = one
        os.closerange(last + 1, 4096)
        done = True, function()
    except BaseException:  # noqa: BLE001
        done = False, traceback.format_exc()
    with contextlib.suppress(BaseException), open(into, "wb") as answer:
        pickle.dump(done, answer)
    os._exit(0)


def cookie(sock: socket.socket) -> int:
    """What a record calls the socket."""
    return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0])


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
    sock.close()


def flushed(sock: socket.socket) -> None:
    """Returns when the other end has acknowledged everything; and acknowledges what has come."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    until(lambda: not struct.unpack("=i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0], "it is acknowledged")


def receive(sock: socket.socket, size: int) -> int:
    """So many bytes, or all until the end; how many."""
    got = 0
    while got < size and (part := sock.recv(min(65536, size - got))):
        got += len(part)
    return got


def dial(kind: str, where: Where, *, mark: int = 0, options: tuple[tuple[int, int, int], ...] = ()) -> socket.socket:
    """Of an application. Raises OSError."""
    made = socket.socket(domain(kind), socket.SOCK_STREAM)
    try:
        made.settimeout(SECONDS)
        if mark:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        for option in options:
            made.setsockopt(*option)
        made.connect((written(kind, where[0]), where[1]))
    except BaseException:
        made.close()
        raise
    return made


def listener(port: int, backlog: int = 4096) -> socket.socket:
    """Of an application, for both families."""
    made = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("::", port))
    made.listen(backlog)
    made.settimeout(SECONDS)
    return made


def asks(kind: str, where: Where, **options: Any) -> int:
    """Connects, sends, reads to the end; the socket."""
    sock = dial(kind, where, **options)
    number = cookie(sock)
    sock.sendall(b"x" * 100)
    receive(sock, 1000)
    sock.close()
    return number


def fails(kind: str, where: Where, error: int, **options: Any) -> int:
    """Cannot connect, in that way; the socket. It waits in connect(): SO_ERROR would tell of ICMP too early."""
    sock = socket.socket(socket.AF_INET if kind == "IPv4" else socket.AF_INET6)
    for option in options.get("options", ()):
        sock.setsockopt(*option)
    number = cookie(sock)
    with sock:
        assert sock.connect_ex((written(kind, where[0]), where[1])) == error
    return number


def answers(listening: socket.socket) -> int:
    """One connection: reads, answers and closes; the socket."""
    sock, _ = listening.accept()
    number = cookie(sock)
    sock.settimeout(SECONDS)
    assert receive(sock, 100) == 100
    sock.sendall(b"y" * 50)
    sock.close()
    return number


def answer(sock: socket.socket) -> None:
    with sock:
        sock.settimeout(SECONDS)
        assert receive(sock, 100) == 100
        sock.sendall(b"y" * 50)
