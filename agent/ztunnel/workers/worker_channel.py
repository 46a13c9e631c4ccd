# SPDX-License-Identifier: Apache-2.0
"""One end of the connection between the supervisor and a worker: messages in order, some with descriptors.

A message is a pickled value in one packet: both ends are one program with the same rights, and what comes from the
network was parsed before. A long one travels in a memfd.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import pickle
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

INLINE: Final = 32 << 10  # a longer message travels in a memfd
MOST_WAITING: Final = 64 << 20  # bytes that wait for the other end
_IN_MEMFD: Final = b"m"  # a pickled value begins with another byte
_MOST_FDS: Final = 16
_TURN_SECONDS: Final = 0.005  # of reading, then others get their turn
_CLOSE_SECONDS: Final = 1.0

Descriptors = Callable[[], Sequence[int] | None]  # None: the message is out of date, and is not sent
Received = Callable[[Any, list[int]], None]  # takes over the descriptors


def no_descriptors() -> Sequence[int]:
    return ()


class WorkerChannel:
    """Calls `received` for each message from `start` on, and `ended` once, when the other end is closed."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, end: socket.socket, received: Received, ended: Callable[[], None]
    ) -> None:
        """Takes over `end`."""
        self._loop = loop
        self._end = end
        self._received = received
        self._ended = ended
        self._spare = _Spare()
        self._queue: deque[tuple[bytes, Descriptors]] = deque()
        self.waiting = 0  # bytes
        end.setblocking(False)

    def start(self) -> None:
        self._loop.add_reader(self._end.fileno(), self.read)

    def send(self, message: Any, descriptors: Descriptors = no_descriptors) -> None:
        self.post(packed(message), descriptors)

    def post(self, message: bytes, descriptors: Descriptors = no_descriptors) -> None:
        """Sends what `packed` has returned. Nothing is sent, and no error raised, once the other end is closed."""
        self._queue.append((message, descriptors))
        self.waiting += len(message)
        if len(self._queue) == 1:
            self._write()

    def read(self) -> bool:
        """Handles messages that have arrived; returns True if there may be more."""
        until = self._loop.time() + _TURN_SECONDS
        while True:
            try:
                message, fds = _receive(self._end, self._spare)
            except BlockingIOError:
                return False
            except OSError:
                message = b""
                fds = []
            if not message:
                self._loop.remove_reader(self._end.fileno())
                self._ended()
                return False
            self._received(pickle.loads(message), fds)
            if self._loop.time() >= until:
                return True

    def close(self) -> None:
        """Sends what waits, within a second, and closes this end."""
        if self._end.fileno() < 0:
            return
        self._loop.remove_reader(self._end.fileno())
        self._loop.remove_writer(self._end.fileno())
        self._end.settimeout(_CLOSE_SECONDS)
        self._write()
        self._end.close()
        self._spare.free()

    def _write(self) -> None:
        while self._queue:
            message, descriptors = self._queue[0]
            fds = descriptors()
            try:
                if fds is not None:
                    _send(self._end, message, fds, self._spare)
            except BlockingIOError:
                self._loop.add_writer(self._end.fileno(), self._write)
                return
            except OSError:  # the other end is closed, or too slow at the end. A message must not be missing: it ends
                with contextlib.suppress(OSError):
                    self._end.shutdown(socket.SHUT_WR)
                self._queue.clear()
                self.waiting = 0
                break
            self._queue.popleft()
            self.waiting -= len(message)
        self._loop.remove_writer(self._end.fileno())


def packed(message: Any) -> bytes:
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


class _Spare:
    """A descriptor in reserve: without any other one, the process still gets and sends its messages."""

    def __init__(self) -> None:
        self._fd = -1
        self.fill()

    def free(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fill(self) -> bool:
        """Returns False if descriptors have run out."""
        if self._fd < 0:
            with contextlib.suppress(OSError):
                self._fd = os.eventfd(0, os.EFD_CLOEXEC)
        return self._fd >= 0


def _send(end: socket.socket, message: bytes, fds: Sequence[int], spare: _Spare) -> None:
    """Raises OSError."""
    with contextlib.ExitStack() as opened:
        if len(message) > INLINE:
            spare.free()
            opened.callback(spare.fill)
            memory = os.memfd_create("message", os.MFD_CLOEXEC)
            opened.callback(os.close, memory)
            with open(memory, "wb", closefd=False) as file:
                file.write(message)
            message = _IN_MEMFD
            fds = (*fds, memory)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        end.sendmsg([message], control)


def _receive(end: socket.socket, spare: _Spare) -> tuple[bytes, list[int]]:
    """Returns a message and its descriptors; an empty one at the end. Raises OSError.

    They are closed, and missing, if this process has no room for all of them and a spare one.
    """
    fds: list[int] = []
    spare.free()
    try:
        size = socket.CMSG_SPACE(_MOST_FDS * 4)
        message, control, flags, _ = end.recvmsg(INLINE, size, socket.MSG_CMSG_CLOEXEC)
        for _, _, payload in control:
            fds += array.array("i", payload)
        if message == _IN_MEMFD:
            if not fds:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            with os.fdopen(fds.pop(), "rb") as file:
                file.seek(0)
                message = file.read()
    finally:
        full = not spare.fill()
    if full or flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        fds = []
        spare.fill()
    return message, fds
