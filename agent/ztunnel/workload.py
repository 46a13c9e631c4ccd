"""One pod under ztunnel's care: its namespace, its listeners, and what is under way through them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket

from agent.core import names
from agent.kernel.accepting import Seldom
from agent.kernel.netlink.conntrack import Conntrack
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netns import Netns
from agent.zds.messages import Add
from agent.ztunnel.connection import ProxiedConnection, RelayDirection
from agent.ztunnel.dns import Resolver
from agent.ztunnel.listeners import Listeners, listen
from agent.ztunnel.pod import Engine, PodContext
from agent.ztunnel.upstream import Upstream

_ACCEPTED = 4  # connections taken at one wake-up: the other pods wait for as long as a flood is served
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_SECONDS = 0.1


class PodListener:
    """Listens from the moment it is made. `stop_listening`, then `close`."""

    def __init__(self, engine: Engine, add: Add, netns: Netns) -> None:
        """Does not take over `netns` when it fails. Raises OSError or a SluiceError."""
        self.netns = netns
        self._loop: asyncio.AbstractEventLoop = engine.poller.loop
        conntrack, diag, self._listeners = netns.call(_open)
        self.pod = PodContext(add.uid, f"{add.namespace}/{add.name}", engine, Upstream(netns), diag)
        self._resolver = Resolver(self.pod, conntrack)
        self._accepting: set[socket.socket] = set()
        self._crowded = Seldom()
        self._watch(self._listeners)

    def _watch(self, listeners: Listeners) -> None:
        for listener in listeners.every_tcp():
            self._accepting.add(listener)
            self._loop.add_reader(listener.fileno(), self._accept, listener)
        for listener in listeners.dns_udp:
            self._loop.add_reader(listener.fileno(), self._resolver.receive, listener)

    def succeeded(self) -> bool:
        """Whether another ztunnel listens in the pod, too. Raises KernelError."""
        return len(self.pod.diag.listening({names.OUTBOUND_PORT})) > 1

    def stop_listening(self) -> None:
        """No new connections. The UDP listeners stay: answers under way must come from them."""
        for listener in self._accepting:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        self._accepting.clear()

    def close(self) -> None:
        """Resets what is under way and gives everything back, the namespace too."""
        self.stop_listening()
        for under_way in tuple(self.pod.live):
            under_way.abort()
        for listener in self._listeners.dns_udp:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        self._resolver.close()
        self.pod.upstream.close()
        self.pod.diag.close()
        self.netns.close()

    def _accept(self, listener: socket.socket) -> None:
        inbound = listener is self._listeners.inbound
        for _ in range(_ACCEPTED):
            try:
                client, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(listener)
                    return
                continue  # that client has gone
            client.setblocking(False)
            taken = ProxiedConnection(
                self.pod, RelayDirection.INBOUND if inbound else RelayDirection.OUTBOUND, client, peer
            )
            if len(self.pod.live) < self.pod.engine.share:
                taken.open()
            else:
                words = f"the pod has {self.pod.engine.share} connections under way, which is its share"
                taken.refuse(words)
                self._crowded.log(f"pod {self.pod.name}: a connection was refused: {words}")

    def _pause(self, listener: socket.socket) -> None:
        """Out of descriptors: asking again at once would only burn the processor."""
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(_PAUSE_SECONDS, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._accepting:
            self._loop.add_reader(listener.fileno(), self._accept, listener)


def _open() -> tuple[Conntrack, SockDiag, Listeners]:
    with contextlib.ExitStack() as opened:
        conntrack = Conntrack()
        opened.callback(conntrack.close)
        diag = SockDiag()
        opened.callback(diag.close)
        listeners = listen()
        opened.pop_all()
        return conntrack, diag, listeners
