"""Captured DNS over UDP: each query goes to the resolver that the pod asked, each answer back, byte for byte.

The resolver is what conntrack remembers of the redirected query, or the agent's eBPF programs where they redirect.
If neither does the query is dropped and recorded: sending it to some other resolver would answer from another view of
the names.
"""

from __future__ import annotations

import errno
import os
import socket

from agent.core import names
from agent.core.errors import KernelError, SluiceError
from agent.kernel.conntrack import Conntrack
from agent.ztunnel import poller
from agent.ztunnel.original import Address
from agent.ztunnel.pod import Pod, now

OUTSTANDING = 4096
_ACCEPTED = 64  # queries taken at one wake-up, then others get their turn
_LARGEST = 65535


class Resolver:
    """The DNS side of one pod: receives on its listeners, asks upstream, answers from the same listener."""

    def __init__(self, pod: Pod, conntrack: Conntrack) -> None:
        """Takes over `conntrack`, made inside the pod's namespace."""
        self.pod, self._conntrack = pod, conntrack
        self.outstanding = 0

    def receive(self, listener: socket.socket) -> None:
        """To be called when `listener` is readable."""
        for _ in range(_ACCEPTED):
            try:
                query, client = listener.recvfrom(_LARGEST)
            except BlockingIOError:
                return
            except OSError:
                continue  # the error of an earlier answer (ICMP), not of this query
            Query(self, listener, client, len(query)).ask(query)

    def original(self, listener: socket.socket, client: Address) -> Address | None:
        """What the client asked: never ztunnel's own port. None when nobody knows. Raises KernelError."""
        local, peer = listener.getsockname()[:2], (client[0], client[1])
        failure: KernelError | None = None
        found = None
        try:
            found = self._conntrack.original_destination(socket.IPPROTO_UDP, local, peer)
        except KernelError as error:  # a kernel without conntrack has eBPF nevertheless
            failure = error
        if found is None or found[1] == names.DNS_PORT:  # a flow that was not redirected in conntrack's eyes
            found = self.pod.engine.asked.resolver(listener, peer)
        if found is None and failure is not None:
            raise failure
        return None if found is None or found[1] == names.DNS_PORT else found

    def close(self) -> None:
        self._conntrack.close()


class Query:
    """One query until its answer; keeps itself in the pod's `live` for so long."""

    __slots__ = (
        "_began", "_client", "_destination", "_done", "_id", "_listener", "_resolver", "_server", "_size",
    )  # fmt: skip

    def __init__(self, resolver: Resolver, listener: socket.socket, client: Address, size: int) -> None:
        self._resolver, self._listener, self._client, self._size = resolver, listener, client, size
        self._destination: Address | None = None
        self._server: socket.socket | None = None
        self._began = now()
        self._id = b""
        self._done = False
        resolver.outstanding += 1
        resolver.pod.live.add(self)

    def ask(self, query: bytes) -> None:
        """Sends the query on. Failure is recorded, never raised."""
        pod = self._resolver.pod
        try:
            if self._resolver.outstanding > OUTSTANDING:
                raise OSError(errno.ENOBUFS, f"more than {OUTSTANDING} queries outstanding")
            found = self._destination = self._resolver.original(self._listener, self._client)
            if found is None:
                raise OSError(errno.EDESTADDRREQ, "neither conntrack nor eBPF knows which resolver was asked; dropped")
            # An IPv6 address takes four parts to be told apart by `text` and `take`.
            target: Address = (found[0], found[1], 0, 0) if ":" in found[0] else found
            self._destination = target
            self._id = query[:2]
            self._server = pod.upstream.take(target, socket.SOCK_DGRAM)
            self._server.connect(target)
            self._server.send(query)
            pod.engine.poller.add(self._server.fileno(), self._event)
            pod.engine.queries.add(self)
        except OSError as error:
            self._fail(error)
        except SluiceError as error:
            self._end("error", str(error), 0)

    def expire(self) -> None:
        if not self._done:
            self._end("timeout", "no answer from the resolver", 0)

    def abort(self) -> None:
        if not self._done:
            self._end("drained", "", 0)

    def _event(self, mask: int) -> None:
        if not mask & poller.READ or self._server is None:
            return
        try:
            while not self._done:
                answer = self._server.recv(_LARGEST)
                if answer[:2] != self._id:
                    continue  # not the answer to this query: a guess from off the path
                self._listener.sendto(answer, self._client)
                self._end("fin", "", len(answer))
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        close = "refused" if error.errno == errno.ECONNREFUSED else "error"
        self._end(close, error.strerror or os.strerror(error.errno or 0), 0)

    def _end(self, close: str, error: str, received: int) -> None:
        self._done = True
        pod = self._resolver.pod
        if self._server is not None:
            pod.engine.poller.remove(self._server.fileno())
            self._server.close()
        self._resolver.outstanding -= 1
        pod.engine.queries.settle(self)
        pod.live.discard(self)
        pod.record(
            "dns", "outbound", self._began, self._client, self._destination,
            self._size, received, close, error,
        )  # fmt: skip
