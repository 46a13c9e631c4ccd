# SPDX-License-Identifier: Apache-2.0
"""One connection of HBONE: a transport, TLS and HTTP/2 in it, and the users of its streams."""

from __future__ import annotations

import errno
import os
import ssl
from typing import Any, Protocol

from agent.core.errors import SluiceError
from agent.ztunnel.hbone import frames, limits
from agent.ztunnel.hbone.frames import ErrorCode, Http2Error
from agent.ztunnel.hbone.session_core import SessionCore
from agent.ztunnel.hbone.session_engine import SessionEngine
from agent.ztunnel.hbone.session_events import Answered, Ended, GoneAway, Headers, Opened, Reset
from agent.ztunnel.hbone.session_liveness import SessionLiveness
from agent.ztunnel.hbone.session_transport import Transport
from agent.ztunnel.hbone.session_users import StreamUser
from agent.ztunnel.hbone.tls_codec import TlsCodec, TlsError
from agent.ztunnel.hbone.tls_output import TlsOutput
from agent.ztunnel.hbone.work_buffers import SIZE
from agent.ztunnel.relay import poller
from agent.ztunnel.telemetry.response_flags import ResponseFlag

_ROUNDS = 4  # of reading, then others get their turn


class SessionOwner(Protocol):
    """The maker of a session, which outlives it."""

    def authenticate(self, session: TlsSession, certificate: dict[str, Any] | None) -> None:
        """Checks the peer after the handshake. Raises SluiceError if the peer is not accepted."""

    def opened(self, session: TlsSession, stream: int, headers: Headers) -> None:
        """Handles a client's request for a stream: `TlsSession.adopt` takes it, `answer` refuses it."""

    def closed(self, session: TlsSession, why: str) -> None:
        """Handles the end of the session."""


class TlsSession:
    """Owns the transport. `open` is True from the end of the handshake to the session's end; `failure` says why."""

    __slots__ = (
        "_codec", "_connecting", "_context", "_core", "_engine", "_large", "_liveness", "_output", "_owner",
        "_reading", "_transport", "_users", "_waiting", "client", "closed", "failure", "open",
    )  # fmt: skip
    # Made when they are needed: a client that connects and is silent costs little.
    _codec: TlsCodec
    _output: TlsOutput
    _core: SessionCore

    def __init__(
        self, *, engine: SessionEngine, owner: SessionOwner, transport: Transport, context: ssl.SSLContext,
        client: bool,
    ) -> None:  # fmt: skip
        self.open = False
        self.closed = False
        self.failure = ResponseFlag.CONNECT
        self._engine = engine
        self._owner = owner
        self._transport = transport
        self._context: ssl.SSLContext | None = context  # until the handshake begins
        self._connecting = self.client = client
        self._large = False  # the next read
        self._users: dict[int, StreamUser] = {}
        self._waiting: dict[StreamUser, None] = {}
        self._reading = False
        self._liveness = SessionLiveness()

    def start(self) -> None:
        """Raises OSError: out of memory."""
        self._engine.shakes.add(self)
        self._transport.start(self._event)

    # Streams

    @property
    def room_for_streams(self) -> int:
        """Returns how many more streams this end, a client, may open."""
        return 0 if self.closed else self._core.most_streams - self._core.open_streams

    def request(self, headers: Headers, user: StreamUser) -> int:
        """Opens a stream; returns its number."""
        stream = self._core.open(headers)
        self._users[stream] = user
        self._write_out()
        return stream

    @property
    def streams(self) -> int:
        return len(self._users)

    def adopt(self, stream: int, user: StreamUser) -> None:
        """Sets the user of a stream that a client has opened."""
        self._users[stream] = user

    def answer(self, stream: int, headers: Headers, *, end: bool = False) -> None:
        self._core.answer(stream, headers, end=end)
        if end:
            self._users.pop(stream, None)
        self._write_out()

    def room(self, stream: int) -> int:
        """Returns how many bytes the stream may send now; 0 if it must `wait`."""
        if self._output.size >= limits.FULL_OUTPUT:
            return 0
        return max(self._core.room(stream), 0)

    def wait(self, user: StreamUser) -> None:
        """Calls `may_send` when there may be room."""
        self._waiting[user] = None

    def send(self, stream: int, count: int) -> None:
        """Sends `count` bytes, at most `room`, which are in the frame buffer of the engine."""
        buffers = self._engine.buffers
        self._encrypt_output()
        frames.write_data_header(buffers.frame, count, stream)
        self._core.sent(stream, count)
        self._encrypt(buffers.frame_view[: frames.HEADER_SIZE + count])
        self._output.flush()

    def taken(self, stream: int, count: int) -> None:
        """Notes that the application has taken received bytes."""
        self._core.taken(stream, count)
        if self._core.output and not self._reading:
            self._write_out()

    def end(self, stream: int) -> None:
        """Sends the end of the stream."""
        self._core.end(stream)
        self._write_out()

    def release(self, user: StreamUser, stream: int, code: ErrorCode = ErrorCode.CANCEL) -> None:
        """Gives the stream up; it is reset if it has not ended."""
        self._waiting.pop(user, None)
        if self._users.pop(stream, None) is not None and not self.closed:
            self._core.reset(stream, code)
            self._write_out()
            self._end_if_drained()

    # End of the session

    def drain(self) -> None:
        """Asks the client to open no more streams here. The session ends with its last stream, once it has heard."""
        if self.open:
            self._core.drain()
            self._core.gone = True
            self._write_out()

    def retire(self) -> None:
        """Takes no more streams. The session ends with its last one."""
        self._core.gone = True
        self._end_if_drained()

    def close(self, code: ErrorCode = ErrorCode.NO_ERROR, why: str = "closed") -> None:
        """Ends the session; its streams are lost."""
        if self.closed:
            return
        if self.open:
            self._core.close(code)
            self._encrypt_output()
            self._codec.close()
            self._output.flush()
        self._lose(why)

    def peer_chain(self) -> list[bytes]:
        """Returns the verified certificates of the peer as DER, its own first."""
        return self._codec.peer_chain()

    def revoke(self, why: str) -> None:
        """Ends the session, because a certificate of its peer is revoked."""
        self.failure = ResponseFlag.REVOKED
        self.close(why=why)

    def expire(self) -> None:
        """Ends a session that has not finished its handshake in time; checks an open one every PING_SECONDS."""
        if self.open:
            self._check_peer()
        elif self.closed:
            pass  # by another one of the same moment
        elif self._connecting:
            self._lose("connect timed out")
        else:
            self.failure = ResponseFlag.TLS_FAILURE
            self._lose("the TLS handshake timed out")

    def _check_peer(self) -> None:
        answered = self._core.ping_answered
        if why := self._liveness.verdict(ping_answered=answered, may_idle=bool(self._users) or not self.client):
            self.close(why=why)
            return
        self._engine.pings.add(self)
        if answered:
            self._core.ping()
            self._write_out()

    def _end_if_drained(self) -> None:
        if self.open and self._core.gone and not self._users and (self.client or self._core.ping_answered):
            self._encrypt_output()
            self._output.flush()
            if not self._output.size:  # else `_write_more` comes back
                self.close()

    def _lose(self, why: str) -> None:
        if self.closed:
            return
        self.closed = True
        self.open = False
        self._engine.shakes.settle(self)
        self._engine.pings.settle(self)
        self._transport.close()
        if self._engine.revocations is not None:
            self._engine.revocations.leave(self)
        users = list(self._users.values())
        self._users.clear()
        self._waiting.clear()
        self._owner.closed(self, why)
        for user in users:
            user.session_lost(why)

    # Events of the socket

    def _event(self, mask: int) -> None:
        if self._connecting and mask & (poller.WRITE | poller.END):
            if failed := self._transport.connect_failure():
                self._lose(failed)
                return
            self._connecting = False
            self._begin()
            self._guard(self._shake_hands)
        if mask & poller.READ and not self.closed:
            self._guard(self._read, bool(mask & poller.END))
        if mask & poller.WRITE and not self.closed and self._context is None:
            self._guard(self._write_more)

    def _guard(self, step: Any, *arguments: bool) -> None:
        """Runs a step; an error in it ends the session."""
        try:
            step(*arguments)
        except Http2Error as error:
            self.failure = ResponseFlag.H2_HANDSHAKE
            self.close(error.code, str(error))
        except OSError as error:
            self._lose(os.strerror(error.errno) if error.errno else str(error))
        except SluiceError as error:
            self.failure = ResponseFlag.TLS_FAILURE
            self._abandon(str(error))
        except BaseException:
            self._lose("a defect of ztunnel")  # bytes may be lost
            raise

    def _abandon(self, why: str) -> None:
        """Ends a session after an error of TLS: an alert may be waiting to be sent."""
        if not self.closed:
            self._output.flush()
        self._lose(why)

    def _begin(self) -> None:
        assert self._context is not None
        self._codec = TlsCodec(self._context, client=self.client)
        self._output = TlsOutput(self._transport, self._codec.outgoing)
        self._context = None

    def _shake_hands(self) -> None:
        done = self._codec.shake_hands()
        if not done:
            self._output.flush()
            return
        self._core = SessionCore(client=self.client, now=self._engine.poller.loop.time())
        if self._engine.revocations is not None:
            self._engine.revocations.admit(self)
        if not self.closed:
            self._owner.authenticate(self, self._codec.peer_certificate())
        if not self.closed:
            self.open = True
            self._engine.shakes.settle(self)
            self._engine.pings.add(self)
            self._write_out()

    def _read(self, ended: bool = False) -> None:
        if self.closed:
            return
        loop = self._engine.poller.loop
        for _ in range(_ROUNDS):
            size = SIZE if self._large else limits.SMALL_READ
            records = self._engine.buffers.records[:size]
            try:
                count = self._transport.recv_into(records)
            except BlockingIOError:
                break
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "closed by the peer")
            self._liveness.heard = True
            began = loop.time()
            if self._context is not None:
                self._begin()
            self._codec.feed(records[:count])
            if not self.open:
                self._shake_hands()
            if self.open:
                self._process()
            if self.closed:
                return
            if count < size and not ended:
                break
            self._large = (loop.time() - began) * SIZE < limits.TURN_SECONDS * count
            if not self._large:
                loop.call_soon(self._guard, self._read, ended)
                break
        else:
            loop.call_soon(self._guard, self._read, ended)
        self._write_out()
        if self.open and self._core.window_opened:
            self._wake()
        self._end_if_drained()

    def _process(self) -> None:
        now = self._engine.poller.loop.time()
        self._reading = True
        try:
            for view in self._codec.decrypt(self._engine.buffers.plain):
                for happening in self._core.receive(view, now):
                    self._dispatch(happening)
                    if self.closed:
                        return
        finally:
            self._reading = False

    def _dispatch(self, happening: Any) -> None:
        match happening:
            case frames.Data(stream, payload):
                if (user := self._users.get(stream)) is not None:
                    user.arrived(payload)
                else:
                    self._core.taken(stream, len(payload))
            case Opened(stream, headers):
                self._owner.opened(self, stream, headers)
            case Answered(stream, headers):
                if (user := self._users.get(stream)) is not None:
                    user.answered(headers)
            case Ended(stream):
                if (user := self._users.get(stream)) is not None:
                    user.peer_ended()
            case Reset(stream, code):
                self._dismiss(stream, code)
            case GoneAway(last, _):
                for stream in [number for number in self._users if number > last]:
                    self._core.reset(stream, ErrorCode.CANCEL)
                    self._dismiss(stream, ErrorCode.REFUSED_STREAM)
                self._end_if_drained()

    def _dismiss(self, stream: int, code: int) -> None:
        user = self._users.pop(stream, None)
        if user is not None:
            self._waiting.pop(user, None)
            user.peer_reset(code)
            self._end_if_drained()

    # Output

    def _write_out(self) -> None:
        """Sends what the core has produced. While input is processed, this waits for its end."""
        if self._reading or not self.open:
            return
        self._encrypt_output()
        self._output.flush()
        if self._output.size > limits.MAX_OUTPUT:
            self._lose("the peer reads no answers")

    def _encrypt_output(self) -> None:
        if self._core.output:
            made = b"".join(self._core.output)
            self._core.output.clear()
            self._encrypt(made)

    def _encrypt(self, data: memoryview | bytes) -> None:
        if not self.closed:
            try:
                self._codec.encrypt(data)
            except TlsError as error:
                self._lose(str(error))

    def _write_more(self) -> None:
        self._output.flush()
        if self._waiting:
            self._wake()
        self._end_if_drained()

    def _wake(self) -> None:
        self._core.window_opened = False
        waiting = list(self._waiting)
        self._waiting.clear()
        for user in waiting:
            if self.closed:
                return
            user.may_send()
