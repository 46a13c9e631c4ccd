# SPDX-License-Identifier: Apache-2.0
"""Captured UDP to port 53: forwards each datagram to the resolver that the pod asked, and all answers back, unchanged.

A flow is the traffic of one client port to one resolver. It has one upstream socket for its whole life, as in a pod
without ztunnel, so other protocols pass too, and so do second, late and unexpected answers. Queries and their answers
are recorded one by one, the rest by flow.

For a resolver that is silent for the time of `Engine.queries` the pod gets SERVFAIL: a resolver library then asks its
next one. A late answer still passes.

The resolver comes from the conntrack entry of the redirected datagram, or from the agent's eBPF programs where they
redirect. If neither knows it, the datagram is dropped and recorded: another resolver would answer from another view of
the names.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from functools import partial
from typing import TYPE_CHECKING

from agent.core import names
from agent.core.errors import KernelError, SluiceError
from agent.kernel.netlink.ctnetlink import Conntrack
from agent.ztunnel.dns import dnsmessage, pending_query
from agent.ztunnel.dns.pending_query import PendingQuery
from agent.ztunnel.relay import poller
from agent.ztunnel.relay.original_dst import Address
from agent.ztunnel.relay.pod_context import PodContext, now
from agent.ztunnel.relay.upstream import keep_source

if TYPE_CHECKING:
    from agent.ztunnel.telemetry.dns_metrics import DnsLabels

MOST = 4096  # flows of a pod, and queries that wait; then the oldest flow makes room, if possible an idle one
IDLE_SECONDS = 120.0  # of a flow that is not only DNS: as long as the pod's conntrack keeps it
LATE_SECONDS = 30.0  # of a flow with a silent resolver: as long as the pod's conntrack waits for an answer
_ROUNDS = 64  # datagrams read at one wake-up, then others get their turn
_LARGEST = 65535
IP_PKTINFO = 8  # linux/in.h; interface, the address to send from
_PKTINFO = struct.Struct("=i4s4x")
_KNOWN = {errno.ECONNREFUSED: "refused"}


class Resolver:
    """The DNS side of one pod: receives on its listeners, forwards upstream, answers from the same listener."""

    def __init__(self, pod: PodContext, conntrack: Conntrack) -> None:
        """Takes over `conntrack`, made inside the pod's namespace."""
        self.pod = pod
        self._conntrack = conntrack
        # In the order of their last query; `idle` has those without a pending query.
        self.flows: dict[tuple[Address, Address], DnsFlow] = {}
        self.idle: dict[DnsFlow, None] = {}
        self.waiting = 0
        self.ends: dict[Address, DnsFlow] = {}  # by the local end of the socket towards the resolver

    def receive(self, listener: socket.socket) -> None:
        """Forwards datagrams; call it when `listener` is readable."""
        for _ in range(_ROUNDS):
            try:
                datagram, client = listener.recvfrom(_LARGEST)
            except BlockingIOError:
                return
            except OSError:
                continue  # the error of an earlier answer (ICMP), not of this query
            question = dnsmessage.question(datagram)
            pass_on = partial(self._pass_on, listener, client, datagram, question)
            tunnels = self.pod.engine.tunnels if question and self.pod.engine.mesh_names is not None else None
            if tunnels is None or not tunnels.hold(self.pod, pass_on, _drop):
                pass_on()

    def _pass_on(self, listener: socket.socket, client: Address, datagram: bytes, question: bytes) -> None:
        try:
            self._decide(listener, client, datagram, question)
        except SluiceError as error:
            self.record(now(), client, None, len(datagram), 0, "error", str(error))

    def _decide(self, listener: socket.socket, client: Address, datagram: bytes, question: bytes) -> None:
        if returned := self.ends.get(client[:2]):
            returned.came_back()
            return
        found, own = self.original(listener, client)
        mesh = pending_query.ask_mesh(self.pod, datagram, question, "udp")
        if mesh.answer is not None:
            reply(listener, client, mesh.answer, given=not own)
            close = "refused" if mesh.error else "mesh"
            self.record(now(), client, found, len(datagram), len(mesh.answer), close, mesh.error)
            return
        if found is None:
            unknown = "dropped: neither conntrack nor eBPF knows the resolver that was asked"
            self.record(now(), client, None, len(datagram), 0, "error", unknown)
            return
        # `text` and `take` recognise an IPv6 address by its four parts.
        target: Address = (found[0], found[1], 0, 0) if ":" in found[0] else found
        flow = self.flows.pop((client, target), None) or DnsFlow(
            self, listener=listener, client=client, target=target, own=own
        )
        self.flows[client, target] = flow
        flow.send(datagram, question, mesh.labels)
        most = min(MOST, self.pod.engine.share)
        while len(self.flows) > most or self.waiting > most:
            spare = self.idle if self.idle and self.waiting <= most else self.flows.values()
            next(iter(spare)).end("error", f"more than {most} newer ones")

    def original(self, listener: socket.socket, client: Address) -> tuple[Address | None, bool]:
        """Returns the resolver that the client asked, never ztunnel's own port; None if unknown. Raises KernelError.

        The second value is True if the client's address is certainly its own: the eBPF programs give a socket without
        an address the pod's.
        """
        local = listener.getsockname()[:2]
        peer = (client[0], client[1])
        failure: KernelError | None = None
        found = None
        try:
            found = self._conntrack.original_destination(socket.IPPROTO_UDP, local, peer)
        except KernelError as error:  # a kernel without conntrack may still have eBPF
            failure = error
        own = found is not None and found[1] != names.DNS_PORT
        if not own:  # a flow that was not redirected in conntrack's eyes
            found = self.pod.engine.asked.resolver(listener, peer)
        if found is None and failure is not None:
            raise failure
        return None if found is None or found[1] == names.DNS_PORT else found, own

    def record(
        self,
        began: tuple[float, float],
        client: Address,
        resolver: Address | None,
        sent: int,
        received: int,
        close: str,
        error: str = "",
        kind: str = "dns",
    ) -> None:
        self.pod.record(kind, "outbound", began, client, resolver, sent, received, close, error)

    def close(self) -> None:
        for flow in tuple(self.flows.values()):
            flow.end("drained", "")
        self._conntrack.close()


class DnsFlow:
    """The traffic of one port of the pod to one resolver; in the pod's `live` while a query is pending."""

    __slots__ = (
        "_began", "_client", "_last", "_late", "_listener", "_own", "_received", "_resolver", "_sent", "_server",
        "_target", "_waiting",
    )  # fmt: skip

    def __init__(
        self, resolver: Resolver, *, listener: socket.socket, client: Address, target: Address, own: bool
    ) -> None:
        """Takes `own`: True if the resolver must see the client's address."""
        self._resolver = resolver
        self._listener = listener
        self._client = client
        self._target = target
        self._server: socket.socket | None = None
        self._own = own
        self._waiting: dict[bytes, PendingQuery] = {}  # by id
        self._late = False  # the resolver was silent for a query; its answer may still come
        self._sent = self._received = 0  # bytes of datagrams that are neither queries nor answers to pending ones
        self._began = now()
        self._last = 0.0

    def send(self, datagram: bytes, asked: bytes, labels: DnsLabels | None) -> None:
        """Forwards a datagram of the client. A failure is answered with SERVFAIL and recorded, never raised."""
        if not asked:
            self._sent += len(datagram)
        elif asked[:2] not in self._waiting:  # otherwise a repetition
            self._waiting[asked[:2]] = PendingQuery(
                self._resolver.pod, self, asked, labels, client=self._client, target=self._target, size=len(datagram)
            )
            self._resolver.waiting += 1
        try:
            with contextlib.suppress(BlockingIOError):  # a full buffer loses a datagram, as everywhere
                self._connected().send(datagram)
        except OSError as error:
            self._failed(error)
        except SluiceError as error:
            self._answer_all("error", str(error))
        self._await()

    def came_back(self) -> None:
        """Refuses queries that were sent to the resolver and arrived at ztunnel: forwarding them would be a loop."""
        self._answer_all("refused", self._resolver.pod.warn_of_loop("query"))
        self._await()

    def unanswered(self, query: PendingQuery) -> None:
        self._late = True
        self._reply(dnsmessage.failure(query.question))
        self._settle(query.question[:2], 0, "timeout", "no answer from the resolver")
        self._await()

    def expire(self) -> None:
        """Ends the flow, unless something may still come."""
        idle = self._resolver.pod.engine.poller.loop.time() - self._last
        if (self._sent and idle < IDLE_SECONDS) or (self._late and idle < LATE_SECONDS):
            self._resolver.pod.engine.queries.add(self)
        else:
            self.end("timeout", "")

    def abort(self) -> None:
        self.end("drained", "")

    def end(self, close: str, error: str) -> None:
        """Ends the flow; `close` and `error` are recorded for its pending queries."""
        pod = self._resolver.pod
        self._resolver.flows.pop((self._client, self._target), None)
        self._resolver.idle.pop(self, None)
        for number in tuple(self._waiting):
            self._settle(number, 0, close, error)
        for deadlines in (pod.engine.queries, pod.engine.answered):
            deadlines.settle(self)
        pod.live.discard(self)
        if self._server is not None:
            pod.engine.poller.remove(self._server.fileno())
            self._resolver.ends.pop(self._server.getsockname()[:2], None)
            self._server.close()
            self._server = None
        if self._sent or self._received:
            self._resolver.record(
                self._began, self._client, self._target, self._sent, self._received, "fin", kind="udp"
            )

    def _connected(self) -> socket.socket:
        """Returns the socket towards the resolver. Raises OSError or SluiceError."""
        if self._server is None:
            pod = self._resolver.pod
            server = pod.upstream.take(self._target, socket.SOCK_DGRAM)
            if self._own:
                with contextlib.suppress(OSError):  # it may belong to a machine behind the pod
                    keep_source(server, self._client, 0)
            try:
                server.connect(self._target)
                pod.engine.poller.add(server.fileno(), self._event)
            except OSError:
                server.close()
                raise
            self._server = server
            self._resolver.ends[server.getsockname()[:2]] = self
        return self._server

    def _await(self) -> None:
        """Sets the deadline of the flow once no query is pending: a short one if nothing else was sent."""
        pod = self._resolver.pod
        self._last = pod.engine.poller.loop.time()
        for deadlines in (pod.engine.queries, pod.engine.answered):
            deadlines.settle(self)
        if not self._waiting:
            (pod.engine.queries if self._sent or self._late else pod.engine.answered).add(self)
        (pod.live.add if self._waiting else pod.live.discard)(self)
        self._resolver.idle.pop(self, None)
        if not self._waiting:
            self._resolver.idle[self] = None

    def _event(self, mask: int) -> None:
        if mask & poller.READ:
            self._receive()

    def _receive(self) -> None:
        answered = len(self._waiting)
        for _ in range(_ROUNDS):
            if self._server is None:
                return
            try:
                self._take(self._server.recv(_LARGEST))
            except BlockingIOError:
                break
            except OSError as error:
                self._failed(error)
        else:
            self._resolver.pod.engine.poller.loop.call_soon(self._receive)
        if len(self._waiting) != answered or self._sent:
            self._await()

    def _take(self, datagram: bytes) -> None:
        self._reply(datagram)
        if dnsmessage.is_answer(datagram) and datagram[:2] in self._waiting:
            self._settle(datagram[:2], len(datagram), "fin", usable=dnsmessage.is_usable(datagram))
        else:
            self._received += len(datagram)

    def _failed(self, error: OSError) -> None:
        self._answer_all(_KNOWN.get(error.errno or 0, "error"), error.strerror or os.strerror(error.errno or 0))

    def _answer_all(self, close: str, error: str) -> None:
        """Answers each pending query with SERVFAIL, because the error itself cannot be forwarded."""
        for number, waiting in tuple(self._waiting.items()):
            self._reply(dnsmessage.failure(waiting.question))
            self._settle(number, 0, close, error)

    def _reply(self, datagram: bytes) -> None:
        reply(self._listener, self._client, datagram, given=not self._own)

    def _settle(self, number: bytes, received: int, close: str, error: str = "", *, usable: bool = False) -> None:
        self._resolver.waiting -= 1
        self._waiting.pop(number).settle(received, close, error, usable=usable)


def _drop() -> None:
    """Forgets a query of a pod that has ended."""


def reply(listener: socket.socket, client: Address, datagram: bytes, *, given: bool) -> None:
    """Answers from the address that the client asked.

    `given`: the eBPF programs may have given the client its address, which is a loopback address where one socket asks
    several resolvers (see datagram.bpf.c); the answer then comes from that one.
    """
    loopback = given and client[0].startswith("127.")
    source = [(socket.SOL_IP, IP_PKTINFO, _PKTINFO.pack(0, socket.inet_aton(client[0])))] if loopback else []
    with contextlib.suppress(OSError):  # a full buffer, or a client that has closed
        listener.sendmsg([datagram], source, 0, client)
