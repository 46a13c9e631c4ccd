# SPDX-License-Identifier: Apache-2.0
"""One proxied TCP connection: its destination is found, connected, relayed and recorded.

`client` is the accepted socket, `server` the one that ztunnel opens. Outbound, the server is anywhere; inbound, it is
the application in the same pod, which must see the client's own address. A failure on one side becomes a reset on the
other, so that neither sees an orderly end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time

from agent.core.errors import SluiceError
from agent.kernel.pair_copier import PairCopier
from agent.ztunnel.relay import keepalive, original_dst, poller
from agent.ztunnel.relay.original_dst import Address
from agent.ztunnel.relay.pod_context import MOST_RETURNS, Ends, InboundEnds, PodContext, RefusedError, now
from agent.ztunnel.relay.splice import Half
from agent.ztunnel.relay.upstream import mark_returned, shut
from agent.ztunnel.telemetry.records import close_by
from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag

_LOOPBACK = {2: "127.0.0.1", 4: "::1"}  # by the length of an Address


class ProxiedConnection:
    """A connection, in `pod.live` from `open` until it is recorded."""

    __slots__ = (
        "_began", "_client", "_copier", "_destination", "_done", "_down", "_ends", "_note", "_pod", "_reporter",
        "_server", "_source", "_up", "_via",
    )  # fmt: skip

    def __init__(self, pod: PodContext, reporter: Reporter, client: socket.socket, peer: Address) -> None:
        """Takes over `client`, which must be non-blocking; `peer` is its peer as accept returned it."""
        self._pod = pod
        self._reporter = reporter
        self._client = client
        self._source = original_dst.plain(peer)
        self._destination: Address | None = None
        self._server: socket.socket | None = None
        self._up: Half | None = None  # client to server; None while connecting
        self._down: Half | None = None
        self._copier: PairCopier | None = None  # as long as it copies
        self._via: Address | None = None  # the address that the server sees
        self._ends: Ends | None = None  # of the server's socket
        self._began = now()
        self._note = ""
        self._done = False

    def open(self) -> None:
        """Starts to connect. A failure is recorded and resets the client, and is never raised."""
        self._pod.live.add(self)
        try:
            self._connect()
        except OSError as error:
            self._fail(error)
        except RefusedError as error:
            if error.unresolved and (tunnels := self._pod.engine.tunnels) is not None:
                tunnels.resolve(error.unresolved, self._resolved)
                return
            self._pod.count(self, error.parties, self._began)
            self._end("refused", str(error), error.flag)
        except SluiceError as error:
            self._end("error", str(error))

    def _resolved(self) -> None:
        if not self._done:
            self.open()

    def refuse(self, why: str) -> None:
        """Resets the client at once, instead of `open`."""
        self._end("refused", why)

    def expire(self) -> None:
        if self._up is None and not self._done:
            self._end("timeout", "connect timed out")
        elif not self._done:
            self._follow_keepalive()

    def abort(self) -> None:
        if not self._done:
            self._end("drained", "")

    def revoke(self, why: str, flag: ResponseFlag) -> None:
        if not self._done:
            self._end("refused", why, flag)

    def moved(self) -> tuple[int, int]:
        if self._up is None or self._down is None:
            return 0, 0
        if (copier := self._copier) is None or self._server is None:
            return self._up.moved, self._down.moved
        more = copier.moved(self._client.fileno()), copier.moved(self._server.fileno())
        return self._up.moved + more[0], self._down.moved + more[1]

    def _connect(self) -> None:
        destination, own = original_dst.original_destination(self._client, self._source)
        self._destination = destination
        if original_dst.is_own(destination, self._client):
            self._end("refused", "the destination is a port of ztunnel itself")
            return
        returns = self._pod.returns(self._client, self._source, destination) if own else 0
        if returns > MOST_RETURNS:
            self._end("refused", self._pod.warn_of_loop("connection"))
            return
        onward = destination if returns else self._onward(destination)
        if onward is None:  # it has a tunnel
            self._done = True
            self._pod.live.discard(self)
            return
        self._destination = destination = onward
        source = original_dst.source_to_keep(self._source, own)
        self._server = self._reach(destination, source, returned=bool(returns))
        self._ends = self._pod.connects_to(destination, self._server, returns)
        self._pod.engine.poller.add(self._server.fileno(), self._server_event)
        self._pod.engine.connects.add(self)

    def _onward(self, destination: Address) -> Address | None:
        """Returns where the connection goes in plain; None if a tunnel has taken it over. Raises RefusedError."""
        tunnels = self._pod.engine.tunnels
        if tunnels is None:
            return destination
        if self._reporter is Reporter.SOURCE:
            hop = tunnels.outbound(self._pod, self._client, self._source, destination, self._began)
            if hop is None:
                return None
        else:
            hop = tunnels.inbound_plain(self._pod, self._source, destination)
            self._pod.inbound[self] = InboundEnds(self._source, destination)
        self._pod.count(self, hop.parties, self._began)
        return hop.address

    def _reach(self, destination: Address, source: Address, *, returned: bool) -> socket.socket:
        if self._reporter is Reporter.DESTINATION:
            connecting, self._note = self._pod.upstream.connect_for(self._source, destination)
            if returned:
                mark_returned(connecting)
            return connecting
        return self._pod.upstream.connect(destination, source, returned=returned)

    def _follow_keepalive(self) -> None:
        """Probes the far end as the application probes its own peer, which is ztunnel."""
        assert self._server is not None and self._destination is not None and self._via is not None
        if self._reporter is Reporter.SOURCE:
            here: Address = original_dst.plain(self._client.getsockname())
            # With eBPF the socket is connected to ztunnel itself, from loopback unless the application has bound it.
            ours = [
                (self._source, self._destination),
                (self._source, here),
                ((_LOOPBACK[len(here)], self._source[1]), here),
            ]
            far = self._server
        else:
            ours = [(self._destination, self._via), (self._destination, (_LOOPBACK[len(self._via)], self._via[1]))]
            far = self._client
        ends = [((local[0], local[1]), (remote[0], remote[1])) for local, remote in ours]
        idle = keepalive.idle_seconds(self._pod.diag, ends, time.monotonic() - self._began[1])
        if idle:
            with contextlib.suppress(OSError):  # it has just closed
                keepalive.probe(far, idle)

    def _server_event(self, mask: int) -> None:
        if self._down is not None and self._up is not None:
            self._event(mask, self._down, self._up)
        else:
            self._connected(mask)

    def _client_event(self, mask: int) -> None:
        if self._down is not None and self._up is not None:
            self._event(mask, self._up, self._down)

    def _connected(self, mask: int) -> None:
        server = self._server
        if server is None or not mask & (poller.WRITE | poller.END):
            return
        failed = server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            self._fail(OSError(failed, os.strerror(failed)))
            return
        self._pod.engine.connects.settle(self)
        self._via = server.getsockname()
        self._pod.engine.aged.add(self)
        self._up = Half(self._client, server)
        self._down = Half(server, self._client)
        # The request has usually arrived already: forward it before the first event of the client.
        self._event(mask | poller.READ & ~poller.END, self._down, self._up)
        self._pump(self._up)
        if not self._done:
            try:
                self._pod.engine.poller.add(self._client.fileno(), self._client_event)
            except OSError as error:  # out of memory: there would be no events of the client
                self._fail(error)
                return
            copier = self._pod.engine.poller.copier
            if copier is not None and self._up.is_short and self._down.is_short:
                added = copier.add(self._client.fileno(), server.fileno(), self._left)
                self._copier = copier if added else None

    def _left(self, source: int, rest: bytes, error: int) -> None:
        """Takes over an exchange from the copier; an event follows."""
        half = self._up if source == self._client.fileno() else self._down
        assert half is not None
        try:
            if error:
                raise OSError(error, os.strerror(error))
            half.resume(rest)
        except OSError as failed:
            self._fail(failed)

    def _stop_copier(self) -> None:
        if self._copier is not None and self._up and self._down and self._server:
            self._up.moved += self._copier.remove(self._client.fileno())
            self._down.moved += self._copier.remove(self._server.fileno())
            self._copier = None

    def _event(self, mask: int, reads: Half, writes: Half) -> None:
        """Handles an event: `reads` reads from the socket that reported `mask`, `writes` writes to it."""
        self._stop_copier()
        if mask & poller.READ and not reads.finished:
            if mask & poller.END:
                reads.ended = True
            if mask & poller.URGENT:
                reads.urgent = True
            self._pump(reads)
        if mask & poller.WRITE and writes.buffered and not self._done:
            self._pump(writes)
        if mask & poller.ERROR and not self._done:
            # No read was pending when the reset came: the relay was stalled, or past the FIN.
            failed = reads.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET
            self._fail(OSError(failed, os.strerror(failed)))

    def _pump(self, half: Half) -> None:
        if self._done:
            return
        try:
            more = half.pump()
        except OSError as error:
            self._fail(error)
            return
        if more:
            self._pod.engine.poller.loop.call_soon(self._pump, half)
        elif self._up is not None and self._down is not None and self._up.finished and self._down.finished:
            self._end("fin", "")

    def _fail(self, error: OSError) -> None:
        self._end(close_by(error.errno), error.strerror or str(error), None if self._up else ResponseFlag.CONNECT)

    def _end(self, close: str, error: str, flag: ResponseFlag | None = None) -> None:
        self._done = True
        self._stop_copier()
        loop = self._pod.engine.poller
        for end in (self._client, self._server):
            if end is not None:
                loop.remove(end.fileno())
                shut(end, close)
        for half in (self._up, self._down):
            if half is not None:
                half.close()
        self._pod.engine.connects.settle(self)
        self._pod.engine.aged.settle(self)
        if self._server is not None and self._destination is not None:
            self._pod.upstream.release(self._destination)
        if self._ends is not None:
            self._pod.connecting.pop(self._ends, None)
        self._pod.end(
            self,
            kind="tcp",
            reporter=self._reporter,
            began=self._began,
            source=self._source,
            destination=self._destination,
            close=close,
            error=error,
            note=self._note,
            flag=flag,
            via=self._via,
        )
