# SPDX-License-Identifier: Apache-2.0
"""The HBONE sessions of one pod: those that it opens, pooled, and those that arrive."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from agent.core.errors import SluiceError
from agent.kernel.accepting import Seldom
from agent.ztunnel.hbone import connect_request, limits
from agent.ztunnel.hbone.arrivals import Arrivals
from agent.ztunnel.hbone.inbound_stream import InboundStream
from agent.ztunnel.hbone.next_hop import Admission, InboundRequest, NoHop, PodIdentity, Router
from agent.ztunnel.hbone.pool import Pool, SessionKey
from agent.ztunnel.hbone.session_engine import SessionEngine
from agent.ztunnel.hbone.session_events import Headers
from agent.ztunnel.hbone.session_transport import SocketTransport
from agent.ztunnel.hbone.tls_session import TlsSession
from agent.ztunnel.relay.original_dst import Address, plain
from agent.ztunnel.relay.pod_context import Ends, PodContext, RefusedError
from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag
from agent.ztunnel.tls.contexts import ContextStore
from agent.ztunnel.tls.peer_checks import check_server, client_identity
from agent.ztunnel.tls.spiffe import SpiffeId


class SessionUser(Protocol):
    """A stream that waits for a session of the pool."""

    def session_ready(self, session: TlsSession) -> None:
        """Takes the session, which has room for a stream."""

    def session_failed(self, why: str, flag: ResponseFlag) -> None:
        """Ends the stream: no session could be made."""


class PodSessions:
    """Made when the pod starts; `close` ends all sessions."""

    def __init__(self, pod: PodContext, engine: SessionEngine, contexts: ContextStore, router: Router) -> None:
        self.engine = engine
        self.peer = ""
        self.pod = pod
        self.contexts = contexts
        self.router = router
        self.identity = PodIdentity(pod.uid, pod.add.namespace, pod.add.name, pod.add.service_account)
        self.arrived: Arrivals[TlsSession] = Arrivals(engine.unfinished, pod.engine.share)
        self.refusals = Seldom(logging.INFO)
        self._pool: Pool[TlsSession, SessionUser] = Pool()
        self._notified_by = 0.0  # then peers should know that this instance drains
        contexts.get(router.identity(self.identity))  # so that they are there when the first client comes

    # Outbound

    def seek(self, key: SessionKey, user: SessionUser) -> None:
        """Calls `session_ready` or `session_failed` of the user, at once or later."""
        session = self._pool.find(key)
        if session is not None:
            user.session_ready(session)
        elif self._pool.wait(key, user):
            self._make(key)

    def leave(self, key: SessionKey, user: SessionUser) -> None:
        """Takes back `seek`."""
        self._pool.leave(key, user)

    def late(self, key: SessionKey) -> tuple[str, ResponseFlag | None]:
        """Returns what is missing when the time for a session is over, and its flag."""
        if self.contexts.get(key.source) is None:
            return f"no certificate of {key.source} yet", ResponseFlag.IDENTITY
        return "connect timed out", None

    def _make(self, key: SessionKey) -> None:
        contexts = self.contexts.get(key.source)
        if contexts is None:
            self.contexts.wait(key.source, partial(self._make, key))
            return
        try:
            connecting = self.pod.upstream.connect(key.address, (key.source_ip, 0, *key.address[2:]))
        except (OSError, SluiceError) as error:
            self._failed(key, str(getattr(error, "strerror", None) or error), ResponseFlag.CONNECT)
            return
        owner = _Opened(self, key, self.pod.connects_to(key.address, connecting))
        transport = SocketTransport(self.engine.poller, connecting)
        session = TlsSession(engine=self.engine, owner=owner, transport=transport, context=contexts.client, client=True)
        try:
            session.start()
        except OSError as error:  # out of memory
            session.close(why=error.strerror or str(error))

    def made(self, key: SessionKey, session: TlsSession) -> None:
        """Serves those that wait for the session."""
        users, more = self._pool.made(key, session)
        for user in users:
            user.session_ready(session)
        if more:
            if users:
                self._make(key)
            else:
                self._failed(key, "the peer takes no streams", ResponseFlag.CONNECT)

    def ended(self, key: SessionKey, session: TlsSession, why: str, *, was_made: bool) -> None:
        self.pod.upstream.release(key.address)
        if was_made:
            self._pool.ended(key, session)
        else:
            self._failed(key, why, session.failure)

    def _failed(self, key: SessionKey, why: str, flag: ResponseFlag) -> None:
        for user in self._pool.failed(key):
            user.session_failed(why, flag)

    # Inbound

    def certified(self) -> bool:
        return self.contexts.get(self.router.identity(self.identity)) is not None

    def when_certified(self, act: Callable[[], None]) -> None:
        """Calls `act` once the pod has a certificate; call it only while `certified` is False."""
        self.contexts.wait(self.router.identity(self.identity), act)

    def accept(self, client: socket.socket, peer: Address) -> None:
        """Takes over an accepted, non-blocking connection."""
        contexts = self.contexts.get(self.router.identity(self.identity))
        now = self.engine.poller.loop.time()
        address = plain(peer)
        refusal = self.arrived.refusal(address[0], now) if contexts is not None else "no certificate yet"
        if contexts is None or refusal:
            client.close()
            self.pod.warnings.log(f"pod {self.pod.name}: HBONE connection from {address[0]} refused: {refusal}")
            return
        session = TlsSession(
            engine=self.engine,
            owner=_Arrived(self, address, plain(client.getsockname())),
            transport=SocketTransport(self.engine.poller, client),
            context=contexts.server,
            client=False,
        )
        self.arrived.add(session, address[0], now)
        self.count_socket(1)
        try:
            session.start()
        except OSError as error:  # out of memory
            session.close(why=error.strerror or str(error))

    def count_socket(self, change: int) -> None:
        if self.pod.engine.traffic is not None:
            self.pod.engine.traffic.metrics.sockets(Reporter.DESTINATION, change)

    # End

    def drain(self) -> None:
        """Asks the peers to open new streams with another instance."""
        self._notified_by = self.engine.poller.loop.time() + limits.NOTIFY_SECONDS
        for session in self.arrived.sessions():
            session.drain()

    def is_notifying(self) -> bool:
        """Returns True while a peer may not have heard of the drain: a stream that it has opened may be on the way."""
        idle = any(session.open and not session.streams for session in self.arrived.sessions())
        return idle and self.engine.poller.loop.time() < self._notified_by

    def close(self) -> None:
        for session in (*self.arrived.sessions(), *self._pool.sessions()):
            session.close(why="drained")


class _Opened:
    """The owner of a session that this pod opens."""

    def __init__(self, sessions: PodSessions, key: SessionKey, ends: Ends) -> None:
        self._sessions = sessions
        self._key = key
        self._ends = ends
        self._made = False

    def authenticate(self, session: TlsSession, certificate: dict[str, Any] | None) -> None:
        check_server(certificate, self._key.identities)
        self._made = True
        self._sessions.made(self._key, session)

    def opened(self, session: TlsSession, stream: int, headers: Headers) -> None:
        """Servers open no streams: the core refuses them."""

    def closed(self, session: TlsSession, why: str) -> None:
        self._sessions.pod.connecting.pop(self._ends, None)
        self._sessions.ended(self._key, session, why, was_made=self._made)


class _Arrived:
    """The owner of a session that a client opened."""

    def __init__(self, sessions: PodSessions, peer: Address, local: Address) -> None:
        self._sessions = sessions
        self._peer = peer
        self._local = local
        self._identity: SpiffeId | None = None

    def authenticate(self, session: TlsSession, certificate: dict[str, Any] | None) -> None:
        own = self._sessions.router.identity(self._sessions.identity)
        self._identity = client_identity(certificate, own.trust_domain)
        self._sessions.arrived.finish(session)

    def opened(self, session: TlsSession, stream: int, headers: Headers) -> None:
        assert self._identity is not None
        request = connect_request.parse(headers)
        if request is None:
            session.answer(stream, connect_request.response(400), end=True)
            return
        sessions = self._sessions
        pod = sessions.pod
        decision: Admission | NoHop
        if refusal := sessions.arrived.stream_refusal(session, len(pod.live)):
            decision = NoHop(refusal)
            pod.warnings.log(f"pod {pod.name}: HBONE stream from {self._peer[0]} refused: {refusal}")
        else:
            decision = sessions.router.inbound(InboundRequest(
                pod=sessions.identity, peer=self._peer, peer_identity=self._identity, local=self._local,
                connect=request,
            ))  # fmt: skip
        if isinstance(decision, NoHop):
            session.answer(stream, connect_request.response(decision.status), end=True)
            refused = RefusedError(decision.reason, decision.parties, decision.flag)
            sessions.pod.refuse(Reporter.DESTINATION, refused, self._peer, self._local)
            return
        user = InboundStream(
            pod=sessions.pod,
            engine=sessions.engine,
            session=session,
            stream=stream,
            peer=self._peer,
            identity=str(self._identity),
            admission=decision,
        )
        session.adopt(stream, user)
        user.open()

    def closed(self, session: TlsSession, why: str) -> None:
        self._sessions.arrived.remove(session)
        self._sessions.count_socket(-1)
        if self._identity is None:
            self._sessions.pod.refuse(Reporter.DESTINATION, RefusedError(why), self._peer, self._local)
            self._sessions.refusals.log(
                f"pod {self._sessions.pod.name}: HBONE session of {self._peer[0]} refused: {why}"
            )
