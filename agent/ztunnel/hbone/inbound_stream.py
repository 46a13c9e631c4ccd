# SPDX-License-Identifier: Apache-2.0
"""A stream of HBONE that arrived for a pod: connects to the application and relays."""

from __future__ import annotations

import os
import socket

from agent.core.errors import SluiceError
from agent.ztunnel.hbone import connect_request
from agent.ztunnel.hbone.frames import reset_text
from agent.ztunnel.hbone.next_hop import Address, Admission
from agent.ztunnel.hbone.session_engine import SessionEngine
from agent.ztunnel.hbone.session_events import Headers
from agent.ztunnel.hbone.stream_relay import StreamRelay
from agent.ztunnel.hbone.tls_session import TlsSession
from agent.ztunnel.relay import poller
from agent.ztunnel.relay.pod_context import Ends, InboundEnds, PodContext, now
from agent.ztunnel.relay.upstream import shut
from agent.ztunnel.telemetry.records import close_by
from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag

_UNREACHABLE = 503


class InboundStream:
    """Belongs to `pod.live` from `open` until it is recorded."""

    def __init__(
        self, *, pod: PodContext, engine: SessionEngine, session: TlsSession, stream: int, peer: Address,
        identity: str, admission: Admission,
    ) -> None:  # fmt: skip
        """Takes the client's address and identity, and where the stream goes."""
        self._pod = pod
        self._session = session
        self._stream = stream
        self._peer = peer
        self._identity = identity
        self._admission = admission
        self._application: socket.socket | None = None
        self._relay = StreamRelay(engine=engine, session=session, stream=stream, user=self, done=self._relayed)
        self._ends: Ends | None = None
        self._answered = False
        self._began = now()
        self._note = ""
        self._done = False

    def open(self) -> None:
        """Starts to connect to the application. A failure is answered and recorded, never raised."""
        self._pod.live.add(self)
        self._pod.count(self, self._admission.parties, self._began)
        address = self._admission.address
        self._pod.inbound[self] = InboundEnds(self._peer, address, self._identity)
        try:
            if not self._admission.keep_source or self._peer[0] == address[0]:
                self._application = self._pod.upstream.connect(address)
            else:
                self._application, self._note = self._pod.upstream.connect_for(self._peer, address)
            self._ends = self._pod.connects_to(address, self._application)
            self._pod.engine.connects.add(self)
            self._pod.engine.poller.add(self._application.fileno(), self._event)
        except OSError as error:
            self._refuse(close_by(error.errno), error.strerror or str(error))
        except SluiceError as error:
            self._refuse("error", str(error))

    def expire(self) -> None:
        if not self._answered and not self._done:
            self._refuse("timeout", "connect timed out")

    def abort(self) -> None:
        self._end("drained", "")

    def revoke(self, why: str, flag: ResponseFlag) -> None:
        self._end("refused", why, flag)

    def moved(self) -> tuple[int, int]:
        return self._relay.received, self._relay.sent

    def _event(self, mask: int) -> None:
        if self._answered:
            self._relay.event(mask)
        elif self._application is not None and mask & (poller.WRITE | poller.END):
            self._connected(self._application, mask)

    def _connected(self, application: socket.socket, mask: int) -> None:
        failed = application.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            self._refuse(close_by(failed), os.strerror(failed))
            return
        self._answered = True
        self._pod.engine.connects.settle(self)
        self._session.answer(self._stream, connect_request.response(200, self._admission.fields))
        if self._done:  # the session ended while the answer was sent
            return
        try:
            self._relay.connect(application, self._admission.first)
            self._relay.event(mask)
        except OSError as error:
            self._relayed(error, "")

    def _refuse(self, close: str, error: str) -> None:
        """Answers that the application cannot be reached."""
        if not self._done and not self._answered:
            self._answered = True
            self._session.answer(self._stream, connect_request.response(_UNREACHABLE), end=True)
        self._end(close, error, ResponseFlag.CONNECT)

    # The stream (see StreamUser)

    def answered(self, headers: Headers) -> None:
        """Clients send no second header block."""

    def arrived(self, payload: memoryview) -> None:
        self._relay.arrived(payload)

    def peer_ended(self) -> None:
        self._relay.peer_ended()

    def peer_reset(self, code: int) -> None:
        self._end("reset", reset_text(code))

    def may_send(self) -> None:
        self._relay.may_send()

    def session_lost(self, why: str) -> None:
        self._end("error", why, self._session.failure)

    def _relayed(self, error: OSError | None, why: str) -> None:
        if error is not None:
            self._end(close_by(error.errno, "reset"), os.strerror(error.errno) if error.errno else "")
        else:
            self._end("error" if why else "fin", why)

    def _end(self, close: str, error: str, flag: ResponseFlag | None = None) -> None:
        if self._done:
            return
        self._done = True
        self._relay.fail(error)
        if self._application is not None:
            self._pod.engine.poller.remove(self._application.fileno())
            shut(self._application, close)
            self._pod.upstream.release(self._admission.address)
        self._pod.engine.connects.settle(self)
        if self._ends is not None:
            self._pod.connecting.pop(self._ends, None)
        self._pod.end(
            self,
            kind="hbone",
            reporter=Reporter.DESTINATION,
            began=self._began,
            source=self._peer,
            destination=self._admission.address,
            close=close,
            error=error,
            note=self._note,
            flag=flag,
        )
