# SPDX-License-Identifier: Apache-2.0
"""Captured TCP to port 53 in a mesh: answers names of the mesh and passes all else on, unchanged.

The resolver is connected when the first message is for it. Its answers and those of the mesh share the connection, so
the order may change (RFC 7766, 6.2.1.1), but a message is never interrupted. While a resolver is away the pod gets
SERVFAIL for what the resolver would have answered, and the connection stays.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from functools import partial
from typing import Final

from agent.core.errors import SluiceError
from agent.ztunnel.dns import dnsmessage, pending_query
from agent.ztunnel.dns.dns_framing import LENGTH, DnsFraming, Piece, framed
from agent.ztunnel.dns.pending_query import PendingQuery
from agent.ztunnel.relay import original_dst, poller
from agent.ztunnel.relay.original_dst import Address
from agent.ztunnel.relay.pod_context import MOST_RETURNS, SMALL_PART, Ends, PodContext, now
from agent.ztunnel.relay.upstream import shut
from agent.ztunnel.telemetry.records import Began, close_by

MOST_PENDING: Final = 100  # queries of one connection without an answer; no more are read then
LONGEST_QUERY: Final = 1024  # bytes of a query that the mesh may answer, with the options of EDNS
_FULL: Final = 16 << 10  # bytes that one end has not taken; the other one is not read then
_CHUNK: Final = 16 << 10
_ROUNDS: Final = 4  # of reading, then others get their turn


class _End:
    """One socket, the messages that it sent and the bytes that it gets."""

    __slots__ = ("connection", "ended", "framing", "output", "pieces", "readable", "shut", "to_end")

    def __init__(self, connection: socket.socket, framing: DnsFraming) -> None:
        self.connection = connection
        self.framing = framing
        self.pieces: deque[Piece] = deque()
        self.output = bytearray()
        self.readable = True
        self.to_end = False  # what waits to be read has a FIN, an error or urgent data, after which no event comes
        self.ended = False  # the FIN was read
        self.shut = False  # the FIN was sent

    def read(self) -> None:
        """Reads once, if there may be something. Raises OSError."""
        if not self.readable:
            return
        try:
            data = self.connection.recv(_CHUNK)
        except BlockingIOError:
            self.readable = False
            return
        self.ended = not data
        self.readable = len(data) == _CHUNK or (self.to_end and not self.ended)
        self.pieces.extend(self.framing.cut(data))

    def flush(self) -> bool:
        """Sends what the socket takes; returns True if it took something. Raises OSError."""
        moved = False
        while self.output:
            try:
                del self.output[: self.connection.send(self.output)]
            except BlockingIOError:
                break
            moved = True
        return moved


class DnsConnection:
    """Belongs to `pod.live` from `open` until its end."""

    __slots__ = (
        "_began", "_client", "_counted", "_destination", "_done", "_dropped", "_ends", "_late", "_mid_answer",
        "_mid_query", "_own", "_pending", "_pod", "_postponed", "_received", "_returns", "_sent", "_server", "_source",
        "_used",
    )  # fmt: skip

    def __init__(self, pod: PodContext, client: socket.socket, peer: Address) -> None:
        """Takes over `client`, which must be non-blocking; `peer` is its peer as accept returned it."""
        self._pod = pod
        self._client = _End(client, DnsFraming(LONGEST_QUERY, queries=True))
        self._source = original_dst.plain(peer)
        self._returns = 0  # how often this connection of ztunnel itself has come back
        self._own = False  # the source is certainly the address of the client's socket
        self._destination: Address | None = None
        self._server: _End | None = None
        self._ends: Ends | None = None  # of the server's socket
        self._pending: dict[bytes, PendingQuery] = {}  # by id
        self._late: set[bytes] = set()  # ids that got SERVFAIL: what comes for them is dropped
        self._postponed: list[bytes] = []  # answers of the mesh that wait for the end of a message
        self._mid_query = self._mid_answer = False  # a message has been passed on in part
        self._dropped = self._counted = False  # the message that the resolver is sending
        self._sent = self._received = 0  # bytes that belong to no recorded query
        self._used = True  # since the last look
        self._began = now()
        self._done = False

    def open(self) -> None:
        """Starts to read. A failure is recorded and resets the client, and is never raised."""
        self._pod.live.add(self)
        self._pod.dns_connections.add(self)
        try:
            if why := self._refusal(self._client.connection):
                self._end("refused", why)
                return
            self._pod.engine.connects.add(self)
            self._pod.engine.poller.add(self._client.connection.fileno(), partial(self._event, self._client))
        except OSError as error:
            self._end(close_by(error.errno), error.strerror or str(error))

    def _refusal(self, client: socket.socket) -> str:
        """Finds the destination; returns why the connection is not served, or "". Raises OSError."""
        self._destination, own = original_dst.original_destination(client, self._source)
        if original_dst.is_own(self._destination, client):
            return "the destination is a port of ztunnel itself"
        most = self._pod.engine.share // SMALL_PART
        if len(self._pod.dns_connections) > most:
            limit = f"more than {most} connections to resolvers"
            self._pod.warnings.log(f"pod {self._pod.name}: {limit}")
            return limit
        self._own = own
        self._returns = self._pod.returns(client, self._source, self._destination) if own else 0
        if self._returns > MOST_RETURNS:
            return self._pod.warn_of_loop("connection")
        if self._returns:  # the mesh has been asked already
            self._client.framing.pass_all()
        return ""

    def refuse(self, why: str) -> None:
        """Resets the client at once, instead of `open`."""
        self._end("refused", why)

    def abort(self) -> None:
        if not self._done:
            self._end("drained" if self._pending or self._client.framing.endless else "fin", "")

    def expire(self) -> None:
        """Ends a connection that has no use, as resolvers do, and one to a resolver that cannot be reached."""
        if self._done:
            return
        server = self._server
        if server is not None and not self._pending and not _is_connected(server.connection):
            self._end("timeout", "connect timed out")
        elif (server is None or self._client.ended) and not (self._used or self._pending):
            self._end("fin", "")
        else:
            self._used = False
            self._pod.engine.connects.add(self)

    def unanswered(self, query: PendingQuery) -> None:
        server = self._server
        if server is not None and _is_connected(server.connection) and len(self._late) < MOST_PENDING:
            self._late.add(query.question[:2])
            self._fail(query, "timeout", "no answer from the resolver")
        else:
            self._lost("timeout", "no answer from the resolver")
        self._work()

    # Events

    def _event(self, end: _End, mask: int) -> None:
        if mask & poller.READ:
            end.readable = True
        if mask & (poller.END | poller.URGENT):
            end.to_end = True
        self._work()

    def _work(self) -> None:
        for _ in range(_ROUNDS):
            for step in (self._serve_client, self._serve_server, self._flush_client):
                if self._done:
                    return
                step()
            if self._done:
                return
            if not self._has_more():
                self._finish()
                return
        self._pod.engine.poller.loop.call_soon(self._work)

    def _has_more(self) -> bool:
        """Returns True if there is input, and room for it."""
        client, server = self._client, self._server
        if (client.readable or client.pieces) and self._may_ask():
            return True
        return server is not None and server.readable and len(client.output) < _FULL

    def _serve_client(self) -> None:
        client = self._client
        try:
            if not client.pieces and self._may_ask():
                client.read()
        except OSError as error:
            self._end(close_by(error.errno), error.strerror or str(error))
        while client.pieces and self._may_ask() and not self._done:
            self._used = True
            self._ask(client.pieces.popleft())

    def _flush_client(self) -> None:
        try:
            self._used |= self._client.flush()
        except OSError as error:
            self._end(close_by(error.errno), error.strerror or str(error))

    def _may_ask(self) -> bool:
        """Returns True if there is room for another query and its answer."""
        waiting = len(self._server.output) if self._server is not None else 0
        full = self._postponed or max(len(self._client.output), waiting) >= _FULL
        return not full and len(self._pending) < MOST_PENDING

    def _ask(self, piece: Piece) -> None:
        """Takes a message of the client, or a part of a long one."""
        message = piece.data[LENGTH:] if piece.first and piece.last else b""
        question = dnsmessage.question(message)
        mesh = pending_query.ask_mesh(self._pod, message, question, "tcp")
        if mesh.answer is not None:
            self._answer(mesh.answer)
            close = "refused" if mesh.error else "mesh"
            self._record("dns", now(), len(message), len(mesh.answer), close, mesh.error)
            return
        if question and question[:2] not in self._pending:
            assert self._destination is not None
            self._late.discard(question[:2])
            self._pending[question[:2]] = PendingQuery(
                self._pod, self, question, mesh.labels, client=self._source, target=self._destination, size=len(message)
            )
        else:
            self._sent += len(piece.data)
        try:
            server = self._server or self._connect()
        except (OSError, SluiceError) as error:
            self._lost(close_by(getattr(error, "errno", None)), getattr(error, "strerror", None) or str(error))
            return
        if self._client.framing.endless:
            server.framing.pass_all()
        server.output += piece.data
        self._mid_query = not piece.last

    def _connect(self) -> _End:
        """Raises OSError or SluiceError."""
        assert self._destination is not None
        engine = self._pod.engine
        source = original_dst.source_to_keep(self._source, self._own)
        connection = self._pod.upstream.connect(self._destination, source)
        self._server = server = _End(connection, DnsFraming(0, queries=False))
        self._late.clear()
        self._ends = self._pod.connects_to(self._destination, connection, self._returns)
        engine.poller.add(connection.fileno(), partial(self._event, server))
        return server

    def _serve_server(self) -> None:
        server = self._server
        if server is None:
            return
        try:
            server.flush()
            if len(self._client.output) < _FULL:
                server.read()
        except OSError as error:
            self._lost(close_by(error.errno), error.strerror or str(error))
            return
        while server.pieces:
            self._used = True
            self._pass_back(server.pieces.popleft())
        if server.ended:
            self._lost("fin", "the resolver closed the connection")

    def _pass_back(self, piece: Piece) -> None:
        """Takes a message of the resolver, or a part of a long one."""
        if piece.first:
            message = piece.data[LENGTH:]
            number = message[:2] if dnsmessage.is_answer(message) else b""
            query = self._pending.pop(number, None)
            self._dropped = query is None and number in self._late
            self._counted = query is not None
            if query is not None:
                query.settle(int.from_bytes(piece.data[:LENGTH]), "fin", usable=dnsmessage.is_usable(message))
        if not self._dropped:
            self._client.output += piece.data
            self._received += 0 if self._counted else len(piece.data)
        self._mid_answer = not (piece.last or self._dropped)
        if not self._mid_answer:
            self._client.output += b"".join(self._postponed)
            self._postponed.clear()

    def _answer(self, message: bytes) -> None:
        if self._mid_answer:
            self._postponed.append(framed(message))
        else:
            self._client.output += framed(message)

    # End

    def _fail(self, query: PendingQuery, close: str, error: str) -> None:
        del self._pending[query.question[:2]]
        self._answer(dnsmessage.failure(query.question))
        query.settle(0, close, error)

    def _lost(self, close: str, error: str) -> None:
        """Handles the end of the resolver's connection: answers for it, or ends the client's with it."""
        self._close_server()
        if (self._mid_query or self._mid_answer) and not self._client.framing.endless:
            self._end("reset", error)
        elif self._pending:
            for query in tuple(self._pending.values()):
                self._fail(query, close, error)
        elif close == "fin":
            self._client.ended = True  # as if it had asked for the end, which then comes after all answers
            self._client.readable = False
        else:
            self._end(close, error)

    def _finish(self) -> None:
        """Passes on the FIN of the client; ends the connection if nothing can follow."""
        client, server = self._client, self._server
        if self._done or not client.ended or client.pieces:
            return
        if server is None:
            if not (client.output or self._pending):
                self._end("fin", "")
        elif not (server.output or server.shut):
            server.shut = True
            with contextlib.suppress(OSError):  # it is gone, and an event follows
                server.connection.shutdown(socket.SHUT_WR)

    def _close_server(self, close: str = "fin") -> None:
        if self._server is not None:
            self._pod.engine.poller.remove(self._server.connection.fileno())
            shut(self._server.connection, close)
            self._server = None
            assert self._destination is not None
            self._pod.upstream.release(self._destination)
        if self._ends is not None:
            self._pod.connecting.pop(self._ends, None)

    def _end(self, close: str, error: str) -> None:
        self._done = True
        self._close_server(close)
        self._pod.engine.poller.remove(self._client.connection.fileno())
        shut(self._client.connection, close)
        self._pod.engine.connects.settle(self)
        self._pod.live.discard(self)
        self._pod.dns_connections.discard(self)
        for query in self._pending.values():
            query.settle(0, close, error)
        self._pending.clear()
        if error or self._sent or self._received:
            self._record("tcp", self._began, self._sent, self._received, close, error)

    def _record(self, kind: str, began: Began, sent: int, received: int, close: str, error: str) -> None:
        self._pod.record(kind, "outbound", began, self._source, self._destination, sent, received, close, error)


def _is_connected(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True
