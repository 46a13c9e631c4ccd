# SPDX-License-Identifier: Apache-2.0
"""One pod of ztunnel: its namespace, its listeners and their connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from functools import partial

from agent.kernel.accepting import Seldom
from agent.kernel.netlink.ctnetlink import Conntrack
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netns import Netns
from agent.zds.messages import Add
from agent.ztunnel.dns.dns_connection import DnsConnection
from agent.ztunnel.dns.forwarding import Resolver
from agent.ztunnel.relay import pod_sockets
from agent.ztunnel.relay.pod_context import Engine, PodContext
from agent.ztunnel.relay.pod_sockets import Listeners, listen
from agent.ztunnel.relay.proxied_connection import ProxiedConnection
from agent.ztunnel.relay.upstream import Upstream
from agent.ztunnel.telemetry.response_flags import Reporter

_ACCEPTED = 4  # connections accepted at one wake-up: the other pods wait while a flood is served
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_SECONDS = 0.1


class PodListener:
    """Listens from its creation on. To end it, call `stop_listening`, then `close`."""

    def __init__(
        self, engine: Engine, add: Add, netns: Netns, listeners: Listeners | None = None, *, dns: bool = True
    ) -> None:
        """Takes over `netns` and `listeners`, unless it fails; without `listeners` it opens them.

        `dns`: this process, and no other one that has the listeners, reads queries over UDP. Raises OSError or a
        SluiceError.
        """
        self.netns = netns
        self.add = add
        self._loop: asyncio.AbstractEventLoop = engine.poller.loop
        self._poller = engine.poller
        self._dns = dns
        conntrack, diag, self._listeners = netns.call(lambda: _open(listeners, hbone=engine.tunnels is not None))
        self.pod = PodContext(
            add.uid, f"{add.namespace}/{add.name}", engine=engine, upstream=Upstream(netns), diag=diag, add=add
        )
        self._resolver = Resolver(self.pod, conntrack)
        if engine.tunnels is not None:
            engine.tunnels.start(self.pod)
        self._accepting: set[socket.socket] = set()
        self._crowded = Seldom()
        engine.pods.add(self)
        self._watch(self._listeners)

    def _watch(self, listeners: Listeners) -> None:
        for listener in listeners.every_tcp():
            self._accepting.add(listener)
            self._listen(listener)
        for listener in listeners.dns_udp if self._dns else ():
            self._loop.add_reader(listener.fileno(), self._resolver.receive, listener)

    def _listen(self, listener: socket.socket) -> None:
        self._poller.listen(listener.fileno(), partial(self._accept, listener))

    def succeeded(self) -> bool:
        """Returns True if another ztunnel also listens in the pod. Raises KernelError."""
        return pod_sockets.succeeded(self.pod.diag)

    def stop_listening(self) -> None:
        """Stops new connections and streams. The UDP listeners stay: pending answers must come from them."""
        self._close_listeners()
        if self.pod.engine.tunnels is not None:
            self.pod.engine.tunnels.drain(self.pod)

    def _close_listeners(self) -> None:
        for listener in self._accepting:
            self._poller.unlisten(listener.fileno())
            listener.close()
        self._accepting.clear()

    def close(self) -> None:
        """Resets open connections and releases all resources, the namespace included."""
        self._close_listeners()
        for under_way in tuple(self.pod.live):
            under_way.abort()
        if self.pod.engine.tunnels is not None:
            self.pod.engine.tunnels.close(self.pod)
        for listener in self._listeners.dns_udp:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        self._resolver.close()
        self.pod.upstream.close()
        self.pod.diag.close()
        self.netns.close()
        self.pod.engine.pods.discard(self)

    def _accept(self, listener: socket.socket, _: int) -> None:
        if self.pod.engine.shared:
            # To the end of the queue of those that wait: another process gets the next connection.
            self._poller.unlisten(listener.fileno())
            self._listen(listener)
        inbound = listener is self._listeners.inbound
        for _ in range(_ACCEPTED):
            try:
                client, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self.pod.engine.exhausted.log(f"new connections wait: {error.strerror}")
                    self._pause(listener)
                    return
                continue  # that client has closed
            client.setblocking(False)
            tunnels = self.pod.engine.tunnels
            if listener is self._listeners.hbone and tunnels is not None:
                accept = partial(tunnels.accept, self.pod, client, peer)
                if not tunnels.hold(self.pod, accept, client.close):
                    accept()
                continue
            taken: DnsConnection | ProxiedConnection
            if self.pod.engine.mesh_names is not None and listener in self._listeners.dns_tcp:
                taken = DnsConnection(self.pod, client, peer)
            else:
                taken = ProxiedConnection(self.pod, Reporter.DESTINATION if inbound else Reporter.SOURCE, client, peer)
            if len(self.pod.live) < self.pod.engine.share:
                if tunnels is None or not tunnels.hold(self.pod, taken.open, taken.abort):
                    taken.open()
            else:
                limit = f"the pod has reached its limit of {self.pod.engine.share} connections"
                taken.refuse(limit)
                self._crowded.log(f"pod {self.pod.name}: connection refused: {limit}")

    def _pause(self, listener: socket.socket) -> None:
        """Pauses accepting when descriptors run out: retrying at once would only burn the processor."""
        self._poller.unlisten(listener.fileno())
        self._loop.call_later(_PAUSE_SECONDS, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._accepting:
            self._listen(listener)


def _open(listeners: Listeners | None, *, hbone: bool) -> tuple[Conntrack, SockDiag, Listeners]:
    with contextlib.ExitStack() as opened:
        conntrack = Conntrack()
        opened.callback(conntrack.close)
        diag = SockDiag()
        opened.callback(diag.close)
        listeners = listeners or listen(hbone=hbone)
        opened.pop_all()
        return conntrack, diag, listeners
