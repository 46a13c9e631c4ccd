# SPDX-License-Identifier: Apache-2.0
"""HBONE of all pods of one event loop."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from agent.ztunnel.hbone import limits
from agent.ztunnel.hbone.inner_session import InnerSession
from agent.ztunnel.hbone.next_hop import NoHop, PlainHop, Router
from agent.ztunnel.hbone.outbound_stream import OutboundStream
from agent.ztunnel.hbone.pod_sessions import PodSessions
from agent.ztunnel.hbone.session_engine import SessionEngine
from agent.ztunnel.hbone.work_buffers import WorkBuffers
from agent.ztunnel.host_resolver import HostResolver
from agent.ztunnel.relay.held_connections import HeldConnections
from agent.ztunnel.relay.original_dst import Address
from agent.ztunnel.relay.pod_context import PodContext, RefusedError
from agent.ztunnel.relay.poller import Deadlines, Poller
from agent.ztunnel.telemetry.records import Began
from agent.ztunnel.telemetry.response_flags import ResponseFlag
from agent.ztunnel.tls.contexts import ContextStore
from agent.ztunnel.tls.spiffe import parse

if TYPE_CHECKING:  # it loads the library cryptography
    from agent.ztunnel.tls.revocation import Revocations


class HboneTunnels:
    """Implements pod_context.Tunnels. For one thread."""

    def __init__(
        self, poller: Poller, contexts: ContextStore, router: Router, *, hosts: HostResolver,
        revocations: Revocations | None = None,
    ) -> None:  # fmt: skip
        self._engine = SessionEngine(
            poller=poller,
            buffers=WorkBuffers(),
            shakes=Deadlines(poller.loop, limits.HANDSHAKE_SECONDS),
            pings=Deadlines(poller.loop, limits.PING_SECONDS),
            revocations=revocations,
        )
        self._contexts = contexts
        self._router = router
        self._hosts = hosts
        self._pods: dict[str, PodSessions] = {}
        self._waiting = HeldConnections(poller, lambda pod: router.knows(self._pods[pod.uid].identity))
        self._uncertified = HeldConnections(poller, lambda pod: self._pods[pod.uid].certified())

    @cached_property
    def _inner_engine(self) -> SessionEngine:
        """The engine of inner sessions, which work while an outer one reads its buffers, and so have their own."""
        return replace(self._engine, buffers=WorkBuffers())

    def start(self, pod: PodContext) -> None:
        self._pods[pod.uid] = PodSessions(pod, self._engine, self._contexts, self._router)

    def hold(self, pod: PodContext, resume: Callable[[], None], drop: Callable[[], None]) -> bool:
        return self._waiting.hold(pod, resume, drop)

    def resolve(self, host: str, done: Callable[[], None]) -> None:
        self._hosts.resolve(host, done)

    def outbound(
        self, pod: PodContext, client: socket.socket, source: Address, destination: Address, began: Began
    ) -> PlainHop | None:
        sessions = self._pods[pod.uid]
        hop = self._router.outbound(sessions.identity, source, destination)
        if isinstance(hop, NoHop):
            raise RefusedError(hop.reason, hop.parties, hop.flag, hop.unresolved)
        if isinstance(hop, PlainHop):
            return hop
        OutboundStream(
            pod=pod, sessions=InnerSession(sessions, self._inner_engine, hop, hop.inner) if hop.inner else sessions,
            hop=hop, client=client, source=source, destination=destination, began=began,
        ).open()  # fmt: skip
        return None

    def inbound_plain(self, pod: PodContext, source: Address, destination: Address) -> PlainHop:
        hop = self._router.inbound_plain(self._pods[pod.uid].identity, source, destination)
        if isinstance(hop, NoHop):
            raise RefusedError(hop.reason, hop.parties, hop.flag)
        return hop

    def reconsider(self) -> None:
        """Resumes what waited for the mesh, and ends the inbound connections that it does not allow any more.

        Call it after each change of the mesh.
        """
        self._waiting.changed()
        for sessions in self._pods.values():
            for connection, ends in tuple(sessions.pod.inbound.items()):
                if why := self._router.refused_now(sessions.identity, ends.peer, ends.target, parse(ends.identity)):
                    connection.revoke(f"{why}, after a change of policies", ResponseFlag.DENIED)

    def accept(self, pod: PodContext, client: socket.socket, peer: Address) -> None:
        """Takes over an accepted, non-blocking connection; it waits for the pod's first certificate."""
        sessions = self._pods[pod.uid]
        accept = partial(sessions.accept, client, peer)
        if self._uncertified.hold(pod, accept, client.close):
            sessions.when_certified(self._uncertified.changed)
        else:
            accept()

    def drain(self, pod: PodContext) -> None:
        self._pods[pod.uid].drain()

    def is_notifying(self, pod: PodContext) -> bool:
        return self._pods[pod.uid].is_notifying()

    def close(self, pod: PodContext) -> None:
        if sessions := self._pods.pop(pod.uid, None):
            sessions.close()

    def stop(self) -> None:
        """Ends the timers; call it after the last pod is closed."""
        self._waiting.close()
        self._uncertified.close()
        self._engine.shakes.close()
        self._engine.pings.close()
