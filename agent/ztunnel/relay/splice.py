# SPDX-License-Identifier: Apache-2.0
"""One direction of a connection: moves bytes from one socket to another without loss.

Short exchanges are copied once through a buffer. A read that fills the buffer is a stream, and from then on bytes move
by splice through a pipe, without a copy to user space. Reading happens only while the pipe is empty: so EAGAIN always
means that the source has no data, and a slow reader stops its sender (back-pressure).

Urgent data is forwarded in its place in the stream, but as normal data (SO_OOBINLINE). The kernel ends a read before
it, and splice never gets past it: so after the first urgent data everything is copied, until EAGAIN.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket

CHUNK = 16 << 10  # must fit into an empty pipe of the default size (64 KiB)
PIPE_SIZE = 1 << 20
ROUNDS = 8  # then others get their turn
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Half:
    """Moves bytes from `source` to `sink`, both non-blocking. Owns its pipe, not the sockets."""

    __slots__ = ("buffered", "ended", "finished", "moved", "pipe", "sink", "source", "urgent")

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.pipe: tuple[int, int] | None = None
        self.buffered = 0  # bytes in the pipe
        self.moved = 0  # bytes handed to the sink
        self.ended = False  # a FIN is known to be in the source's queue, or has been read
        self.finished = False  # the FIN has been passed on
        self.urgent = False  # there was urgent data

    def pump(self) -> bool:
        """Moves bytes; returns True if there may be more: call it again soon. Raises OSError.

        Has no effect after the end: an event may have come between a call and the next one that it asked for.
        """
        if self.finished:
            return False
        for _ in range(ROUNDS):
            if self.buffered and not self._drain():
                return False
            if not (self._fill() if self.pipe is None or self.urgent else self._fill_pipe()):
                return False
        return True

    @property
    def is_short(self) -> bool:
        """Returns True if each of its reads was followed by one write, so that others may do both (see pair_copier)."""
        return not (self.pipe or self.ended or self.urgent)

    def resume(self, rest: bytes) -> None:
        """Goes on after others have read a stream, and `rest` of it is still unwritten. Raises OSError."""
        pipe = self._open_pipe()
        if rest:
            self.buffered = os.write(pipe, rest)

    def close(self) -> None:
        if self.pipe is not None:
            os.close(self.pipe[0])
            os.close(self.pipe[1])
            self.pipe = None

    def _fill(self) -> bool:
        """Copies one chunk; returns True to continue. A short read means an empty queue (epoll(7)) or a FIN."""
        try:
            data = self.source.recv(CHUNK)
        except BlockingIOError:
            return False
        if not data:
            return self._finish()
        try:
            sent = self.sink.send(data)
        except BlockingIOError:
            sent = 0
        self.moved += sent
        if sent < len(data):
            self.buffered = os.write(self._open_pipe(), memoryview(data)[sent:])
            return True
        if len(data) == CHUNK:
            self._open_pipe()
            return True
        return self.ended or self.urgent

    def _fill_pipe(self) -> bool:
        assert self.pipe is not None
        try:
            self.buffered = os.splice(self.source.fileno(), self.pipe[1], PIPE_SIZE, flags=_FLAGS)
        except BlockingIOError:
            return False
        # 0 means the end, or urgent data that came with it: only a read shows which.
        return True if self.buffered else self._fill()

    def _drain(self) -> bool:
        """Empties the pipe; returns False if the sink is full: its next edge calls again."""
        assert self.pipe is not None
        try:
            while self.buffered:
                count = os.splice(self.pipe[0], self.sink.fileno(), self.buffered, flags=_FLAGS)
                self.buffered -= count
                self.moved += count
        except BlockingIOError:
            return False
        return True

    def _finish(self) -> bool:
        self.ended = self.finished = True
        self.sink.shutdown(socket.SHUT_WR)
        return False

    def _open_pipe(self) -> int:
        if self.pipe is not None:
            return self.pipe[1]
        self.pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # the limit for unprivileged pipes; a smaller one is only slower
            fcntl.fcntl(self.pipe[1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        return self.pipe[1]
