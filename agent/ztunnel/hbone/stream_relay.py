# SPDX-License-Identifier: Apache-2.0
"""Moves bytes between a socket of an application and a stream, in both directions.

Each side's end and reset becomes the other's. Bytes that the application does not take are held, at most a window of
them: the peer gets no credit for them. A stream without room is not read from the application.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from agent.ztunnel.hbone.frames import ErrorCode
from agent.ztunnel.hbone.session_engine import SessionEngine
from agent.ztunnel.hbone.session_users import StreamUser
from agent.ztunnel.hbone.tls_session import TlsSession
from agent.ztunnel.relay import poller

_ROUNDS = 8  # then others get their turn

Done = Callable[[OSError | None, str], None]  # (error of the application's socket, why the stream failed)


class StreamRelay:
    """Holds what arrives until `connect`, then relays. Owns neither of the two; calls `done` once, at the end."""

    __slots__ = (
        "_application", "_done", "_ending", "_engine", "_finished", "_held", "_over", "_peer_ended", "_readable",
        "_session", "_shut", "_stream", "_user", "received", "sent",
    )  # fmt: skip

    def __init__(
        self, *, engine: SessionEngine, session: TlsSession, stream: int, user: StreamUser, done: Done
    ) -> None:
        self._engine = engine
        self._session = session
        self._stream = stream
        self._user = user
        self._done = done
        self._application: socket.socket | None = None
        self._held: deque[memoryview] = deque()
        self._readable = False  # the application's socket may have bytes, or its end
        self._ending = False  # its end is known to be in the queue
        self._finished = False  # its end has been passed on
        self._peer_ended = False
        self._shut = False  # the peer's end has been passed on
        self._over = False
        self.sent = 0  # bytes of the application that are on the stream
        self.received = 0  # bytes of the stream that the application's socket has taken

    def connect(self, application: socket.socket, first: bytes = b"") -> None:
        """Begins to relay; `first` is for the application, before the stream's bytes. Raises OSError.

        The caller passes the socket's events on to `event`, from its present state on.
        """
        self._application = application
        if first:
            application.send(first)  # the buffer of a new socket is empty
        self._deliver()

    # From the stream

    def arrived(self, payload: memoryview) -> None:
        if self._over:
            return
        if self._application is None or self._held:
            self._held.append(memoryview(bytes(payload)))
            return
        try:
            count = self._application.send(payload)
        except BlockingIOError:
            count = 0
        except OSError as error:
            self._finish(error, "")
            return
        self.received += count
        self._session.taken(self._stream, count)
        if count < len(payload):
            self._held.append(memoryview(bytes(payload[count:])))

    def peer_ended(self) -> None:
        self._peer_ended = True
        self._deliver()

    def _deliver(self) -> None:
        """Hands on what is held, then the end of the stream."""
        application = self._application
        if application is None or self._over:
            return
        try:
            while self._held:
                count = application.send(self._held[0])
                self.received += count
                self._session.taken(self._stream, count)
                rest = self._held.popleft()[count:]
                if rest:
                    self._held.appendleft(rest)
            if self._peer_ended and not self._shut:
                self._shut = True
                application.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError as error:
            self._finish(error, "")
            return
        self._end_if_complete()

    # From the application

    def may_send(self) -> None:
        if self._readable:
            self._pump()

    def event(self, mask: int) -> None:
        if self._over:
            return
        if mask & poller.WRITE and self._held:
            self._deliver()
        if mask & poller.READ and not self._over:
            self._readable = True
            if mask & poller.END:
                self._ending = True
            self._pump()
        if mask & poller.ERROR and not self._over:
            assert self._application is not None
            number = self._application.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._finish(ConnectionResetError(number, "") if number else ConnectionResetError(), "")

    def _pump(self) -> None:
        """Sends what the application has written."""
        application = self._application
        if application is None or self._finished or self._over:
            return
        payload = self._engine.buffers.frame_payload
        for _ in range(_ROUNDS):
            room = min(self._session.room(self._stream), len(payload))
            if not room:
                self._session.wait(self._user)
                return
            try:
                count = application.recv_into(payload, room)
            except BlockingIOError:
                self._readable = False
                return
            except OSError as error:
                self._finish(error, "")
                return
            if not count:
                self._finished = True
                self._session.end(self._stream)
                self._end_if_complete()
                return
            self.sent += count
            self._session.send(self._stream, count)
            if count < room and not self._ending:
                self._readable = False
                return
        self._engine.poller.loop.call_soon(self._pump)

    def _end_if_complete(self) -> None:
        if self._finished and self._peer_ended and not self._held:
            self._finish(None, "")

    def fail(self, why: str) -> None:
        """Ends the relay: the stream is gone."""
        self._finish(None, why)

    def _finish(self, error: OSError | None, why: str) -> None:
        if self._over:
            return
        self._over = True
        self._held.clear()
        self._session.release(self._user, self._stream, ErrorCode.CANCEL)
        self._done(error, why)
